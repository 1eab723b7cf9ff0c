"""Wan-Animate over eight fake devices gives the numbers of one, its segments as a loop of programs and as one."""

import numpy as np
import pytest
from util_sd3 import error
from util_wan_animate_pipeline import clip, pipeline

import jdit
from jdit import sharding

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on the moon", "two"]
CALL = dict(
    image=clip(0, 1, 61, 47)[0], pose_video=clip(1, 15, 48, 80), face_video=clip(2, 15, 20, 18), height=48, width=80,
    background_video=clip(3, 15, 48, 80), mask_video=clip(4, 15, 31, 50), segment_frames=9, overlap_frames=1, steps=2,
    guidance=3.0, colour_match=0.5, seed=[3, 8], output="float",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate") / "x"
    pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return jdit.load(folder, dtype="float32")(PROMPTS, **CALL)


@pytest.fixture(scope="module")
def meshed(folder):
    pipe = jdit.load(folder, mesh=jdit.make_mesh(data=2, sequence=2, tensor=2), dtype="float32")
    leaves = sharding.leaves(pipe.components["transformer"])
    spread = {path[0] for path, leaf in leaves.items() if leaf.addressable_shards[0].data.size < leaf.size}
    assert {"blocks", "adapters"} <= spread
    return pipe


@pytest.mark.parametrize("scanned", [False, True], ids=["loop", "one program"])
def test_equal_latents_and_pixels(meshed, alone, scanned):
    seen = []
    got = meshed(PROMPTS, scan_segments=scanned, on_step=lambda step, steps: seen.append((step, steps)), **CALL)
    assert got.pixels.shape == (2, 15, 48, 80, 3) and np.std(got.pixels) > 0.01
    assert error(got.latents, alone.latents) < 1e-5 and error(got.pixels, alone.pixels) < 1e-5
    assert sorted(seen) == [(1, 4), (2, 4), (3, 4), (4, 4)]
