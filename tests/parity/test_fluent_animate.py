"""The bundled model for driven videos: diffusers loads its folder and makes the same video, with all defaults."""

import numpy as np
import pytest
import torch
from diffusers import WanAnimatePipeline
from PIL import Image
from util_sd3 import noise
from util_wan_animate_pipeline import pictures, run_upstream
from util_wan_pipeline import channels_last

import jdit
from jdit.load import ASSETS

pytestmark = pytest.mark.torch

FOLDER = ASSETS / "fluent-animate"
EXAMPLE = FOLDER / "example"
PROMPT, FRAMES = "man dancing, medium skin tone", 33  # two segments


def frames(name: str) -> np.ndarray:
    with Image.open(EXAMPLE / name) as video:
        shown = []
        for n in range(FRAMES):
            video.seek(n)
            shown.append(np.asarray(video.convert("RGB")))
    return np.stack(shown)


def test_same_video_as_by_default():
    ours = jdit.load("fluent-animate", dtype="float32")
    theirs = WanAnimatePipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    plan, driving = ours.plan, {"pose_video": frames("pose.webp"), "face_video": frames("face.webp")}
    assert (plan.segment_frames, plan.overlap_frames, plan.guidance) == (17, 1, 1)
    noises = [noise(i, 1, 16, 6, 16, 16) for i in range(2)]
    want = run_upstream(
        theirs, noises, image=Image.open(EXAMPLE / "man.png"), prompt=PROMPT, height=plan.height, width=plan.width,
        segment_frame_length=plan.segment_frames, prev_segment_conditioning_frames=plan.overlap_frames,
        num_inference_steps=plan.steps, guidance_scale=plan.guidance, output_type="np", mode="animate",
        **{name: pictures(video) for name, video in driving.items()},
    )  # fmt: skip
    latents = np.concatenate([channels_last(n) for n in noises], 1)
    got = ours(PROMPT, image=EXAMPLE / "man.png", latents=latents, **driving)
    assert got.pixels.shape == (1, FRAMES, 64, 64, 3) and got.fps == plan.fps
    assert np.abs(got.pixels / 255 - want).max() < 2 / 255
    moving = np.abs(np.diff(got.pixels[0].astype(float), axis=0)).mean()
    assert moving > 2  # levels of 255: he dances


def test_size_of_the_files():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file() and p.name != "README.md") <= 12e6
