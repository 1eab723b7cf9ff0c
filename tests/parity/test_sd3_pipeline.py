"""The whole Stable Diffusion 3 pipeline against diffusers: load, prompt, guidance, solver, autoencoder."""

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from util_sd3 import channels_last, error, noise, pipeline

import jdit

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on the moon", "two"]
NEGATIVE = ["", "blue apple, sat"]
SIZE = dict(height=40, width=56)  # latents 10 x 14
SHAPE = (2, 16, 10, 14)


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "no-t5"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    theirs = pipeline(folder, t5=request.param)
    return theirs, jdit.load(folder / "model", dtype="float32")


def call(theirs: StableDiffusion3Pipeline, latents: torch.Tensor, **kw) -> np.ndarray:
    with torch.no_grad():
        images = theirs(
            PROMPTS, negative_prompt=NEGATIVE, latents=latents.clone(), output_type="latent", **(SIZE | kw)
        ).images
    return channels_last(images)


@pytest.mark.parametrize("tokens", [9, 256])
def test_euler(both, tokens):
    theirs, ours = both
    latents = noise(0, *SHAPE)
    want = call(theirs, latents, num_inference_steps=5, guidance_scale=5.5, max_sequence_length=tokens)
    got = ours(
        PROMPTS, negative_prompt=NEGATIVE, latents=channels_last(latents), steps=5, guidance=5.5,
        max_text_tokens=tokens, output="latents", **SIZE,
    )  # fmt: skip
    assert got.pixels is None
    assert error(got.latents, want) < 1e-4


def test_pixels_and_no_guidance(both):
    theirs, ours = both
    latents = noise(1, *SHAPE)
    with torch.no_grad():
        want = theirs(
            PROMPTS, latents=latents, num_inference_steps=4, guidance_scale=1.0, output_type="np", **SIZE
        ).images
    arguments = dict(latents=channels_last(latents), steps=4, guidance=1.0, **SIZE)
    assert error(ours(PROMPTS, output="float", **arguments).pixels, want) < 1e-4
    exact = ours(PROMPTS, **arguments).pixels
    assert exact.dtype == np.uint8
    assert np.mean(exact != np.round(want * 255)) < 1e-3  # a value on the edge between two integers may fall to either


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(both, order):
    theirs, ours = both
    scheduler = UniPCMultistepScheduler(
        solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.5
    )
    other = StableDiffusion3Pipeline(**(theirs.components | {"scheduler": scheduler}))
    other.set_progress_bar_config(disable=True)
    latents = noise(2, *SHAPE)
    want = call(other, latents, num_inference_steps=7, guidance_scale=4.0)
    config = {"_class_name": "UniPCMultistepScheduler", **scheduler.config}
    arguments = dict(negative_prompt=NEGATIVE, latents=channels_last(latents), steps=7, guidance=4.0, output="latents")
    assert error(ours(PROMPTS, solver=config, **arguments, **SIZE).latents, want) < 1e-4
    if order == 2:  # the name keeps the checkpoint's shift, and `shift` replaces it
        assert error(ours(PROMPTS, solver="unipc", shift=2.5, **arguments, **SIZE).latents, want) < 1e-4


def test_dynamic_shift(both):
    theirs, ours = both
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.2)
    other = StableDiffusion3Pipeline(**(theirs.components | {"scheduler": scheduler}))
    other.set_progress_bar_config(disable=True)
    latents = noise(3, *SHAPE)
    want = call(other, latents, num_inference_steps=4, guidance_scale=4.0)
    got = ours(
        PROMPTS, negative_prompt=NEGATIVE, latents=channels_last(latents), steps=4, guidance=4.0, output="latents",
        solver={"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config}, **SIZE,
    )  # fmt: skip
    assert error(got.latents, want) < 1e-4


def test_skip_layer_guidance(both):
    theirs, ours = both
    latents = noise(4, *SHAPE)
    skip = dict(skip_guidance_layers=[1, 2], skip_layer_guidance_scale=2.2)
    skip |= dict(skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.7)
    want = call(theirs, latents, num_inference_steps=6, guidance_scale=4.0, **skip)
    plain = call(theirs, latents, num_inference_steps=6, guidance_scale=4.0)
    got = ours(
        PROMPTS, negative_prompt=NEGATIVE, latents=channels_last(latents), steps=6, guidance=4.0, output="latents",
        skip_layers=[1, 2], skip_layer_scale=2.2, skip_layer_start=0.1, skip_layer_stop=0.7, **SIZE,
    )  # fmt: skip
    assert error(got.latents, want) < 1e-4
    assert error(plain, want) > 1e-2


@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
def test_image_to_image(both, strength, monkeypatch):
    theirs, ours = both
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 47, 3), np.uint8))
    other = StableDiffusion3Img2ImgPipeline(**theirs.components)
    other.set_progress_bar_config(disable=True)
    latents = noise(5, *SHAPE)
    # the reference draws noise and posterior sample from a generator: here its noise is ours, its sample the mode
    target = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img"
    monkeypatch.setattr(f"{target}.randn_tensor", lambda *a, **k: latents.clone())
    monkeypatch.setattr(f"{target}.retrieve_latents", lambda out, **k: out.latent_dist.mode())
    with torch.no_grad():
        want = other(
            PROMPTS, negative_prompt=NEGATIVE, image=picture, strength=strength, num_inference_steps=6,
            guidance_scale=4.0, output_type="latent", **SIZE,
        ).images  # fmt: skip
    got = ours(
        PROMPTS, negative_prompt=NEGATIVE, image=picture, strength=strength, steps=6, guidance=4.0, seed=None,
        latents=channels_last(latents), output="latents", **SIZE,
    )  # fmt: skip
    assert error(got.latents, channels_last(want)) < 1e-4


def test_several_outputs_and_encoded_prompts(both):
    theirs, ours = both
    latents = noise(6, 4, 16, 10, 14)
    want = call(theirs, latents, num_inference_steps=4, guidance_scale=3.0, num_images_per_prompt=2)
    arguments = dict(latents=channels_last(latents), steps=4, guidance=3.0, num_outputs=2, output="latents", **SIZE)
    assert error(ours(PROMPTS, negative_prompt=NEGATIVE, **arguments).latents, want) < 1e-4
    prompt = ours.encode(PROMPTS, negative_prompt=NEGATIVE)
    assert error(ours(prompt, **arguments).latents, want) < 1e-4


def test_tiled_decode(both):
    theirs, ours = both
    latents = noise(7, 2, 16, 20, 24)
    theirs.vae.enable_tiling()
    try:
        with torch.no_grad():
            want = theirs(
                PROMPTS, latents=latents, num_inference_steps=1, guidance_scale=1.0, height=80, width=96,
                output_type="np",
            ).images  # fmt: skip
    finally:
        theirs.vae.disable_tiling()
    arguments = dict(latents=channels_last(latents), steps=1, guidance=1.0, height=80, width=96, output="float")
    assert error(ours(PROMPTS, vae_tiling=True, **arguments).pixels, want) < 1e-4
    whole = ours(PROMPTS, **arguments).pixels
    assert error(whole, want) > 1e-4
    assert error(ours(PROMPTS, vae_slicing=True, **arguments).pixels, whole) < 1e-5


def test_bfloat16_is_as_close_as_torch(both, tmp_path):
    theirs, _ = both
    latents = noise(8, *SHAPE)
    theirs.save_pretrained(tmp_path)
    given = {k: None for k in ("text_encoder_3", "tokenizer_3") if theirs.components[k] is None}
    half = StableDiffusion3Pipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **given)
    half.set_progress_bar_config(disable=True)
    kw = dict(num_inference_steps=4, guidance_scale=3.0)
    exact = call(theirs, latents, **kw)
    torch_error = error(call(half, latents.bfloat16(), **kw), exact)
    got = jdit.load(tmp_path, dtype="bfloat16")(
        PROMPTS,
        negative_prompt=NEGATIVE,
        latents=channels_last(latents),
        steps=4,
        guidance=3.0,
        output="latents",
        **SIZE,
    )
    assert error(np.asarray(got.latents), exact) < 1.2 * torch_error


def test_seeds_do_not_depend_on_the_batch(both):
    _, ours = both
    arguments = dict(steps=3, guidance=3.0, output="latents", **SIZE)
    batch = ours(PROMPTS, seed=[7, 4], **arguments).latents
    one = ours(PROMPTS[1], seed=4, **arguments).latents
    assert error(batch[1:], one) < 1e-5
    assert jax.numpy.array_equal(ours(PROMPTS, seed=7, **arguments).latents[:1], batch[:1])
