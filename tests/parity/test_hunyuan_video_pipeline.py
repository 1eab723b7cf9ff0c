"""The whole HunyuanVideo pipeline against diffusers: load, prompts, both kinds of guidance, decoding by tiles."""

import pytest
import torch
from util_hunyuan_pipeline import LATENTS, SIZE, Z, channels_last, pipeline
from util_sd3 import error, noise

import jdit

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on the moon, two apples", "two"]
NEGATIVE = ["", "blue apple, sat on {it}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(upstream's pipeline, ours, the folder) of a transformer that is told its guidance."""
    folder = tmp_path_factory.mktemp("hunyuan")
    return pipeline(folder), jdit.load(folder / "model", dtype="float32"), folder / "model"


def both(theirs, ours, *, output="latents", true=None, size=SIZE, latents=LATENTS, told=6.0, **kw):
    """(ours, upstream's) latents or float frames, from the same noise."""
    start = noise(0, 2, Z, *latents)
    guided = {} if true is None else dict(true_cfg_scale=true, negative_prompt=NEGATIVE)
    with torch.no_grad():
        want = theirs(
            prompt=PROMPTS, latents=start.clone(), num_inference_steps=4, guidance_scale=told, **guided, **size,
            output_type={"latents": "latent", "float": "np"}[output],
        ).frames  # fmt: skip
    guided = {} if true is None else dict(true_guidance=true, negative_prompt=NEGATIVE)
    got = ours(
        PROMPTS, latents=channels_last(start), steps=4, guidance=told, output=output, **guided, **size, **kw,
    )  # fmt: skip
    return (got.latents, channels_last(want)) if output == "latents" else (got.pixels, want)


def test_text_to_video(made):
    got, want = both(*made[:2])
    assert error(got, want) < 1e-4


@pytest.mark.parametrize("two_passes", [False, True])
def test_true_guidance(made, two_passes):
    got, want = both(*made[:2], true=3.5, told=1.0, two_passes=two_passes)
    assert error(got, want) < 1e-4
