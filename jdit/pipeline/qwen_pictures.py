"""Pictures as Qwen2.5-VL wants them, on the host (transformers' Qwen2VLImageProcessor with Pillow and NumPy), and the
sizes that Qwen-Image's editing brings them to first.

H W pixel rows and columns, Y X those of the vision tower's input.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from jdit import media
from jdit.preprocess import MEAN, STD

KINDS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
MAX_RATIO = 200
FIXED = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True) | {"do_center_crop": False}
"""Steps that are not a choice here, and upstream's value of each."""


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(rows, columns) nearest to a picture's, both multiples of `factor`, with a number of pixels within the limits and
    about the same proportions.

    Raises:
        ValueError: one side is more than `MAX_RATIO` times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"a picture of {height} x {width}: one side may be at most {MAX_RATIO} times the other")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(s * grow / factor) * factor for s in (height, width))
    return rows, columns


def area_size(height: int, width: int, area: int, multiple: int = 32) -> tuple[int, int]:
    """(rows, columns) of about `area` pixels in a picture's proportions (diffusers' calculate_dimensions): Qwen-Image's
    editing brings pictures to 1024 x 1024 pixels, and with several of them, to 384 x 384 for the prompt."""
    ratio = width / height
    columns = math.sqrt(area * ratio)
    return round(columns / ratio / multiple) * multiple, round(columns / multiple) * multiple


@dataclasses.dataclass(frozen=True)
class QwenImageProcessor:
    """Resize, rescale, normalise. The defaults are those of Qwen2.5-VL's checkpoints.

    Attributes:
        min_pixels, max_pixels: of a picture after resizing.
        factor: what its sides are multiples of: pixels of a patch times patches of a merged token.
        resample: Pillow's filter by number, 3 is bicubic.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    factor: int = 28
    resample: int = 3
    scale: float = 1 / 255
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "QwenImageProcessor":
        """Read a preprocessor_config.json; absent fields take the defaults of transformers' class.

        Raises:
            ValueError: another kind of processor, or a step that is left out; all findings.
        """
        size = config.get("size") or {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
        keys = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        limits: list[Any] = [config.get(key) or size.get(edge) for key, edge in keys]
        kind = config.get("image_processor_type") or KINDS[0]
        problems = [] if kind in KINDS else [f"{kind!r} is not supported; supported: {', '.join(KINDS)}"]
        for key, fixed in FIXED.items():
            if bool(got := config.get(key, fixed)) != fixed:
                problems.append(f"{key}={got!r} is not supported; {fixed} is")
        if not all(isinstance(n, int) and n > 0 for n in limits):
            problems.append(f"size={size!r} is not supported; shortest_edge and longest_edge are numbers of pixels")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(
            *limits,
            factor=config.get("patch_size", 14) * config.get("merge_size", 2),
            resample=config.get("resample", 3),
            scale=config.get("rescale_factor", 1 / 255),
            mean=tuple(config.get("image_mean") or MEAN),
            std=tuple(config.get("image_std") or STD),
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) that a picture of this size is brought to. Raises as `smart_resize`."""
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that a picture of this size becomes in the prompt."""
        rows, columns = self.size(height, width)
        return rows // self.factor, columns // self.factor

    def __call__(self, source: media.Picture) -> Float[np.ndarray, "Y X 3"]:
        """One picture, as `media.picture` takes it, for the vision tower (which wants a batch axis before)."""
        x = media.picture(source)
        rows, columns = self.size(*x.shape[:2])
        x = np.asarray(Image.fromarray(x).resize((columns, rows), Image.Resampling(self.resample)))
        # float64 inside the scaling and float32 after it, as upstream rounds
        y = (x.astype(np.float64) * self.scale).astype(np.float32)
        return (y - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
