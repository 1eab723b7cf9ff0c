"""Blocks of CogVideoX's video autoencoder. Channels last.

B batch, T frames, H rows, W columns, C D channels in and out; t h w latent frames, rows, columns, Z latent channels.
Of an odd number of frames the first stays single wherever the frame rate changes.
Source: diffusers models/autoencoders/autoencoder_kl_cogvideox.py, models/downsampling.py, models/upsampling.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.layers import dense32, fused_linear, silu
from jdit.nn.vae.blocks import Downsample, GroupNorm, Upsample, pointwise
from jdit.nn.vae.causal import CausalConv, Frames, Stream, per_frame

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


class ResidualBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 projection of x where the width changes.

    Args:
        c_z: latent channels that the norms are conditioned on (the decoder's); None: plain group norms.
        eps: of plain group norms.
    """

    def __init__(
        self, c_in: int, c_out: int, *, c_z: int | None = None, groups: int, eps: float, act: Callable = silu,
        dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.act, kw = act, {"dtype": dtype, "rngs": rngs}

        def norm(c: int) -> GroupNorm | SpatialNorm:
            if c_z is None:
                return GroupNorm(c, groups=groups, eps=eps, dtype=dtype)
            return SpatialNorm(c, c_z, groups=groups, dtype=dtype, rngs=rngs)

        self.norm1 = norm(c_in)
        self.conv1 = CausalConv(c_in, c_out, padding="replicate", **kw)
        self.norm2 = norm(c_out)
        self.conv2 = CausalConv(c_out, c_out, padding="replicate", **kw)
        self.shortcut = pointwise(c_in, c_out, **kw) if c_in != c_out else None

    @jax.named_scope("resnet")
    def __call__(self, x: Frames, z: Latents | None, stream: Stream) -> Float[Array, "B T H W D"]:
        norm = lambda layer, x: layer(x) if z is None else layer(x, z)
        h = self.conv1(self.act(norm(self.norm1, x)), stream)
        h = self.conv2(self.act(norm(self.norm2, h)), stream)
        return h + (x if self.shortcut is None else self.shortcut(x))


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


def repeat_frames(x: Float[Array, "B t ..."], n: int) -> Float[Array, "B n ..."]:
    """Each frame as often as makes n of them; where n is odd, the first once."""
    odd = n % 2
    if n == x.shape[1]:
        return x
    rest = jnp.repeat(x[:, odd:], (n - odd) // (x.shape[1] - odd), axis=1)
    return jnp.concatenate([x[:, :odd], rest], 1)


def repeat_to(x: Float[Array, "B t h w ..."], size: tuple[int, ...]) -> Float[Array, "B T H W ..."]:
    """Frames, rows and columns repeated to `size`, rows and columns by the whole number that they go into it."""
    x = repeat_frames(x, size[0])
    for axis in (2, 3):
        x = jnp.repeat(x, size[axis - 1] // x.shape[axis], axis=axis)
    return x
