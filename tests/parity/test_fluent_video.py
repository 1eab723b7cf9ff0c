"""The bundled video model: diffusers loads its folder and makes the same clip, with all defaults."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from util_sd3 import error, noise
from util_wan_pipeline import channels_last

import jdit
from jdit.load import ASSETS

pytestmark = pytest.mark.torch

FOLDER = ASSETS / "fluent-video"


@pytest.fixture(scope="module")
def ours():
    return jdit.load("fluent-video", dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    pipe = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_same_clip_as_by_default(ours, theirs):
    latents, plan = noise(1, 1, 16, 5, 16, 16), ours.plan
    with torch.no_grad():
        want = theirs(
            "a running man", latents=latents, height=plan.height, width=plan.width, num_frames=plan.num_frames,
            num_inference_steps=plan.steps, guidance_scale=plan.guidance, output_type="np",
        ).frames  # fmt: skip
    got = ours("a running man", latents=channels_last(latents))
    assert got.pixels.shape == (1, 17, 64, 64, 3) and got.fps == plan.fps
    assert np.abs(got.pixels / 255 - want).max() < 2 / 255
    frames = got.pixels[0].astype(float)
    assert np.abs(np.diff(frames, axis=0)).mean() > 2  # levels of 255: he runs
    assert (frames.min(-1) < 200).mean() > 0.05  # and is no white picture


def test_same_latents_of_two_prompts(ours, theirs):
    prompts, latents = (
        ["a cat", "waving hand, dark skin tone, and more that nobody trained it for"],
        noise(0, 2, 16, 3, 16, 24),
    )
    with torch.no_grad():
        want = theirs(
            prompts, latents=latents, height=64, width=96, num_frames=9, num_inference_steps=4, guidance_scale=3.0,
            output_type="latent",
        ).frames  # fmt: skip
    got = ours(prompts, latents=channels_last(latents), width=96, num_frames=9, steps=4, guidance=3.0, output="latents")
    assert error(got.latents, channels_last(want)) < 1e-4


def test_size_of_the_files():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file() and p.name != "README.md") <= 12e6
