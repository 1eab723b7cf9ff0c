"""What Wan's transformer sees beside the noise: prompts, and pictures (upstream pipeline_wan_i2v.py).

B rows, K of them or one, P prompts, L text tokens of width J, I tokens of a picture of width E, T frames of H x W
pixels, S latent frames of h w rows and columns and C channels, r frames that a latent frame stands for (but for the
first, which is one frame).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jdit.nn.text.t5 import T5
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.tiling import Tiles
from jdit.nn.vision.clip import CLIPVision
from jdit.pipeline.given import GivenFrames, Numbers, unit
from jdit.structs import Text

Pixels = UInt8[Array, "K H W 3"] | Float[Array, "K H W 3"]
"""Pictures, or floats in [-1, 1]."""


class Conditions(NamedTuple):
    """What does not change from step to step.

    Attributes:
        text: states of the prompts, [negative; positive] under guidance.
        tokens: of the pictures, first then last, where the transformer has an image embedding.
        frames: beside the noise, mask and latents of the given frames; or the first of them in its place (5B).
    """

    text: Float[Array, "P L J"]
    tokens: Float[Array, "1 I E"] | None = None
    frames: GivenFrames = GivenFrames()


def times(timesteps: Float[Numbers, "N"], frames: int | None) -> Float[Array, "N"] | Float[Array, "N 1 S"]:
    """The timestep of each step or, of so many latent frames, of each of them: the first one is given, at time 0."""
    timesteps = jnp.asarray(timesteps, jnp.float32)
    return timesteps if frames is None else timesteps[:, None, None] * (jnp.arange(frames) > 0)


def encode_text(encoder: T5, ids, lengths) -> Text:
    """States of each prompt's own tokens, zeros after them."""
    return Text(encoder.padded(ids, lengths))


def encode_pictures(encoder: CLIPVision, pictures: Float[Array, "K Y X 3"]) -> Float[Array, "1 I E"]:
    """One or two preprocessed pictures to the tokens before the encoder's last layer, one after the other."""
    states = encoder(pictures, skip=0).states
    return states.reshape(1, -1, states.shape[-1])


def encode_frames(
    vae: AutoencoderKLWan, first: Pixels, last: Pixels | None, frames: int, tiling: bool
) -> Float[Array, "K S h w r+C"]:
    """The given frames in a video that is grey elsewhere, as the channels beside the noise: mask, then latents."""
    blank = jnp.zeros((first.shape[0], frames - 1 - (last is not None), *first.shape[1:]))
    parts = [unit(first)[:, None], blank] + ([] if last is None else [unit(last)[:, None]])
    z = encode_video(vae, jnp.concatenate(parts, 1), tiling)
    given = np.zeros((1, frames, 1, 1), np.float32)
    given[:, [0, *([] if last is None else [-1])]] = 1
    marks = flags(jnp.asarray(given), vae.cfg.time_factor or 1)
    return jnp.concatenate([jnp.broadcast_to(marks, (*z.shape[:4], marks.shape[-1])), z], -1)


def encode_first(vae: AutoencoderKLWan, first: Pixels, tiling: bool) -> Float[Array, "K 1 h w C"]:
    """The latents of the first frame alone."""
    return encode_video(vae, unit(first)[:, None], tiling)


def flags(given: Float[Array, "B T h w"], r: int) -> Float[Array, "B S h w r"]:
    """Which pixels of which frames are given, r flags a latent frame: the first latent frame is one frame, counted r
    times."""
    whole = jnp.concatenate([jnp.repeat(given[:, :1], r, 1), given[:, 1:]], 1)
    return jnp.moveaxis(whole.reshape(whole.shape[0], -1, r, *whole.shape[2:]), 2, -1)


def encode_video(vae: AutoencoderKLWan, video: Float[Array, "B T H W 3"], tiling: bool) -> Float[Array, "B S h w C"]:
    """The posterior's mode, normalised."""
    posterior = vae.encode(video, tiles=Tiles() if tiling else None)
    return vae.normalise(posterior.mode().astype(jnp.float32))
