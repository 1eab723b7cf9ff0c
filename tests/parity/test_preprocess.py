"""Pictures for image encoders and autoencoders against the processors of transformers and diffusers."""

import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

from diffusers.video_processor import VideoProcessor  # noqa: E402

from jdit import media  # noqa: E402
from jdit.preprocess import ImageProcessor  # noqa: E402

pytestmark = pytest.mark.torch

WAN = dict(
    crop_size={"height": 224, "width": 224}, do_center_crop=True, do_convert_rgb=True, do_normalize=True,
    do_rescale=True, do_resize=True, image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_processor_type="CLIPImageProcessor", image_std=[0.26862954, 0.26130258, 0.27577711], resample=3,
    rescale_factor=0.00392156862745098, size={"shortest_edge": 224},
)  # fmt: skip
"""image_processor/preprocessor_config.json of Wan's image-to-video checkpoints."""
SMALL = {"size": {"shortest_edge": 30}, "crop_size": {"height": 21, "width": 28}}
CASES = {
    "wan": WAN, "defaults": {}, "small": SMALL, "square": SMALL | {"size": {"height": 33, "width": 41}},
    "no resize": SMALL | {"do_resize": False, "size": None, "resample": None}, "null": SMALL | {"do_resize": None},
    "numbers": {"size": 40, "crop_size": 37}, "square number": {"size": 40, "crop_size": 37, "default_to_square": True},
    "pairs": {"size": [40, 31], "crop_size": [29, 30]}, "crop larger": {"size": 20, "crop_size": [37, 28]},
    "longest edge": {"size": {"shortest_edge": 30, "longest_edge": 35}, "crop_size": 25},
    "longest edge unused": {"size": {"shortest_edge": 30, "longest_edge": 90}, "crop_size": 25},
    "within": {"size": {"max_height": 50, "max_width": 30}, "crop_size": 25},
    "no crop": {"size": {"height": 33, "width": 41}, "do_center_crop": False, "crop_size": None},
    "no rescale": SMALL | {"do_rescale": False, "image_mean": [120.0, 110.0, 99.0]},
    "scale": SMALL | {"rescale_factor": 0.01}, "no normalise": SMALL | {"do_normalize": False, "image_mean": None},
    "plain": SMALL | {"do_normalize": False, "do_rescale": False},
    "one mean": SMALL | {"image_mean": 0.4, "image_std": 0.3},
    "legacy": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 30},
} | {f"filter {i}": SMALL | {"resample": i} for i in range(6)}  # fmt: skip
SIZES = [(53, 97), (61, 37), (40, 40), (30, 45)]


def picture(height, width, mode="RGB", seed=0):
    """Smooth and noisy parts."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = 127 + 120 * np.sin(x[..., None] / (5, 7, 11, 13) + y[..., None] / (9, 4, 6, 8))
    noisy = rng.integers(0, 256, (height, width, 4))
    out = Image.fromarray(np.where((x > width // 2)[..., None], noisy, smooth).astype(np.uint8), "RGBA")
    return out if mode == "RGBA" else out.convert("RGB").convert(mode)


def upstream(config, pictures):
    settings = {k: v for k, v in config.items() if k not in ("image_processor_type", "feature_extractor_type")}
    out = pil.CLIPImageProcessorPil(**settings)(pictures, return_tensors="np").pixel_values
    return np.moveaxis(np.asarray(out, np.float32), 1, -1)


def close(a, b):
    assert a.shape == b.shape and a.dtype == np.float32
    return np.abs(a - b).max() <= 1e-6 * max(1, np.abs(b).max())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, size):
    image = picture(*size)
    ours = ImageProcessor.from_config(CASES[case])
    want = upstream(CASES[case], [image])
    assert close(ours(image), want)
    assert close(ours(np.asarray(image)), want)
    again = ImageProcessor.from_config(json.loads(json.dumps(ours.to_config())))
    assert again == ours
    assert close(ours(image), upstream(ours.to_config(), [image]))


def test_wan_is_the_default():
    assert ImageProcessor.from_config(WAN) == ImageProcessor() == ImageProcessor.from_config({})
    assert WAN.items() <= ImageProcessor().to_config().items()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "LA"])
def test_other_modes(mode, tmp_path):
    image = picture(53, 97, "RGBA").convert("LA") if mode == "LA" else picture(53, 97, mode)
    ours = ImageProcessor.from_config(SMALL)
    assert close(ours(image), upstream(SMALL, [image]))
    if mode in ("RGBA", "L", "P"):
        image.save(tmp_path / "x.png")
        assert close(ours(tmp_path / "x.png"), upstream(SMALL, [Image.open(tmp_path / "x.png")]))
    with pytest.raises(ValueError, match=f"a picture of mode {mode} where do_convert_rgb is off"):
        ImageProcessor.from_config({"do_convert_rgb": False})(image)


def test_several_pictures_of_different_sizes():
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    assert close(ImageProcessor.from_config(SMALL)(images), upstream(SMALL, images))
    with pytest.raises(ValueError, match=r"come out in sizes \[\(30, 30\), \(30, 54\)\]"):
        ImageProcessor.from_config(SMALL | {"do_center_crop": False})([images[0], images[2]])


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("size", {"longest_edge": 30}, r"size=\{'longest_edge': 30\} is not supported; its keys may be shortest_edge"),
        ("crop_size", {"shortest_edge": 30}, "its keys are height and width"),
        ("resample", 9, "resample=9 is not a Pillow filter"),
        ("resample", None, "resample=None is not a Pillow filter"),
        ("image_std", None, "image_std=None: one number is needed"),
        ("rescale_factor", None, "rescale_factor=None is not a number"),
        ("do_pad", True, "do_pad=True is not supported"),
        ("image_mean", [0.5], r"image_mean=\[0.5\]: one number is needed, or three"),
        ("image_processor_type", "ViTImageProcessor", "'ViTImageProcessor' is not supported; supported: CLIPImage"),
    ],
)
def test_refusals(field, value, says):
    with pytest.raises(ValueError, match=says):
        ImageProcessor.from_config({field: value})


@pytest.mark.parametrize("size", [(64, 96), (53, 97)], ids=str)
def test_pictures_for_the_autoencoder(size):
    """WanImageToVideoPipeline: VideoProcessor.preprocess with height and width."""
    image = picture(*size)
    processor = VideoProcessor(vae_scale_factor=8)
    want = processor.preprocess(image, height=64, width=96)[0].permute(1, 2, 0).numpy()
    got = media.resize(media.picture(image), 64, 96).astype(np.float32) / 127.5 - 1
    assert np.abs(got - want).max() <= 1e-6
    frames = [image, picture(*size, seed=1)]
    want = processor.preprocess_video(frames, height=48, width=32)[0].permute(1, 2, 3, 0).numpy()
    got = np.stack([media.resize(media.picture(f), 48, 32) for f in frames]).astype(np.float32) / 127.5 - 1
    assert np.abs(got - want).max() <= 1e-6
