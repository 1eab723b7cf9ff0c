"""Blocks of Wan's video autoencoders (and of Qwen-Image's, which has the same). Channels last.

B batch, T frames, H rows, W columns, C D channels in and out. Each block takes its chunk's `Stream`, from which its
causal layers get the frames before the chunk.
Source: diffusers models/autoencoders/autoencoder_kl_wan.py; arXiv 2503.20314, section 4.1.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.attention import attention
from jdit.nn.layers import fused_linear
from jdit.nn.vae.blocks import Downsample, Upsample, pointwise
from jdit.nn.vae.causal import CausalConv, Frames, Stream, per_frame


class UnitNorm(nnx.Module):
    """x / max(|x|, 1e-12) sqrt(C) scale over the channels, in float32 (RMS norm, arXiv 1910.07467)."""

    def __init__(self, c: int, *, dtype):
        self.scale = nnx.Param(jnp.ones(c, dtype), axes=(None,))

    def __call__(self, x: Float[Array, "*S C"]) -> Float[Array, "*S C"]:
        x32 = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.square(x32).sum(-1, keepdims=True))
        unit = x32 / jnp.maximum(norm, 1e-12) * x.shape[-1] ** 0.5
        return (unit * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class AttentionBlock(nnx.Module):
    """x + out(attention(norm(x))): within each frame, every pixel attends to every pixel, with one head."""

    def __init__(self, c: int, *, dtype, rngs: nnx.Rngs):
        self.norm = UnitNorm(c, dtype=dtype)
        self.qkv = fused_linear(c, 3, c, (None, None), dtype=dtype, rngs=rngs)
        self.out = pointwise(c, c, dtype=dtype, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x: Frames) -> Frames:
        b, t, h, w, c = x.shape
        qkv = self.qkv(self.norm(x).reshape(b * t, h * w, c))
        y = attention(*(qkv[:, :, None, i] for i in range(3)))
        return x + self.out(y.reshape(x.shape))


class Shrink(nnx.Module):
    """Half the rows and columns, and with `temporal` half the frames, those after the first chunk two by two.

    The first chunk keeps its one frame. Later frames are joined by a convolution of three with stride 2, which sees the
    last frame of the chunk before.
    """

    def __init__(self, c: int, *, temporal: bool, dtype, rngs: nnx.Rngs):
        self.space = Downsample(c, dtype=dtype, rngs=rngs)
        self.time = CausalConv(c, c, size=1, stride=2, dtype=dtype, rngs=rngs) if temporal else None

    @jax.named_scope("shrink")
    def __call__(self, x: Frames, stream: Stream) -> Float[Array, "B S H/2 W/2 C"]:
        x = per_frame(self.space, x)
        if self.time is None:
            return x
        if stream.first:
            stream.keep(x[:, -1:])
            return x
        return self.time.valid(stream.extend(x, 1))


class Grow(nnx.Module):
    """Twice the rows and columns, and with `temporal` twice the frames, but for the first chunk's.

    A convolution of three frames gives the two that each becomes. The second chunk is as if nothing had been before it:
    the first leaves zeros behind.
    """

    def __init__(self, c_in: int, c_out: int, *, temporal: bool, dtype, rngs: nnx.Rngs):
        self.time = CausalConv(c_in, 2 * c_in, size=1, dtype=dtype, rngs=rngs) if temporal else None
        self.space = Upsample(c_in, c_out, dtype=dtype, rngs=rngs)

    @jax.named_scope("grow")
    def __call__(self, x: Frames, stream: Stream) -> Float[Array, "B S 2*H 2*W D"]:
        if self.time is not None and stream.first:
            stream.keep(jnp.zeros((x.shape[0], self.time.taps - 1, *x.shape[2:]), x.dtype))
        elif self.time is not None:
            x = rearrange(self.time(x, stream), "b t h w (s c) -> b (t s) h w c", s=2)
        return per_frame(self.space, x)


def shrink_average(x: Frames, c_out: int, time: int, space: int) -> Float[Array, "B S Y X D"]:
    """Blocks of time x space x space pixels into the channels, and the mean of neighbouring channels to `c_out`.

    Frames that are missing from a whole number of blocks count as zeros in front.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t r) (h q) (w s) c -> b t h w (c r q s)", r=time, q=space, s=space)
    groups = x.reshape(*x.shape[:-1], c_out, -1).astype(jnp.float32)
    return groups.mean(-1).astype(x.dtype)


def grow_repeat(x: Frames, c_out: int, time: int, space: int, first: bool) -> Float[Array, "B S Y X D"]:
    """Each channel repeated, then channels laid out as blocks of time x space x space pixels of `c_out` channels.

    Of the first chunk only the last frame of a block is kept.
    """
    x = jnp.repeat(x, c_out * time * space**2 // x.shape[-1], axis=-1)
    x = rearrange(x, "b t h w (c r q s) -> b (t r) (h q) (w s) c", r=time, q=space, s=space, c=c_out)
    return x[:, time - 1 :] if first else x


def to_patches(x: Frames, p: int | None) -> Float[Array, "B T H/p W/p p*p*C"]:
    """p x p pixels into the channels: (channel, column, row). None and 1 change nothing."""
    return x if p in (None, 1) else rearrange(x, "b t (h q) (w r) c -> b t h w (c r q)", q=p, r=p)


def from_patches(x: Frames, p: int | None) -> Float[Array, "B T p*H p*W C/p/p"]:
    """The inverse of `to_patches`."""
    return x if p in (None, 1) else rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=p, r=p)
