"""Qwen-Image-Edit: pictures edited as the prompt says (upstream pipelines/qwenimage/pipeline_qwenimage_edit.py,
pipeline_qwenimage_edit_plus.py, pipeline_qwenimage_edit_inpaint.py).

A picture goes two ways: through the vision tower into the prompt, and through the autoencoder to the transformer, which
sees its latents beside the noise. It is brought to about a million pixels in its own proportions, which are those of
the result, so that the same place in both has the same position and nothing shifts or zooms.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jdit import media
from jdit.pipeline import base
from jdit.pipeline import qwen_stages as stage
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage
from jdit.pipeline.qwen_image import BUCKET, QwenImageGeneration
from jdit.pipeline.qwen_pictures import QwenImageProcessor, area_size
from jdit.pipeline.qwen_prompts import EDIT, EDIT_PLUS, PromptIds, prompt_ids

AREA = 1024 * 1024
"""Pixels of what the autoencoder sees, and of the result unless the call says otherwise."""
PROMPT_AREA = 384 * 384
"""Pixels of what the vision tower sees where there may be several pictures."""


class QwenImageEditing(QwenImageGeneration):
    """Qwen-Image-Edit, which edits one picture: `image`, without which it makes nothing.

    Beside the common arguments: `mask` (a picture that is white where it may change; the rest is kept) with `strength`
    (the share of the noise that is laid on it, 1), `two_passes`, `vae_tiling`, `vae_slicing`. The prompt has no limit
    unless `max_text_tokens` sets one.
    """

    of_text = ("max_text_tokens", "image")
    template = EDIT
    strength = 1.0
    _shown = 2

    @classmethod
    def misfits(cls, parts: base.Parts) -> list[str]:
        """See the base class."""
        if (out := super().misfits(parts)) or "text_encoder" not in parts.configs:
            return out
        if (tower := parts.configs["text_encoder"].vision) is None:
            return ["text_encoder has no vision tower, which editing needs"]
        try:
            factor = _processor(parts).factor
        except ValueError as e:
            return [f"processor: {e}"]
        if factor != tower.factor:
            return [f"processor makes tokens of {factor} pixels a side, the text_encoder of {tower.factor}"]
        return []

    @classmethod
    def reduced(cls, configs: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        return {}

    # ---- arguments

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        if given.get("image") is None:
            return ["this model edits pictures: it needs image"]
        strength, mask = given.get("strength") is not None, given.get("mask") is not None
        return ["strength goes with mask"] * (strength and not mask) + self._number_problems(given)

    def run_size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """The size of a call: that of the last picture's proportions, unless it says another.

        Raises:
            ValueError: naming the nearest sizes that work, or the only one where a part of the picture is kept.
        """
        own = _size(self.pictures(given["image"])[-1], AREA)
        size = self.size(or_(given.get("height"), own[0]), or_(given.get("width"), own[1]))
        if given.get("mask") is not None and size != own:
            raise ValueError(
                f"{size[0]} x {size[1]} pixels; with mask the result is {own[0]} x {own[1]}, as the picture"
            )
        return size

    def check(self, **arguments: Any):
        """See the base class."""
        super().check(**arguments)
        self.run_size(arguments)
        self._for_prompt(self.pictures(arguments["image"]))

    # ---- prompts

    def _prompts(self, texts: Sequence[str], tokens: int | None, image: Any) -> tuple[PromptIds, tuple]:
        if image is None:
            raise ValueError("this model edits pictures: its prompts are encoded with image")
        pictures = [_processor(self.parts)(p) for p in self._for_prompt(self.pictures(image))]
        factor = self.parts.configs["text_encoder"].vision.factor
        grids = [(p.shape[0] // factor, p.shape[1] // factor) for p in pictures]
        tokenizer = self.parts.tokenizers["tokenizer"]
        ids = prompt_ids(tokenizer, texts, self.template, grids, max_tokens=tokens, multiple=BUCKET)
        return ids, tuple(jnp.asarray(p)[None] for p in pictures)

    prompt_area: ClassVar[int] = AREA

    def _for_prompt(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures in the sizes that the processor of the vision tower is given.

        Raises:
            ValueError: one side of a picture is far longer than the other.
        """
        for picture in pictures:
            _processor(self.parts).size(*picture.shape[:2])
        return [_brought_to(p, self.prompt_area) for p in pictures]

    # ---- the call

    def _redraws(self, a: Mapping[str, Any]) -> bool:
        return a.get("mask") is not None

    def _pictured(self, a: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], list[Stage]]:
        images = tuple(jnp.asarray(_brought_to(p, AREA))[None] for p in a["image"])
        return {"images": images}, [stage.ENCODE_PICTURES, *([stage.KNOWN] if self._redraws(a) else [])]


class QwenImageEditingPlus(QwenImageEditing):
    """Qwen-Image-Edit-2509 and later: `image` may be several pictures, which the prompt calls Picture 1, Picture 2 and
    so on; the last one says the proportions of the result. Further arguments as for `QwenImageEditing`."""

    template = EDIT_PLUS
    several = True
    prompt_area = PROMPT_AREA
    _shown = 3


def _processor(parts: base.Parts) -> QwenImageProcessor:
    config = parts.settings.get("image_processor")
    return QwenImageProcessor() if config is None else QwenImageProcessor.from_config(config)


def _brought_to(picture: np.ndarray, area: int) -> np.ndarray:
    return media.resize(picture, *_size(picture, area))


def _size(picture: np.ndarray, area: int) -> tuple[int, int]:
    height, width, _ = picture.shape
    return area_size(height, width, area)
