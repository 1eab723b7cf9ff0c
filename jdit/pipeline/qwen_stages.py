"""The stages of Qwen-Image's pipelines (upstream pipelines/qwenimage).

B outputs, P prompts, N tokens of the prompt's template and text, L text tokens that the transformer sees, H W pixel
rows and columns, h w latent rows and columns, C latent channels, S steps, T layers of latents (layered pictures).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from jdit import sampling
from jdit.nn.qwen_image import Modulation, QwenImage
from jdit.nn.text.qwen2_5_vl import Qwen2_5VL
from jdit.nn.vae.autoencoder_kl_qwen_image import AutoencoderKLQwenImage
from jdit.nn.vae.tiling import Tiles
from jdit.pipeline import calls, modulation
from jdit.pipeline.executor import Stage
from jdit.sampling import guidance as guide
from jdit.structs import Text

Latents = Float[Array, "B h w C"]
Made = Float[Array, "B *T h w C"]


def encode_text(encoder: Qwen2_5VL, tokens, lengths, positions, pictures: Sequence[Array], drop: int) -> Text:
    """States of prompts (P, N), padding last, without the `drop` tokens of the template's head.

    Args:
        pictures: for the vision tower, each (1, Y, X, 3) and normalised; they stand in every prompt. None of them has
            positions None.
    """
    features = encoder.vision(pictures) if pictures else None
    return Text(encoder.padded(tokens, lengths, drop, features, positions), lengths=lengths - drop)


def encode_image(vae: AutoencoderKLQwenImage, image: UInt8[Array, "1 H W _"], keys, tiling: bool) -> Latents:
    """A picture to latents: a draw from the posterior for each key, its mode without keys."""
    unit = image[:, None].astype(jnp.float32) / 127.5 - 1
    posterior = vae.encode(unit, tiles=Tiles() if tiling else None)
    z = posterior.mode() if keys is None else jax.vmap(posterior.sample)(keys)[:, 0]
    return vae.normalise(z.astype(jnp.float32))[:, 0]


def encode_pictures(vae: AutoencoderKLQwenImage, images, tiling: bool) -> tuple[Latents, ...]:
    """Pictures to be edited or taken apart, each of its own size, to latents: the mode of the posterior."""
    return tuple(encode_image(vae, image, None, tiling) for image in images)


def prepare(positive: Text, negative: Text | None, noise, clean, table: sampling.Table):
    """The first x, and the text of [negative; positive], a row an output."""
    x = noise if clean is None else sampling.add_noise(jnp.broadcast_to(clean, noise.shape), noise, table)
    rows = lambda a: jnp.repeat(a, noise.shape[0] // positive.states.shape[0], axis=0)
    both = (positive,) if negative is None else (negative, positive)
    return x, jax.tree.map(lambda *parts: jnp.concatenate([rows(a) for a in parts]), *both)


def modulate(transformer: QwenImage, table: sampling.Table) -> Modulation:
    """Modulation of every step."""
    return transformer.modulation_table(jnp.asarray(table.timestep, jnp.float32))


def denoise(
    transformer: QwenImage, x: Made, text: Text, pictures, clean, mask: Bool[Array, "1 h w 1"] | None,
    mods: Modulation | None, table: sampling.Table, scale, keys, normalize: bool, two_passes: bool, report: bool,
) -> Made:  # fmt: skip
    """The sampling loop. Modulation of all steps and the text projection are computed before it.

    Args:
        mods: of each step; None makes it in the steps.
        pictures: latents of the pictures to be edited, which the transformer sees beside the noise.
        mask: what is to be generated; the rest stays as in `clean`. None is all.
        scale: of guidance, None is off.
        normalize: after guidance every token has the norm of the positive prediction.
    """

    of_step = modulation.at(mods, transformer.modulation_table)

    def predict(x, t, row, *, text: Text):
        return transformer.velocity(x, of_step(t, row[0]), text.states, text_lengths=text.lengths, pictures=pictures)

    text = text._replace(states=transformer.embed_text(text.states))
    model = functools.partial(predict, text=text)
    if scale is not None:
        half = x.shape[0]
        parts = (jax.tree.map(lambda a, at=at: a[at], text) for at in (slice(half), slice(half, None)))
        negative, positive = (functools.partial(predict, text=part) for part in parts)
        pair = guide.separate(negative, positive) if two_passes else guide.one_batch(model)
        terms = [sampling.linear(scale), *([sampling.keep_norm(transformer.cfg.patch)] if normalize else [])]
        model = guide.guided(pair, *terms)
    if mask is not None:
        model = guide.keep_known(model, clean, mask, lambda row: row[1])
    rows = mods, (table.x0_x, table.x0_out)
    return sampling.solve(model, x, table, key=keys, per_step=rows, on_step=calls.report_step if report else None)


def decode(vae: AutoencoderKLQwenImage, latents: Made, kind: str, tiling: bool, slicing: bool):
    """Latents to pixels, whole, by tiles, or a picture at a time; of layers all but the first, which is the picture
    that they make together."""
    latents, tiles = latents if latents.ndim == 4 else latents[:, 1:], Tiles() if tiling else None
    z = vae.denormalise(latents.reshape(-1, 1, *latents.shape[-3:]))
    pixels = calls.decode_video(vae, z, 1, kind=kind, tiles=tiles, slicing=slicing, report=False)
    return pixels.reshape(*latents.shape[:-3], *pixels.shape[2:])


def known(pictures: Sequence[Latents]) -> Latents:
    """The picture that a mask is laid on: the last, whose proportions the result has."""
    return pictures[-1]


ENCODE_TEXT = Stage(
    "encode_text", encode_text, ("text_encoder",), ("tokens", "lengths", "positions", "prompt_pictures", "drop"),
    ("encoded",), ("drop",),
)  # fmt: skip
ENCODE_IMAGE = Stage(
    "encode_image", encode_image, ("vae",), ("image", "image_keys", "vae_tiling"), ("clean",), ("vae_tiling",)
)
ENCODE_PICTURES = Stage(
    "encode_image", encode_pictures, ("vae",), ("images", "vae_tiling"), ("pictures",), ("vae_tiling",)
)
KNOWN = Stage("known", known, (), ("pictures",), ("clean",), host=True)
PREPARE = Stage("prepare", prepare, (), ("positive", "negative", "noise", "clean", "table"), ("x", "text"))
DENOISE = Stage(
    "denoise", denoise, ("transformer",),
    ("x", "text", "pictures", "clean", "mask", "modulation", "table", "guidance", "keys", "cfg_normalize", "two_passes",
     "report"),
    ("latents",), ("cfg_normalize", "two_passes", "report"), frees=("modulation",),
)  # fmt: skip
DECODE = Stage(
    "decode", decode, ("vae",), ("latents", "output", "vae_tiling", "vae_slicing"), ("pixels",),
    ("output", "vae_tiling", "vae_slicing"),
)  # fmt: skip


def solving(*, tabled: bool) -> list[Stage]:
    """The sampling loop, with the modulation of all steps made before it or without."""
    return modulation.stages(DENOISE, modulate, ("table",), tabled=tabled)
