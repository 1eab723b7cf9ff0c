"""Prompts of Qwen-Image in their templates, as token ids, on the host (diffusers' pipelines/qwenimage).

B prompts, N tokens.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jdit.nn.text.qwen2_5_vl import picture_positions
from jdit.nn.text.tokenizer import Tokenizer

log = logging.getLogger("jdit")

PICTURE = "<|image_pad|>"
"""The token that stands for one token of a picture."""


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around the user's text.

    Attributes:
        head: before the pictures and the text. `tail`: after them.
        picture: around the tokens of each picture; {number} counts from 1. None takes no pictures.
        drop: tokens of the head, whose states the transformer does not see.
        single: takes one picture, no more and no less.
    """

    head: str
    picture: tuple[str, str] | None
    drop: int
    single: bool = False
    tail: str = "<|im_end|>\n<|im_start|>assistant\n"


GENERATE = Template(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    None,
    34,
)
"""Text to image (pipeline_qwenimage.py)."""
_EDIT_HEAD = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
EDIT = Template(_EDIT_HEAD, ("<|vision_start|>", "<|vision_end|>"), 64, single=True)
"""Editing of one picture (pipeline_qwenimage_edit.py)."""
EDIT_PLUS = Template(_EDIT_HEAD, ("Picture {number}: <|vision_start|>", "<|vision_end|>"), 64)
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
    """Token ids of prompts.

    A text that is too long loses its own end, never the template's, and the lost part is logged as a warning (upstream
    cuts off the template's end).

    Args:
        grids: rows and columns of tokens of each picture (`QwenImageProcessor.grid`), the same for each prompt.
        max_tokens: of the text and the tail, pictures not counted; None for no limit (upstream's editing has none).
        length: columns of the result; None takes the longest row.
        multiple: what remains of `length` None without the head is brought up to a multiple of this, so that prompts
            of about one length are of one shape.

    Raises:
        ValueError: pictures that the template does not take, picture tokens spelled in a text, no room for text, no
            padding token, or a row longer than `length`.
    """
    if grids and template.picture is None:
        raise ValueError(f"{len(grids)} pictures; this template takes none")
    if template.single and len(grids) != 1:
        raise ValueError(f"{len(grids)} pictures; this template takes one")
    before, after = template.picture or ("", "")
    start = template.head + "".join(
        before.format(number=n) + PICTURE * (h * w) + after for n, (h, w) in enumerate(grids, 1)
    )
    encode = lambda text: tokenizer.backend.encode(text, add_special_tokens=False)
    tail = encode(template.tail).ids
    room = None if max_tokens is None else max_tokens - len(tail)
    if room is not None and room < 1:
        raise ValueError(
            f"max_tokens={max_tokens} leaves no room for text before the {len(tail)} tokens of the template"
        )
    fixed, rows = len(encode(start).ids), []
    for text in texts:
        whole = encode(start + text + template.tail)
        ids = whole.ids
        if room is not None and len(ids) > (end := fixed + room) + len(tail):
            lost = (start + text)[whole.offsets[end][0] :]
            log.warning(
                "the prompt has %d tokens, %d fit; this was cut off: %r", len(ids) - fixed - len(tail), room, lost
            )
            ids = ids[:end] + tail
        rows.append(ids)
    lengths = np.array([len(r) for r in rows], np.int32)
    longest = int(max(lengths, default=0))
    columns = longest + -(longest - template.drop) % multiple if length is None else length
    if longest > columns:
        raise ValueError(f"a prompt has {longest} tokens with its template; length={length} is too short")
    if tokenizer.pad_id is None and (lengths < columns).any():
        raise ValueError("this tokenizer has no padding token")
    tokens = np.full((len(rows), columns), tokenizer.pad_id or 0, np.int32)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = ids
    if not grids:
        return PromptIds(tokens, lengths, None)
    if (image_id := tokenizer.backend.token_to_id(PICTURE)) is None:
        raise ValueError(f"this tokenizer has no token {PICTURE}")
    return PromptIds(tokens, lengths, picture_positions(tokens, grids, image_id))
