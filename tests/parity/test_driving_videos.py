"""Driving videos and the reference picture against the processors that upstream's pipeline makes."""

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from diffusers.pipelines.wan.image_processor import WanAnimateImageProcessor  # noqa: E402
from diffusers.video_processor import VideoProcessor  # noqa: E402

from jdit import driving  # noqa: E402

pytestmark = pytest.mark.torch

SOURCES = [(53, 97), (48, 80), (96, 61), (31, 33)]


def clip(height, width, mode="RGB", frames=3):
    """Smooth and noisy parts, as PIL images of a mode."""
    rng = np.random.default_rng(height)
    t, y, x = np.mgrid[:frames, :height, :width]
    smooth = 127 + 120 * np.sin(x[..., None] / (5, 7, 11) + y[..., None] / (9, 4, 6) + t[..., None])
    noisy = rng.integers(0, 256, (frames, height, width, 3))
    pixels = np.where((x > width // 2)[..., None], noisy, smooth).astype(np.uint8)
    return [Image.fromarray(frame).convert(mode) for frame in pixels]


def rectangle(height, width, colour, mode):
    """A mask with a rectangle of a colour on black."""
    frames = np.zeros((3, height, width, 3), np.uint8)
    frames[:, height // 4 : height // 2 + 1, width // 5 : -3] = colour
    return [Image.fromarray(frame).convert(mode) for frame in frames]


def upstream(processor, frames, height, width):
    return np.moveaxis(processor.preprocess_video(frames, height=height, width=width)[0].numpy(), 0, -1)


@pytest.mark.parametrize("size", SOURCES, ids=str)
def test_videos_and_masks(size):
    """Pose and background at the result's size, faces square, and masks as luma after resizing. Noise has no sharp
    edges, so a mask of it would be refused: masks are rectangles, one of them coloured."""
    pose, face, background = clip(*size), clip(size[1], size[0]), clip(*size, frames=3)[::-1]
    plain, masks = VideoProcessor(vae_scale_factor=8), VideoProcessor(
        vae_scale_factor=8, do_normalize=False, do_convert_grayscale=True
    )  # fmt: skip
    for mask in (rectangle(*size, 255, "L"), rectangle(*size, 255, "RGB"), rectangle(*size, (255, 240, 200), "RGB")):
        ours = driving.read(pose, face, background, mask, height=48, width=80, face_size=24)
        assert [x.dtype for x in ours[:4]] == [np.uint8] * 4
        for got, given, to in (
            (ours.pose, pose, (48, 80)),
            (ours.face, face, (24, 24)),
            (ours.background, background, (48, 80)),
        ):
            want = upstream(plain, given, *to)
            assert got.shape == want.shape
            assert np.abs(got.astype(np.float32) / 127.5 - 1 - want).max() <= 1e-6
        want = upstream(masks, mask, 48, 80)[..., 0]
        assert ours.mask.shape == want.shape
        assert np.abs(ours.mask / np.float32(255) - want).max() <= 1e-7


@pytest.mark.parametrize("to", [(48, 80), (80, 48), (64, 64), (16, 96)], ids=str)
@pytest.mark.parametrize("size", [*SOURCES, (64, 64), (200, 40), (40, 200)], ids=str)
def test_reference(size, to):
    for colour in (0, (10, 200, 90), "red"):
        processor = WanAnimateImageProcessor(vae_scale_factor=8, spatial_patch_size=(2, 2), resample="bilinear",
                                             fill_color=colour)  # fmt: skip
        picture = clip(*size, frames=1)[0]
        want = processor.preprocess(picture, height=to[0], width=to[1], resize_mode="fill")
        ours = driving.reference(picture, *to, fill_color=colour)
        assert ours.dtype == np.uint8 and ours.shape == (*to, 3)
        assert np.abs(ours.astype(np.float32) / 127.5 - 1 - np.moveaxis(want[0].numpy(), 0, -1)).max() <= 1e-6
