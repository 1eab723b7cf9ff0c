"""HunyuanVideo's picture to video: the picture in the prompt, and beside or among the noise (upstream
pipelines/hunyuan_video/pipeline_hunyuan_video_image2video.py).

B outputs, P prompts, N tokens of a template and text, M tokens of a picture, L text tokens of width J that the
transformer sees, S latent frames, h w latent rows and columns, C latent channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jdit.nn.text.llava import Llava
from jdit.nn.text.tokenizer import Tokenizer
from jdit.pipeline.templates import Template, template_ids

PICTURE, HEADER_END = "<image>", "<|end_header_id|>"
AFTER = (
    "\nDescribe the video by detailing the following aspects according to the reference image: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>\n\n"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
"""What the template has between the picture and the text."""
TEMPLATE = Template(
    "<|start_header_id|>system<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    678,
    ("", AFTER),
    PICTURE,
    single=True,
    begin="<|begin_of_text|>",
)  # fmt: skip
CUT = 4
"""Tokens of the assistant's header and the one before it, which the transformer does not see; it sees what follows."""
EVERY = {"latent_concat": 2, "token_replace": 4}
"""Of a picture's tokens, the transformer sees the first of so many. Of the negative prompt's it is 2, as upstream."""
NEGATIVE_EVERY = 2
SHARE = np.float32(0.999)
"""Of the noise in the first x, the rest of which is the picture in every frame."""


class PicturedIds(NamedTuple):
    """tokens: right-padded, the picture's M among them. seen: places of those whose states the transformer sees, the
    picture's first. lengths: of each row of `seen`, after which there is padding."""

    tokens: Int[np.ndarray, "P N"]
    seen: Int[np.ndarray, "P L"]
    lengths: Int[np.ndarray, "P"]


def pictured_ids(
    tokenizer: Tokenizer, texts: Sequence[str], every: Sequence[int], picture: int, max_tokens: int
) -> PicturedIds:
    """Token ids of prompts that each have one picture of `picture` tokens in them.

    The template's one token for the picture is repeated here, and counted, for releases of upstream's processors do
    that differently, or not at all.

    Args:
        every: for each text, of how many tokens of its picture the transformer sees the first.
        max_tokens: of the text and the template's tail; a longer text loses its own end, never the template's.

    Raises:
        ValueError: picture tokens spelled in a text; a tokenizer that lacks one of the template's; as `template_ids`.
    """
    special = {t: tokenizer.backend.token_to_id(t) for t in (PICTURE, HEADER_END)}
    if lacks := [token for token, at in special.items() if at is None]:
        raise ValueError(f"this tokenizer has no token {' and no token '.join(lacks)}")
    count = lambda text: len(tokenizer.backend.encode(text, add_special_tokens=False).ids)
    start = count(TEMPLATE.begin + TEMPLATE.head)
    drop = start + picture + count(AFTER)
    tokens, lengths = template_ids(
        tokenizer, texts, TEMPLATE, [picture], max_tokens=max_tokens, length=drop + max_tokens
    )
    for text, have in zip(texts, (tokens == special[PICTURE]).sum(1)):
        if have != picture:
            raise ValueError(f"a prompt has {have} picture tokens, its picture makes {picture}: {text!r}")
    widest = -(-picture // min(every))
    seen = np.zeros((len(texts), widest + max_tokens - CUT), np.int32)
    counts = np.empty(len(texts), np.int32)
    for row, (ids, length, step) in enumerate(zip(tokens, lengths, every)):
        end = int(np.flatnonzero(ids[:length] == special[HEADER_END])[-1]) + 1
        kept = np.concatenate(
            [np.arange(start, start + picture, step), np.arange(drop, end - CUT), np.arange(end, length)]
        )
        seen[row, : len(kept)], counts[row] = kept, len(kept)
    return PicturedIds(tokens, seen, counts)


def encode_pictured(
    encoder: Llava, tokens: Int[Array, "P N"], seen: Int[Array, "P L"], pixels: Float[Array, "K Y X 3"],
    which: Int[Array, "P"], skip: int,
) -> Float[Array, "P L J"]:  # fmt: skip
    """States of prompts with pictures in them: of the K, each prompt has the one that `which` says."""
    states = encoder(tokens, encoder.features(pixels)[which], skip=skip)
    return jnp.take_along_axis(states, seen[..., None], 1)
