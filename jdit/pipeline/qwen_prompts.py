"""Prompts of Qwen-Image in their templates, as token ids, on the host (diffusers' pipelines/qwenimage).

B prompts, N tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jdit.nn.text.qwen2_5_vl import picture_positions
from jdit.nn.text.tokenizer import Tokenizer
from jdit.pipeline.templates import Template, template_ids

PICTURE = "<|image_pad|>"
"""The token that stands for one token of a picture."""
_TAIL = "<|im_end|>\n<|im_start|>assistant\n"

GENERATE = Template(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    _TAIL,
    34,
)
"""Text to image (pipeline_qwenimage.py)."""
_EDIT_HEAD = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
EDIT = Template(_EDIT_HEAD, _TAIL, 64, ("<|vision_start|>", "<|vision_end|>"), PICTURE, single=True)
"""Editing of one picture (pipeline_qwenimage_edit.py)."""
EDIT_PLUS = Template(_EDIT_HEAD, _TAIL, 64, ("Picture {number}: <|vision_start|>", "<|vision_end|>"), PICTURE)
"""Editing of several numbered pictures (pipeline_qwenimage_edit_plus.py)."""


class PromptIds(NamedTuple):
    """tokens: right-padded. lengths: of each row, template and pictures included. positions: with pictures."""

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]
    positions: Int[np.ndarray, "B N 3"] | None


def prompt_ids(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    template: Template,
    grids: Sequence[tuple[int, int]] = (),
    *,
    max_tokens: int | None = 1024,
    length: int | None = None,
    multiple: int = 1,
) -> PromptIds:
    """Token ids of prompts, and their positions; see `template_ids`.

    Args:
        grids: rows and columns of tokens of each picture (`QwenImageProcessor.grid`), the same for each prompt.
        max_tokens: None for no limit (upstream's editing has none).

    Raises:
        ValueError: as `template_ids`, or picture tokens spelled in a text.
    """
    pictures = [h * w for h, w in grids]
    ids = template_ids(
        tokenizer, texts, template, pictures, max_tokens=max_tokens, length=length, multiple=multiple
    )  # fmt: skip
    if not grids:
        return PromptIds(*ids, None)
    if (image_id := tokenizer.backend.token_to_id(PICTURE)) is None:
        raise ValueError(f"this tokenizer has no token {PICTURE}")
    return PromptIds(*ids, picture_positions(ids.tokens, grids, image_id))
