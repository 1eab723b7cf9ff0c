"""Frames that a video begins with, or has elsewhere, as a transformer sees them.

B rows, K of them or one, S latent frames, h w latent rows and columns, C latent channels.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

Numbers = Array | np.ndarray


class GivenFrames(NamedTuple):
    """What does not change from step to step.

    Attributes:
        channels: laid beside those of the noise: latents of the given frames, and which they are; of one video or one
            an output.
        first: latents of the first frame, which stays as it is while the others are denoised; likewise.
    """

    channels: Float[Array, "K S h w C"] | None = None
    first: Float[Array, "K 1 h w C"] | None = None

    def apply(self, x: Float[Array, "B S h w C"]) -> Float[Array, "B S h w D"]:
        """What the transformer is given for the noisy latents x."""
        x = self.keep_first(x)
        return x if self.channels is None else jnp.concatenate([x, _rows(self.channels, x)], -1)

    def keep_first(self, x: Float[Array, "B S h w C"]) -> Float[Array, "B S h w C"]:
        return x if self.first is None else x.at[:, :1].set(_rows(self.first, x))


def _rows(a: Float[Array, "K ..."], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """One video's for all rows of x; or one an output, which serves the unconditional rows and the conditional ones."""
    rows, a = len(x), a.astype(x.dtype)
    return jnp.concatenate([a] * (rows // len(a))) if len(a) > 1 else jnp.broadcast_to(a, (rows, *a.shape[1:]))


def unit(pixels: UInt8[Numbers, "*S"] | Float[Numbers, "*S"]) -> Float[Array, "*S"]:
    """uint8 to [-1, 1]; floats are there already."""
    return jnp.asarray(pixels if pixels.dtype != jnp.uint8 else pixels.astype(np.float32) / 127.5 - 1)
