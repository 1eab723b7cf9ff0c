"""Wan-Animate against diffusers: whole videos of several segments, animated and replaced."""

import numpy as np
import pytest
from PIL import Image
from util_sd3 import error, noise
from util_wan_animate_pipeline import clip, pictures, pipeline, run_upstream
from util_wan_pipeline import Z, channels_last

import jdit

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on  the moon &amp; two apples", "two"]
NEGATIVE = ["", "blue apple, sat"]
REFERENCE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 47, 3), np.uint8))
SIZE = dict(height=48, width=80)
CASES = {  # (frames, segment_frames, overlap_frames, replace, guidance)
    "two segments, uneven": (15, 9, 1, False, 1.0),
    "three segments, guided": (25, 9, 1, False, 3.0),
    "five frames over, guided": (20, 13, 5, False, 2.5),
    "replaced": (15, 9, 1, True, 1.0),
    "replaced, five frames over, guided": (19, 13, 5, True, 3.0),
    "shorter than a segment": (6, 9, 1, False, 1.0),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate") / "x"
    theirs = pipeline(folder)
    return theirs, jdit.load(folder, dtype="float32")


def driven(frames: int, replace: bool) -> dict[str, np.ndarray]:
    out = {"pose_video": clip(1, frames, 40, 70), "face_video": clip(2, frames, 20, 18)}
    if replace:
        out |= {"background_video": clip(3, frames, 48, 80), "mask_video": clip(4, frames, 31, 50)}
    return out


def called(frames: int, length: int, overlap: int, replace: bool, guidance: float):
    """(arguments of ours, of upstream's, the noise of each segment)."""
    videos = driven(frames, replace)
    count = jdit.sampling.segments.plan(frames, length, overlap).count
    noises = [noise(i, 2, Z, (length - 1) // 4 + 2, 6, 10) for i in range(count)]
    ours = dict(
        image=REFERENCE, negative_prompt=NEGATIVE, steps=4, guidance=guidance, segment_frames=length,
        overlap_frames=overlap, latents=np.concatenate([channels_last(n) for n in noises], 1), **SIZE, **videos,
    )  # fmt: skip
    theirs = dict(
        image=REFERENCE, prompt=PROMPTS, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=guidance,
        segment_frame_length=length, prev_segment_conditioning_frames=overlap,
        mode="replace" if replace else "animate", output_type="np", **SIZE,
        **{name: pictures(video) for name, video in videos.items()},
    )  # fmt: skip
    return ours, theirs, noises


@pytest.mark.parametrize("case", CASES)
def test_whole_videos(both, case):
    upstream, pipe = both
    ours, theirs, noises = called(*CASES[case])
    want = run_upstream(upstream, noises, **theirs)
    got = pipe(PROMPTS, output="float", **ours)
    assert got.pixels.shape == want.shape == (2, CASES[case][0], 48, 80, 3)
    assert error(got.pixels, want) < 1e-4
    assert got.fps == 30 and got.latents.shape == ours["latents"].shape
