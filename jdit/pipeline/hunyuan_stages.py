"""The stages of HunyuanVideo's pipelines (upstream pipelines/hunyuan_video).

B outputs, P prompts (the negative ones first), N tokens of the prompt's template and text, L text tokens of width D, S
latent frames, h w latent rows and columns, C latent channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jdit import sampling
from jdit.nn.hunyuan_video import HunyuanVideo, Modulation
from jdit.nn.text.clip import CLIPText
from jdit.nn.text.decoder import Decoder
from jdit.nn.vae.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from jdit.nn.vae.tiling import Tiles
from jdit.pipeline import calls, modulation
from jdit.pipeline.executor import Stage
from jdit.pipeline.given import GivenFrames
from jdit.pipeline.hunyuan_prompts import SKIP
from jdit.sampling import guidance as guide
from jdit.structs import Text

Latents = Float[Array, "B S h w C"]
Tables = tuple[Modulation, Float[Array, "*steps P L D"]]
"""Of each step: modulation, and the refined text."""


def encode_text(
    llama: Decoder, clip: CLIPText, tokens: Int[Array, "P N"], lengths: Int[Array, "P"], clip_ids, drop: int
) -> Text:
    """States of prompts, padding last, without the `drop` tokens of the template's head; CLIP's pooled text."""
    return Text(llama(tokens, skip=SKIP)[:, drop:], clip(clip_ids).pooled, lengths=lengths - drop)


def prepare(positive: Text, negative: Text | None, noise: Latents) -> tuple[Latents, Text]:
    """The first x, and the text of all prompts."""
    both = (positive,) if negative is None else (negative, positive)
    return noise, jax.tree.map(lambda *parts: jnp.concatenate(parts), *both)


def step_tables(transformer: HunyuanVideo, times: Float[Array, "steps"], text: Text, embedded) -> Tables:
    """Modulation and refined text at these timesteps.

    Args:
        embedded: scale of the guidance that the transformer is told of; None where it takes none.
    """
    pooled: Any = text.pooled
    told = None if embedded is None else sampling.embedded_scale(embedded, len(pooled), transformer.cfg.dtype)
    rows = transformer.modulation_table(times, pooled, told)
    return rows, transformer.text_table(times, text.states, text_lengths=text.lengths)


def modulate(transformer: HunyuanVideo, text: Text, table: sampling.Table, embedded) -> Tables:
    """`step_tables` of every step."""
    return step_tables(transformer, jnp.asarray(table.timestep, jnp.float32), text, embedded)


def denoise(
    transformer: HunyuanVideo, x: Latents, text: Text, picture: GivenFrames, tables: Tables | None,
    table: sampling.Table, embedded, scale, keys, two_passes: bool, report: bool,
) -> Latents:  # fmt: skip
    """The sampling loop.

    Args:
        picture: that the transformer sees beside or among the noise, if any.
        tables: of each step; None makes them in the steps.
        embedded: see `step_tables`. scale: of classifier-free guidance; None is off.
    """
    prompts, lengths = len(text.states), text.lengths
    of_step = modulation.at(tables, lambda t: step_tables(transformer, t, text, embedded))
    each = np.arange(prompts).repeat(x.shape[0] * (1 if scale is None else 2) // prompts)  # each output's prompt

    def predict(x, t, row, *, at: np.ndarray):
        mods, tokens = of_step(t, row[0])
        own = None if lengths is None else lengths[at]
        return transformer.velocity(picture.apply(x), mods.rows(at), tokens[at], text_lengths=own)

    model = functools.partial(predict, at=each)
    if scale is not None and two_passes:
        negative, positive = (functools.partial(predict, at=half) for half in np.split(each, 2))
        model = guide.two_passes(negative, positive, scale)
    elif scale is not None:
        model = guide.classifier_free(model, scale)
    told = calls.report_step if report else None
    return picture.keep_first(sampling.solve(model, x, table, key=keys, per_step=(tables,), on_step=told))


def decode(vae: AutoencoderKLHunyuanVideo, latents: Latents, kind: str, tiling: bool, slicing: bool, report: bool):
    """Latents to pixels, a tile of frames at a time."""
    z, tiles = vae.denormalise(latents), Tiles() if tiling else None
    frames = vae.cfg.frames(z.shape[1])
    return calls.decode_video(vae, z, frames, kind=kind, tiles=tiles, slicing=slicing, report=report)


ENCODE_TEXT = Stage(
    "encode_text", encode_text, ("text_encoder", "text_encoder_2"), ("tokens", "lengths", "clip_ids", "drop"),
    ("encoded",), ("drop",),
)  # fmt: skip
PREPARE = Stage("prepare", prepare, (), ("positive", "negative", "noise"), ("x", "text"))
DENOISE = Stage(
    "denoise", denoise, ("transformer",),
    ("x", "text", "picture", "modulation", "table", "embedded", "guidance", "keys", "two_passes", "report"),
    ("latents",), ("two_passes", "report"), frees=("modulation",),
)  # fmt: skip
DECODE = Stage(
    "decode", decode, ("vae",), ("latents", "output", "vae_tiling", "vae_slicing", "report_frames"), ("pixels",),
    ("output", "vae_tiling", "vae_slicing", "report_frames"),
)  # fmt: skip


def solving(*, tabled: bool) -> list[Stage]:
    """The sampling loop, with what the steps have in common made before it or without."""
    return modulation.stages(DENOISE, modulate, ("text", "table", "embedded"), tabled=tabled)
