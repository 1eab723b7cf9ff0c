"""Both kinds of HunyuanVideo's picture to video against diffusers: load, prompts with the picture, guidance, frames."""

import numpy as np
import pytest
import torch
import util_hunyuan_pictures as util
from util_hunyuan_pipeline import LATENTS, SIZE, Z, channels_last
from util_sd3 import error, noise

import jdit

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on the moon, two apples", "two"]
NEGATIVE = ["", "blue apple, sat on {it}"]
MOST = 24
PICTURE = util.pictures(1, (70, 90))[0]


@pytest.fixture(scope="module", params=util.KINDS)
def made(request, tmp_path_factory):
    """(upstream's pipeline, ours, kind)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = util.pipeline(folder, request.param)
    return theirs, jdit.load(folder / "model", dtype="float32"), request.param


def both(theirs, ours, *, output, true=None, told=6.0, **kw):
    """(ours, upstream's) latents or float frames, from the same noise."""
    start = noise(0, 2, Z, *LATENTS)
    guided = {} if true is None else dict(true_cfg_scale=true, **util.negatives(theirs, NEGATIVE, MOST))
    with torch.no_grad():
        want = theirs(
            image=[PICTURE] * 2, prompt=PROMPTS, latents=start.clone(), num_inference_steps=4, guidance_scale=told,
            prompt_template=util.TEMPLATE, max_sequence_length=MOST, **guided, **SIZE,
            output_type={"latents": "latent", "float": "np"}[output],
        ).frames  # fmt: skip
    embeds = theirs.transformer.config.guidance_embeds
    guided = {} if true is None else dict(negative_prompt=NEGATIVE)
    scales = dict(guidance=told, true_guidance=true) if embeds else dict(guidance=true or 1.0)
    got = ours(
        PROMPTS, image=PICTURE, latents=channels_last(start), steps=4, output=output, max_text_tokens=MOST, **guided,
        **scales, **SIZE, **kw,
    )  # fmt: skip
    return (got.latents, channels_last(want)) if output == "latents" else (got.pixels, want)


def test_frames(made):
    theirs, ours, kind = made
    got, want = both(theirs, ours, output="float")
    assert got.shape == want.shape and got.shape[1] == SIZE["num_frames"] - 4 * (kind == "latent_concat")
    assert error(got, want) < 1e-4


def test_latents_under_guidance(made):
    """In two passes, and in one, where the negative prompt sees another share of its picture's tokens than the positive
    one of "token_replace"."""
    theirs, ours, kind = made
    got, want = both(theirs, ours, output="latents", true=3.5, told=2.0, two_passes=kind == "latent_concat")
    assert error(np.asarray(got)[:, kind == "latent_concat" :], want) < 1e-4
