"""Two-dimensional blocks of image autoencoders. B batch, H rows, W columns, C channels; channels last.

Rows of pixels may be sharded: activations pass through `shard(x, "batch", "rows", None, None)` at block borders.
Source: diffusers models/resnet.py, models/attention_processor.py, models/unets/unet_2d_blocks.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.attention import attention
from jdit.nn.layers import conv, linear

Pixels = Float[Array, "B H W C"]


def pointwise(c_in: int, c_out: int, *, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A 1x1 convolution as the dense layer that it is; kernel (c_in, c_out)."""
    return linear(c_in, c_out, (None, None), dtype=dtype, rngs=rngs)


class GroupNorm(nnx.Module):
    """Affine group norm over pixels (and frames) and the channels of a group (arXiv 1803.08494), in float32.

    Raises:
        ValueError: `groups` does not divide the channels.
    """

    def __init__(self, c: int, *, groups: int, eps: float, dtype):
        if c % groups:
            raise ValueError(f"{c} channels are not divisible into {groups} norm groups")
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(c, dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(c, dtype), axes=(None,))

    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        b, c, inner = x.shape[0], x.shape[-1], tuple(range(1, x.ndim - 1))
        grouped = lambda a: a.reshape(b, self.groups, c // self.groups).mean(-1, keepdims=True)
        wide = (b, self.groups, c // self.groups)
        spread = lambda a: jnp.broadcast_to(a, wide).reshape(b, *(1 for _ in inner), c)
        # Both sums in one pass over the pixels. The group's mean at one pixel is the origin: where the mean is far
        # larger than the spread, the plain difference of squares would lose all its digits.
        x32 = x.astype(jnp.float32)
        one = x32[(slice(None), *(slice(1) for _ in inner))]
        x32 = x32 - spread(jax.lax.stop_gradient(grouped(one)))
        mean, square = grouped(x32.mean(inner)), grouped(jnp.square(x32).mean(inner))
        inv = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.eps)
        return ((x32 - spread(mean)) * (spread(inv) * self.scale) + self.bias).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 projection of x where the width changes."""

    def __init__(
        self, c_in: int, c_out: int, *, groups: int, eps: float, dtype, rngs: nnx.Rngs, act: Callable = nnx.silu
    ):
        self.act = act
        self.norm1 = GroupNorm(c_in, groups=groups, eps=eps, dtype=dtype)
        self.conv1 = conv(c_in, c_out, 3, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(c_out, groups=groups, eps=eps, dtype=dtype)
        self.conv2 = conv(c_out, c_out, 3, dtype=dtype, rngs=rngs)
        self.shortcut = pointwise(c_in, c_out, dtype=dtype, rngs=rngs) if c_in != c_out else None

    @jax.named_scope("resnet")
    def __call__(self, x: Pixels) -> Pixels:
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        return (x if self.shortcut is None else self.shortcut(x)) + h


class AttentionBlock(nnx.Module):
    """x + out(attention(norm(x))): every pixel attends to every pixel, with one head."""

    def __init__(self, c: int, *, groups: int, eps: float, dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(c, groups=groups, eps=eps, dtype=dtype)
        # apart and not fused: published files have two names for these, and aliases are per leaf
        self.q = pointwise(c, c, dtype=dtype, rngs=rngs)
        self.k = pointwise(c, c, dtype=dtype, rngs=rngs)
        self.v = pointwise(c, c, dtype=dtype, rngs=rngs)
        self.out = pointwise(c, c, dtype=dtype, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x: Pixels) -> Pixels:
        b, h, w, c = x.shape
        tokens = self.norm(x).reshape(b, h * w, 1, c)
        y = attention(self.q(tokens), self.k(tokens), self.v(tokens))
        return x + self.out(y.reshape(b, h, w, c))


class Downsample(nnx.Module):
    """Half the rows and columns by a 3x3 convolution of stride 2, padded below and on the right only."""

    def __init__(self, c: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(c, c, 3, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Pixels) -> Float[Array, "B H/2 W/2 C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the rows and columns: each pixel repeated, then a 3x3 convolution to `c_out` channels (None: as many)."""

    def __init__(self, c: int, c_out: int | None = None, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(c, c_out or c, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Pixels) -> Float[Array, "B 2*H 2*W D"]:
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(x.reshape(b, 2 * h, 2 * w, c))
