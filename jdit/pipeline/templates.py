"""Prompts inside the templates that language models are given, as token ids, on the host.

B prompts, N tokens.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jdit.nn.text.tokenizer import Tokenizer

log = logging.getLogger("jdit")


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around the user's text.

    Attributes:
        head: before the pictures and the text. tail: after them.
        drop: tokens of the head, whose states the transformer does not see.
        picture: around the tokens of each picture; {number} counts from 1. None takes no pictures.
        token: the one that stands for one token of a picture.
        single: takes one picture, no more and no less.
        begin: the token before the head, where some tokenizers of the family would add it and others not.
    """

    head: str
    tail: str
    drop: int
    picture: tuple[str, str] | None = None
    token: str = ""
    single: bool = False
    begin: str = ""


class TemplateIds(NamedTuple):
    """tokens: right-padded. lengths: of each row, template and pictures included."""

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]


def template_ids(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    template: Template,
    pictures: Sequence[int] = (),
    *,
    max_tokens: int | None,
    length: int | None = None,
    multiple: int = 1,
) -> TemplateIds:
    """Token ids of prompts.

    A text that is too long loses its own end, never the template's, and the lost part is logged as a warning (upstream
    cuts off the template's end).

    Args:
        pictures: tokens of each picture, the same for each prompt.
        max_tokens: of the text and the tail, pictures not counted; None for no limit.
        length: columns of the result; None takes the longest row.
        multiple: what remains of `length` None without the head is brought up to a multiple of this, so that prompts
            of about one length are of one shape.

    Raises:
        ValueError: pictures that the template does not take, no room for text, no padding token, a tokenizer without
            the template's first token, or a row longer than `length`.
    """
    if pictures and template.picture is None:
        raise ValueError(f"{len(pictures)} pictures; this template takes none")
    if template.single and len(pictures) != 1:
        raise ValueError(f"{len(pictures)} pictures; this template takes one")
    if template.begin and tokenizer.backend.token_to_id(template.begin) is None:
        raise ValueError(f"this tokenizer has no token {template.begin}, which the template begins with")
    before, after = template.picture or ("", "")
    start = (
        template.begin
        + template.head
        + "".join(before.format(number=n) + template.token * size + after for n, size in enumerate(pictures, 1))
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
    return TemplateIds(tokens, lengths)
