"""What CogVideoX's transformer sees beside the noise: prompts, and a picture or a video through the autoencoder
(upstream pipeline_cogvideox_image2video.py, pipeline_cogvideox_video2video.py).

B outputs, P prompts, L text tokens of width J, T frames of H x W pixels, S latent frames of h w rows and columns and C
channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jdit.nn.text.t5 import T5
from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from jdit.pipeline.given import GivenFrames, unit
from jdit.structs import Text


class Conditions(NamedTuple):
    """What does not change from step to step.

    Attributes:
        text: states of the prompts, [negative; positive] under guidance.
        frames: latents of the first frame, then zeros, beside the noise.
    """

    text: Float[Array, "P L J"]
    frames: GivenFrames = GivenFrames()


def encode_text(encoder: T5, ids) -> Text:
    """States of all tokens; padding counts, as upstream."""
    return Text(encoder(ids))


def encode_picture(vae: AutoencoderKLCogVideoX, picture: UInt8[Array, "1 H W 3"], keys, tiling: bool):
    """A picture to the latents (B or 1, 1, h, w, C) of a first frame; 1.5's were trained with the scale the wrong way
    round (`invert_scale`)."""
    z = _encode(vae, picture[:, None], keys, tiling)
    return z * np.float32(1 / vae.cfg.scale) if vae.cfg.invert_scale else vae.normalise(z)


def encode_video(vae: AutoencoderKLCogVideoX, video: UInt8[Array, "1 T H W 3"], keys, tiling: bool):
    """A video to latents (B or 1, S, h, w, C)."""
    return vae.normalise(_encode(vae, video, keys, tiling))


def _encode(vae: AutoencoderKLCogVideoX, video: UInt8[Array, "1 T H W 3"], keys, tiling: bool):
    """A draw from the posterior for each key, its mode without keys."""
    posterior = vae.encode(unit(video), tiles=vae.cfg.tiles if tiling else None)
    z = posterior.mode() if keys is None else jax.vmap(posterior.sample)(keys)[:, 0]
    return z.astype(jnp.float32)
