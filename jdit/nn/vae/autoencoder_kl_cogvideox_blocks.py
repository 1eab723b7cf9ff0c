"""Blocks of CogVideoX's video autoencoder. Channels last.

B batch, T frames, H rows, W columns, C channels; t h w latent frames, rows, columns, Z latent channels.
Of an odd number of frames the first stays single wherever the frame rate changes.
Source: diffusers models/autoencoders/autoencoder_kl_cogvideox.py, models/downsampling.py, models/upsampling.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.layers import dense32, fused_linear
from jdit.nn.vae.blocks import Downsample, GroupNorm, Upsample
from jdit.nn.vae.causal import Frames, per_frame
from jdit.nn.vae.causal_blocks import repeat_frames, repeat_to

Latents = Float[Array, "B t h w Z"]


class SpatialNorm(nnx.Module):
    """norm(x) scale(z) + shift(z): a group norm whose affine part is a dense layer of each latent pixel.

    The dense layer runs on the latents, and its result is repeated to the size of x: the same numbers as on repeated
    latents. In float32. Source: arXiv 2209.09002.
    """

    def __init__(self, c: int, c_z: int, *, groups: int, dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(c, groups=groups, eps=1e-6, dtype=dtype)
        self.condition = fused_linear(c_z, 2, c, (None, None), dtype=dtype, rngs=rngs)

    @jax.named_scope("spatial_norm")
    def __call__(self, x: Frames, z: Latents) -> Frames:
        scale, shift = jnp.moveaxis(repeat_to(dense32(self.condition, z), x.shape[1:4]), -2, 0)
        return (self.norm(x.astype(jnp.float32)) * scale + shift).astype(x.dtype)


class Shrink(nnx.Module):
    """Half the rows and columns by a convolution; with `temporal` frames are averaged two by two before."""

    def __init__(self, c: int, *, temporal: bool, dtype, rngs: nnx.Rngs):
        self.temporal = temporal
        self.space = Downsample(c, dtype=dtype, rngs=rngs)

    @jax.named_scope("shrink")
    def __call__(self, x: Frames) -> Float[Array, "B S H/2 W/2 C"]:
        return per_frame(self.space, halve_frames(x) if self.temporal else x)


class Grow(nnx.Module):
    """Twice the rows and columns, then a convolution; with `temporal` each frame twice.

    Frames are repeated last: the convolution is of single frames, and need not see each one twice.
    """

    def __init__(self, c: int, *, temporal: bool, dtype, rngs: nnx.Rngs):
        self.temporal = temporal
        self.space = Upsample(c, dtype=dtype, rngs=rngs)

    @jax.named_scope("grow")
    def __call__(self, x: Frames) -> Float[Array, "B S 2*H 2*W C"]:
        x, t = per_frame(self.space, x), x.shape[1]
        return repeat_frames(x, 2 * t - t % 2) if self.temporal else x


def halve_frames(x: Frames) -> Float[Array, "B S H W C"]:
    """Means of two frames each, in float32; the first of an odd number stays as it is."""
    odd = x.shape[1] % 2
    pairs = x[:, odd:].reshape(x.shape[0], -1, 2, *x.shape[2:])
    return jnp.concatenate([x[:, :odd], pairs.astype(jnp.float32).mean(2).astype(x.dtype)], 1)
