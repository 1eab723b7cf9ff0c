"""A whole pipeline over eight fake devices gives the numbers of one."""

import numpy as np
import pytest
from util_sd3 import error, pipeline

import jdit
from jdit import sharding

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on the moon", "two"]
PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
CALL = dict(negative_prompt="blue", height=32, width=32, steps=3, guidance=4.0, seed=[3, 8], output="float")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    pipeline(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def alone(folder):
    pipe = jdit.load(folder, dtype="float32")
    return pipe(PROMPTS, **CALL), pipe(PROMPTS, image=PICTURE, strength=0.7, **CALL)


@pytest.mark.parametrize(
    "sizes, rules",
    [
        (dict(data=2, sequence=2, tensor=2), None),
        (dict(data=2, sequence=4), jdit.Rules(embed=("data", "sequence"))),
    ],
    ids=["2x2x2", "fsdp"],
)
def test_equal_latents_and_pixels(folder, alone, sizes, rules):
    pipe = jdit.load(folder, mesh=jdit.make_mesh(**sizes), rules=rules, dtype="float32")
    for name in ("transformer", "text_encoder", "text_encoder_3"):
        leaves = sharding.leaves(pipe.components[name]).values()
        assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves), name
    seen = []
    text = pipe(PROMPTS, on_step=lambda step, steps: seen.append((step, steps)), **CALL)
    image = pipe(PROMPTS, image=PICTURE, strength=0.7, **CALL)
    for got, want in zip((text, image), alone):
        assert error(got.latents, want.latents) < 1e-5
        assert error(got.pixels, want.pixels) < 1e-5
    assert sorted(seen) == [(1, 3), (2, 3), (3, 3)]
