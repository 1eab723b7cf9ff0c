"""The bundled model: diffusers loads its folder and paints the same picture, with all defaults."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, UniPCMultistepScheduler
from util_sd3 import channels_last, error, noise

import jdit
from jdit.load import ASSETS

pytestmark = pytest.mark.torch

PROMPTS = [
    "a red apple",
    "a blue banana on a yellow background, and much more than this that nobody ever trained it for",
]


@pytest.fixture(scope="module")
def both():
    folder = ASSETS / "fluent-image"
    theirs = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs, jdit.load("fluent-image", dtype="float32")


def test_same_latents_with_the_bundled_scheduler(both):
    theirs, ours = both
    latents = noise(0, 2, 16, 16, 16)
    with torch.no_grad():
        want = theirs(PROMPTS, latents=latents, num_inference_steps=6, guidance_scale=4.0, output_type="latent").images
    got = ours(PROMPTS, latents=channels_last(latents), steps=6, guidance=4.0, output="latents").latents
    assert error(got, channels_last(want)) < 1e-4


def test_same_picture_as_by_default(both):
    theirs, ours = both
    plan = ours.plan
    latents = noise(1, 1, 16, 16, 16)
    with torch.no_grad():
        want = theirs(
            "a red apple",
            latents=latents,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            output_type="np",
        ).images
    got = ours("a red apple", latents=channels_last(latents)).pixels
    assert got.shape == (1, 128, 128, 3)
    assert np.abs(got / 255 - want).max() < 2 / 255
    red, green, blue = np.moveaxis(got[0] / 255, -1, 0)
    apple = (red > green + 0.25) & (red > blue + 0.25)
    assert apple.mean() > 0.1  # there is something red in it


def test_another_solver(both):
    theirs, ours = both
    scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config)
    other = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    theirs.scheduler = other
    latents = noise(2, 1, 16, 16, 16)
    try:
        with torch.no_grad():
            want = theirs(
                "a blue car", latents=latents, num_inference_steps=8, guidance_scale=3.0, output_type="latent"
            )
    finally:
        theirs.scheduler = scheduler
    config = {"_class_name": "UniPCMultistepScheduler", **other.config}
    got = ours("a blue car", latents=channels_last(latents), steps=8, guidance=3.0, solver=config, output="latents")
    assert error(got.latents, channels_last(want.images)) < 1e-4


def test_size_of_the_files():
    parts = [
        p for p in (ASSETS / "fluent-image").rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".txt")
    ]
    assert sum(p.stat().st_size for p in parts) <= 24e6
