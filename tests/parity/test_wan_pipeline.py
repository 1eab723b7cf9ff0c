"""The whole Wan family against diffusers: load, prompts, pictures, guidance, experts, solver, autoencoder."""

import functools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from util_sd3 import error, noise
from util_wan_pipeline import Z, channels_last, pipeline

import jdit

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on  the moon &amp; two apples", "two"]
NEGATIVE = ["", "blue apple, sat"]
SIZE = dict(height=48, width=80, num_frames=9)  # latents 3 x 6 x 10, tokens 3 x 3 x 5
SHAPE = (2, Z, 3, 6, 10)
LARGE = dict(height=96, width=160, num_frames=9)  # the same latents with 16 x 16 pixels each
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (61, 47 + 9 * i, 3), np.uint8)) for i in (0, 1)]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """kind -> (upstream's pipeline, ours, its folder), made once."""

    @functools.cache
    def make(kind: str, **kw):
        folder = tmp_path_factory.mktemp("wan") / kind
        theirs = pipeline(folder, kind, **kw)
        return theirs, jdit.load(folder, dtype="float32"), folder

    return make


def both(theirs, ours, *, steps=5, output="latents", tokens=17, size=SIZE, seed=0, prompts=PROMPTS, **kw):
    """(ours, upstream's) latents or float frames, from the same noise; `kw` go to both, by our names."""
    latents = noise(seed, *SHAPE)
    names = {"guidance": "guidance_scale", "guidance_2": "guidance_scale_2"}
    with torch.no_grad():
        want = theirs(
            prompt=prompts, negative_prompt=NEGATIVE, latents=latents.clone(), num_inference_steps=steps,
            max_sequence_length=tokens, output_type={"latents": "latent", "float": "np"}[output], **size,
            **{names.get(k, k): v for k, v in kw.items()},
        ).frames  # fmt: skip
    got = ours(
        prompts, negative_prompt=NEGATIVE, latents=channels_last(latents), steps=steps, max_text_tokens=tokens,
        output=output, **size, **kw,
    )  # fmt: skip
    return (got.latents, channels_last(want)) if output == "latents" else (got.pixels, want)


def scheduled(theirs, scheduler):
    other = type(theirs)(**(theirs.components | {"scheduler": scheduler}), **settings(theirs))
    other.set_progress_bar_config(disable=True)
    return other


def settings(theirs) -> dict:
    return {k: theirs.config[k] for k in ("boundary_ratio", "expand_timesteps")}


def flow(shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@pytest.mark.parametrize("output", ["latents", "float"])
def test_text_to_video(load, output):
    theirs, ours, _ = load("t2v")
    assert error(*both(theirs, ours, guidance=5.5, output=output)) < 1e-4


@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_shifts_and_solvers(load, shift):
    theirs, ours, _ = load("t2v")
    got, want = both(scheduled(theirs, flow(shift)), functools.partial(ours, shift=shift), guidance=4.0, seed=1)
    assert error(got, want) < 1e-4
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    named = functools.partial(ours, solver="euler", shift=shift)
    got, want = both(scheduled(theirs, euler), named, guidance=4.0, seed=1)
    assert error(got, want) < 1e-4
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **euler.config}
    latents = channels_last(noise(1, *SHAPE))
    again = ours(
        PROMPTS, negative_prompt=NEGATIVE, latents=latents, steps=5, max_text_tokens=17, guidance=4.0, output="latents",
        solver=config, **SIZE,
    )  # fmt: skip
    assert np.array_equal(again.latents, got)


def test_first_frame(load):
    theirs, ours, _ = load("i2v")
    got, want = both(theirs, ours, guidance=3.5, image=PICTURES[0], tokens=512)
    assert error(got, want) < 1e-4


def test_first_and_last_frame(load):
    theirs, ours, _ = load("flf2v")
    pictures = dict(image=PICTURES[0], last_image=PICTURES[1])
    got, want = both(theirs, ours, guidance=3.5, tokens=512, **pictures)
    assert error(got, want) < 1e-4


def test_two_experts(load):
    theirs, ours, _ = load("t2v-experts")
    for given in ({}, {"guidance_2": 2.0}):
        got, want = both(theirs, ours, seed=2, guidance=4.0, **given)
        assert error(got, want) < 1e-4
    assert {p[0]: t.steps for p, t in ours.experts(ours.table(5)).items()} == {"denoise_high": 2, "denoise_low": 3}


def test_two_experts_from_pictures(load):
    theirs, ours, _ = load("i2v-experts")
    pictures = dict(image=PICTURES[0], last_image=PICTURES[1])
    got, want = both(theirs, ours, guidance=3.5, guidance_2=3.0, seed=3, **pictures)
    assert error(got, want) < 1e-4


def test_text_or_first_frame(load):
    theirs, ours, _ = load("5b")
    got, want = both(theirs, ours, guidance=5.0, size=LARGE, output="float")
    assert error(got, want) < 1e-4
    other = WanImageToVideoPipeline(**theirs.components, **settings(theirs))
    other.set_progress_bar_config(disable=True)
    got, want = both(other, ours, guidance=5.0, size=LARGE, image=PICTURES[0])
    assert error(got, want) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_goes_on_from_the_last_frame(load, guidance):
    """Segments of picture-to-video: as upstream, called again and again with the last frame it made."""
    theirs, ours, _ = load("i2v-experts")
    noises = [noise(i, *SHAPE) for i in range(3)]
    pictures, want = [PICTURES[0]] * 2, []
    for latents in noises:
        with torch.no_grad():  # upstream takes one picture a call
            videos = [
                theirs(
                    prompt=PROMPTS[i], negative_prompt=NEGATIVE[i], image=pictures[i], latents=latents[i : i + 1],
                    num_inference_steps=3, guidance_scale=guidance, max_sequence_length=17, output_type="pt", **SIZE,
                ).frames
                for i in range(2)
            ]  # fmt: skip
        pictures = [video[:, -1] for video in videos]  # floats
        want.append(np.moveaxis(torch.cat(videos).numpy(), 2, -1)[:, bool(want) :])
    call = dict(
        negative_prompt=NEGATIVE, image=PICTURES[0], latents=np.concatenate([channels_last(n) for n in noises], 1),
        steps=3, guidance=guidance, max_text_tokens=17, output="float", num_segments=3, **SIZE,
    )  # fmt: skip
    got = ours(PROMPTS, **call)
    assert got.pixels.shape == (2, 25, 48, 80, 3)
    assert error(got.pixels, np.concatenate(want, 1)) < 1e-4
    told = []
    scanned = ours(PROMPTS, scan_segments=True, on_segment=lambda *a: told.append(a), **call)
    assert error(scanned.pixels, got.pixels) < 1e-6 and told == [(1, 3), (2, 3), (3, 3)]
    pieces = list(ours.stream(PROMPTS, **call))
    assert [p.pixels.shape[1] for p in pieces] == [9, 8, 8]
    assert np.array_equal(np.concatenate([p.pixels for p in pieces], 1), got.pixels)
