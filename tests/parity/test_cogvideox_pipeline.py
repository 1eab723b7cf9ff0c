"""The whole CogVideoX family against diffusers: load, prompts, pictures and videos, guidance, solvers, autoencoder."""

import functools

import jax
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXVideoToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.cogvideo import pipeline_cogvideox_video2video
from diffusers.schedulers import scheduling_dpm_cogvideox
from PIL import Image
from util_cogvideox_pipeline import SIZE, Z, channels_last, pipeline
from util_schedulers import exact_roots  # noqa: F401
from util_sd3 import error, noise

import jdit

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on the moon, two apples", "two"]
NEGATIVE = ["", "blue apple, sat"]
TOKENS = 11
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 47, 3), np.uint8))
VIDEO = np.random.default_rng(1).integers(0, 255, (9, 52, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """kind -> (upstream's pipeline, ours, its folder), made once."""

    @functools.cache
    def make(kind: str):
        folder = tmp_path_factory.mktemp("cogvideox") / kind
        theirs = pipeline(folder, kind)
        return theirs, jdit.load(folder, dtype="float32"), folder

    return make


@pytest.fixture(autouse=True)
def no_noise(monkeypatch):
    """What upstream's stochastic solver and its posteriors draw is nothing; ours draws nothing for seed=None."""
    zeros = lambda shape, **kw: torch.zeros(shape)
    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", zeros)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def with_solver(theirs, solver: str):
    if solver == "ddim":
        return theirs
    scheduler = CogVideoXDPMScheduler.from_config(theirs.scheduler.config)
    other = type(theirs)(**(theirs.components | {"scheduler": scheduler}))
    other.set_progress_bar_config(disable=True)
    return other


def both(theirs, ours, *, solver="ddim", output="latents", frames=3, size=SIZE, seed=0, dynamic=False, draw=None, **kw):
    """(ours, upstream's) latents or float frames, from the same noise; `frames` are latent ones."""
    latents = noise(seed, 2, frames, Z, size["height"] // 8, size["width"] // 8)
    pictures = {k: [v, v] for k, v in kw.items() if k == "image"}
    with torch.no_grad():
        want = with_solver(theirs, solver)(
            prompt=PROMPTS, negative_prompt=NEGATIVE, latents=latents.clone(), num_inference_steps=4,
            guidance_scale=5.5, use_dynamic_cfg=dynamic, max_sequence_length=TOKENS,
            output_type={"latents": "latent", "float": "np"}[output], **size, **pictures,
        ).frames  # fmt: skip
    got = ours(
        PROMPTS, negative_prompt=NEGATIVE, latents=channels_last(latents), steps=4, guidance=5.5,
        dynamic_guidance=dynamic, max_text_tokens=TOKENS, output=output, seed=draw, solver=solver, **size, **kw,
    )  # fmt: skip
    return (got.latents, channels_last(want)) if output == "latents" else (got.pixels, want)


def test_text_to_video(load):
    """2B, and 5B at another size than its own with both solvers and dynamic guidance."""
    assert error(*both(*load("2b")[:2])) < 1e-4
    size = dict(height=80, width=48, num_frames=16)
    for solver, dynamic in (("ddim", True), ("dpm", False)):
        got, want = both(*load("5b")[:2], solver=solver, dynamic=dynamic, size=size, frames=4)
        assert error(got, want) < 1e-4


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_temporal_patches(load, solver):
    """1.5 denoises a frame more than it shows where the latent frames are odd."""
    theirs, ours, _ = load("1.5")
    output = "float" if solver == "ddim" else "latents"
    got, want = both(theirs, ours, solver=solver, output=output, frames=4)
    assert got.shape[1] == (9 if solver == "ddim" else 4) and error(got, want) < 1e-4


@pytest.mark.parametrize("kind, solver, frames", [("5b-i2v", "ddim", 3), ("5b-i2v", "dpm", 4), ("1.5-i2v", "dpm", 4)])
def test_first_frame(load, kind, solver, frames):
    """With learned positions, without them where the frames are others, and with the offset embedding of 1.5."""
    theirs, ours, _ = load(kind)
    size = SIZE | dict(num_frames=16) if (kind, frames) == ("5b-i2v", 4) else SIZE
    assert error(*both(theirs, ours, solver=solver, frames=frames, size=size, image=PICTURE)) < 1e-4


def test_pictures_drawn_from_the_posterior(load, monkeypatch):
    """A draw an output, from its own seed; upstream is given the same draws."""
    theirs, ours, _ = load("5b-i2v")
    keys = iter([jax.random.fold_in(jax.random.key(seed), 1) for seed in (7, 8)])

    def sample(self, generator=None):
        draw = jax.random.normal(next(keys), np.moveaxis(self.mean.numpy(), 1, -1).shape)
        return self.mean + self.std * torch.from_numpy(np.moveaxis(np.array(draw), -1, 1))

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", sample)
    got, want = both(theirs, ours, image=PICTURE, draw=7)
    assert error(got, want) < 1e-4


@pytest.mark.parametrize("kind, solver", [("2b", "ddim"), ("5b", "dpm"), ("1.5", "ddim")])
def test_video_to_video(load, kind, solver, monkeypatch):
    """The last 3 of 5 steps, from a video of another size; `latents` is the noise that is laid on it."""
    theirs, ours, _ = load(kind)
    frames = VIDEO[:8] if kind == "1.5" else VIDEO
    start = noise(4, 2, -(-len(frames) // 4), Z, 6, 10)
    monkeypatch.setattr(pipeline_cogvideox_video2video, "randn_tensor", lambda *a, **kw: start.clone())
    other = CogVideoXVideoToVideoPipeline(**with_solver(theirs, solver).components)
    other.set_progress_bar_config(disable=True)
    video, given = [Image.fromarray(f) for f in frames], dict(strength=0.7, height=48, width=80)
    with torch.no_grad():
        want = other(
            prompt=PROMPTS, negative_prompt=NEGATIVE, video=video, num_inference_steps=5, guidance_scale=4.0,
            use_dynamic_cfg=True, max_sequence_length=TOKENS, output_type="latent", **given,
        ).frames  # fmt: skip
    got = ours(
        PROMPTS, negative_prompt=NEGATIVE, video=frames, latents=channels_last(start), steps=5, guidance=4.0,
        dynamic_guidance=True, max_text_tokens=TOKENS, output="latents", solver=solver, seed=None, **given,
    )  # fmt: skip
    assert error(got.latents, channels_last(want)) < 1e-4
