"""Blocks that causal video autoencoders share. Channels last.

B batch, T frames, H rows, W columns, C D channels in and out; t h w frames, rows, columns before they are repeated.
Sources: diffusers models/autoencoders/autoencoder_kl_wan.py, autoencoder_kl_cogvideox.py,
autoencoder_kl_hunyuan_video.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.layers import silu
from jdit.nn.vae.blocks import pointwise
from jdit.nn.vae.causal import CausalConv, Frames, Padding, Stream


class ResidualBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 projection of x where the width changes.

    Args:
        norm: makes the norm of a number of channels; called with x and what the block is given after the stream.
        padding, edges: see `CausalConv`.
    """

    def __init__(
        self, c_in: int, c_out: int, *, norm: Callable[[int], Any], act: Callable = silu, padding: Padding = "zero",
        edges: Padding = "zero", dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.act, kw = act, {"dtype": dtype, "rngs": rngs}
        self.norm1 = norm(c_in)
        self.conv1 = CausalConv(c_in, c_out, padding=padding, edges=edges, **kw)
        self.norm2 = norm(c_out)
        self.conv2 = CausalConv(c_out, c_out, padding=padding, edges=edges, **kw)
        self.shortcut = pointwise(c_in, c_out, **kw) if c_in != c_out else None

    @jax.named_scope("resnet")
    def __call__(
        self, x: Frames, stream: Stream | None = None, *condition: Float[Array, "B t h w Z"]
    ) -> Float[Array, "B T H W D"]:
        h = self.conv1(self.act(self.norm1(x, *condition)), stream)
        h = self.conv2(self.act(self.norm2(h, *condition)), stream)
        return h + (x if self.shortcut is None else self.shortcut(x))


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
