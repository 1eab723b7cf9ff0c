"""Pictures as image encoders want them, on the host (transformers' CLIPImageProcessor with Pillow and NumPy).

H W pixel rows and columns, Y X those of the encoder's input.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jdit import media

KINDS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"}, {"max_height", "max_width"})
DEFAULTS: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": MEAN, "image_std": STD, "do_convert_rgb": True,
}  # fmt: skip
"""What upstream's class takes where a config leaves a field out."""


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, rescale, normalise: each step None where it is left out. The defaults are CLIP's, and Wan's.

    Attributes:
        size: what to resize to: pairs of upstream's key and pixels, one of `SIZES`.
        resample: Pillow's filter by number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        crop: rows and columns of the central window; what a smaller picture lacks is black.
        scale: factor from 0..255. mean, std: of each channel after scaling.
        rgb: whether pictures of other modes are converted (transparency laid on white); False refuses them.
    """

    size: tuple[tuple[str, int], ...] | None = (("shortest_edge", 224),)
    resample: int = 3
    crop: tuple[int, int] | None = (224, 224)
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = MEAN
    std: tuple[float, ...] | None = STD
    rgb: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImageProcessor":
        """Read a preprocessor_config.json.

        Raises:
            ValueError: another kind of processor, or a field that is not supported; all findings.
        """
        got = {key: config.get(key, default) for key, default in DEFAULTS.items()}
        on = {step: got[f"do_{step}"] for step in ("resize", "center_crop", "rescale", "normalize")}
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or KINDS[0]
        size = _sides(got["size"], square=bool(config.get("default_to_square")))
        crop = _sides(got["crop_size"], square=True)
        mean, std = _channels(got["image_mean"]), _channels(got["image_std"])
        problems = []
        if kind not in KINDS:
            problems.append(f"{kind!r} is not supported; supported: {', '.join(KINDS)}")
        if on["resize"] and set(size) not in SIZES:
            problems.append(f"size={got['size']!r} is not supported; its keys may be {_listed(SIZES)}")
        if on["resize"] and got["resample"] not in range(6):
            problems.append(f"resample={got['resample']!r} is not a Pillow filter; they are 0 to 5")
        if on["center_crop"] and set(crop) != {"height", "width"}:
            problems.append(f"crop_size={got['crop_size']!r} is not supported; its keys are height and width")
        if on["rescale"] and not isinstance(got["rescale_factor"], int | float):
            problems.append(f"rescale_factor={got['rescale_factor']!r} is not a number")
        for key, value in (("image_mean", mean), ("image_std", std)):
            if on["normalize"] and len(value) != 3:
                problems.append(f"{key}={got[key]!r}: one number is needed, or three")
        problems += [f"{k}={config[k]!r} is not supported" for k in ("do_pad", "use_square_size") if config.get(k)]
        if problems:
            raise ValueError("; ".join(problems))
        return cls(
            size=tuple(size.items()) if on["resize"] else None,
            resample=got["resample"] if on["resize"] else DEFAULTS["resample"],
            crop=(crop["height"], crop["width"]) if on["center_crop"] else None,
            scale=got["rescale_factor"] if on["rescale"] else None,
            mean=mean if on["normalize"] else None,
            std=std if on["normalize"] else None,
            rgb=bool(got["do_convert_rgb"]),
        )

    @classmethod
    def of(cls, settings: Mapping[str, Any], side: int = 224) -> "ImageProcessor":
        """That of a pipeline's settings (`image_processor`); where they have none, CLIP's for pictures of `side`."""
        if (config := settings.get("image_processor")) is not None:
            return cls.from_config(config)
        return cls((("shortest_edge", side),), crop=(side, side))

    def to_config(self) -> dict[str, Any]:
        """A preprocessor_config.json that transformers reads; fields of a step that is left out are not kept."""
        steps: dict[str, Any] = {
            "image_processor_type": KINDS[0], "do_resize": self.size is not None, "resample": self.resample,
            "do_center_crop": self.crop is not None, "do_rescale": self.scale is not None,
            "do_normalize": self.mean is not None, "do_convert_rgb": self.rgb,
        }  # fmt: skip
        if self.size is not None:
            steps["size"] = dict(self.size)
        if self.crop is not None:
            steps["crop_size"] = dict(zip(("height", "width"), self.crop))
        if self.scale is not None:
            steps["rescale_factor"] = self.scale
        if self.mean is not None and self.std is not None:
            steps |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        return steps

    def __call__(self, pictures: media.Picture | Sequence[media.Picture]) -> Float[np.ndarray, "B Y X 3"]:
        """One picture or several, as `media.picture` takes them, each of any size.

        Raises:
            ValueError: pictures that come out in different sizes, that are none, or of another mode without `rgb`.
        """
        several: Any = pictures if isinstance(pictures, list | tuple) else [pictures]
        done = [self._one(p) for p in several]
        if len(sizes := {d.shape[:2] for d in done}) != 1:
            raise ValueError(f"the pictures come out in sizes {sorted(sizes)}; one size is needed")
        return np.stack(done)

    def _one(self, source: media.Picture) -> Float[np.ndarray, "Y X 3"]:
        if not self.rgb and isinstance(source, Image.Image) and source.mode != "RGB":
            raise ValueError(f"a picture of mode {source.mode} where do_convert_rgb is off; RGB is needed")
        x = media.picture(source)
        if self.size is not None:
            height, width = _target(dict(self.size), *x.shape[:2])
            x = np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling(self.resample)))
        if self.crop is not None:
            x = centre_crop(x, *self.crop)
        # float64 inside the scaling and float32 after it, as upstream rounds
        y = x.astype(np.float32) if self.scale is None else (x.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            y = (y - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return y


def centre_crop(x: UInt8[np.ndarray, "H W C"], height: int, width: int) -> UInt8[np.ndarray, "Y X C"]:
    """The central window of a picture; where the picture is smaller, it lies in the middle of zeros."""
    lacks = [max(want - have, 0) for want, have in zip((height, width), x.shape)]
    x = np.pad(x, [*((-(-n // 2), n // 2) for n in lacks), (0, 0)])
    top, left = (x.shape[0] - height) // 2, (x.shape[1] - width) // 2
    return x[top : top + height, left : left + width]


def _sides(size: Any, *, square: bool) -> dict[str, int]:
    """`size` and `crop_size` in their older forms too: one number, or height and width."""
    if isinstance(size, int):
        return {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, list | tuple):
        return dict(zip(("height", "width"), size))
    return {k: v for k, v in (size or {}).items() if v is not None}


def _channels(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,) * 3


def _listed(sets: Sequence[set[str]]) -> str:
    return ", or ".join(" and ".join(sorted(s)) for s in sets)


def _target(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """(rows, columns) that a picture is resized to."""
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return int(height * scale), int(width * scale)
    short, long = min(height, width), max(height, width)
    edge, limit = size["shortest_edge"], size.get("longest_edge")
    exact: float = edge
    if limit is not None and long / short * edge > limit:
        exact = limit * short / long  # the long side ends at the limit
        edge = round(exact)
    if limit is not None and short == edge:
        return height, width
    other = int(exact * long / short)
    return (edge, other) if height <= width else (other, edge)
