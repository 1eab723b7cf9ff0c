"""HunyuanVideo's picture to video: the picture in the prompt, and beside or among the noise (upstream
pipelines/hunyuan_video/pipeline_hunyuan_video_image2video.py).

B outputs, P prompts, N tokens of a template and text, M tokens of a picture, L text tokens of width J that the
transformer sees, S latent frames, h w latent rows and columns, C latent channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jdit.nn.text.clip import CLIPText
from jdit.nn.text.llava import Llava
from jdit.nn.text.tokenizer import Tokenizer
from jdit.nn.vae.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from jdit.nn.vae.tiling import Tiles
from jdit.pipeline.executor import Stage
from jdit.pipeline.given import GivenFrames, unit
from jdit.pipeline.hunyuan_prompts import SKIP
from jdit.pipeline.hunyuan_stages import DECODE, Latents, decode
from jdit.pipeline.templates import Template, template_ids
from jdit.structs import Text

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
EVERY: dict[str | None, int] = {"latent_concat": 2, "token_replace": 4}
"""Of a picture's tokens, the transformer sees the first of so many. Of the negative prompt's it is 2, as upstream."""
NEGATIVE_EVERY = 2
LEFT_OUT = 4
"""First frames of a video that are not shown where the picture was beside the noise."""
SHARE = np.float32(0.999)
"""Of the noise in the first x, the rest of which is the picture in every frame."""


class PromptIds(NamedTuple):
    """tokens: right-padded, the picture's M among them. seen: places of those whose states the transformer sees, the
    picture's first. lengths: of each row of `seen`, after which there is padding."""

    tokens: Int[np.ndarray, "P N"]
    seen: Int[np.ndarray, "P L"]
    lengths: Int[np.ndarray, "P"]


def prompt_ids(
    tokenizer: Tokenizer, texts: Sequence[str], every: Sequence[int], picture: int, max_tokens: int
) -> PromptIds:
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
    seen = np.zeros((len(texts), seen_tokens(picture, min(every), max_tokens)), np.int32)
    counts = np.empty(len(texts), np.int32)
    for row, (ids, length, step) in enumerate(zip(tokens, lengths, every)):
        end = int(np.flatnonzero(ids[:length] == special[HEADER_END])[-1]) + 1
        kept = np.concatenate(
            [np.arange(start, start + picture, step), np.arange(drop, end - CUT), np.arange(end, length)]
        )
        seen[row, : len(kept)], counts[row] = kept, len(kept)
    return PromptIds(tokens, seen, counts)


def seen_tokens(picture: int, every: int, max_tokens: int) -> int:
    """Tokens of a prompt that the transformer sees at most."""
    return -(-picture // every) + max_tokens - CUT


# ------------------------------------------------------------------------------------------------- stages


def encode(
    llava: Llava, tokens: Int[Array, "P N"], seen: Int[Array, "P L"], pixels: Float[Array, "K Y X 3"],
    which: Int[Array, "P"],
) -> Float[Array, "P L J"]:  # fmt: skip
    """States of prompts with pictures in them: of the K, each prompt has the one that `which` says."""
    states = llava(tokens, llava.features(pixels)[which], skip=SKIP)
    return jnp.take_along_axis(states, seen[..., None], 1)


def encode_text(llava: Llava, clip: CLIPText, tokens, seen, lengths, clip_ids, pixels, which) -> Text:
    """`encode`, and CLIP's pooled text."""
    return Text(encode(llava, tokens, seen, pixels, which), clip(clip_ids).pooled, lengths=lengths)


def begin(
    vae: AutoencoderKLHunyuanVideo, image: UInt8[Array, "1 H W 3"], noise: Latents, concat: bool, tiling: bool
) -> tuple[Latents, GivenFrames]:
    """The first x, and the picture as the transformer sees it.

    Args:
        concat: beside the noise, with a channel that says where it is; else as the first frame.
    """
    posterior = vae.encode(unit(image)[:, None], tiles=Tiles() if tiling else None)
    z = vae.normalise(posterior.mode().astype(jnp.float32))
    x = noise * SHARE + z * (1 - SHARE)
    if not concat:
        return x, GivenFrames(first=z)
    marked = jnp.concatenate([z, jnp.ones((*z.shape[:-1], 1))], -1)
    return x, GivenFrames(channels=jnp.pad(marked, ((0, 0), (0, noise.shape[1] - 1), (0, 0), (0, 0), (0, 0))))


def decode_rest(*arguments):
    """`hunyuan_stages.decode`, without the first frames."""
    return decode(*arguments)[:, LEFT_OUT:]


ENCODE_TEXT = Stage(
    "encode_text", encode_text, ("text_encoder", "text_encoder_2"),
    ("tokens", "seen", "lengths", "clip_ids", "pixels", "which"), ("encoded",),
)  # fmt: skip
BEGIN = Stage(
    "encode_image", begin, ("vae",), ("image", "noise", "concat", "vae_tiling"), ("noise", "picture"),
    ("concat", "vae_tiling"),
)  # fmt: skip
DECODE_REST = dataclasses.replace(DECODE, fn=decode_rest)
