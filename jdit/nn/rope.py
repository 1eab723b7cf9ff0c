"""Rotary position embedding (arXiv 2104.09864) over one or several axes. N tokens, K head dim, A axes.

Tables are made on the host in float64 and used in float32: bfloat16 rounds position 257 to 256.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Layout = Literal["pairs", "halves"]


class Rope(NamedTuple):
    """Cosines and sines, one column a rotated pair; the same for all samples, or with a batch axis first."""

    cos: Float[Array, "*B N K/2"]
    sin: Float[Array, "*B N K/2"]

    def padded(self, tokens: int) -> "Rope":
        """With zeros for the padding behind the tokens, to so many."""
        rows = ((0, tokens - self.cos.shape[-2]), (0, 0))
        return Rope(*(jnp.pad(a, ((0, 0),) * (a.ndim - 2) + rows) for a in self))


def rope_table(positions: Sequence[Float[np.ndarray, "N"]], dims: Sequence[int], theta: float = 10000.0) -> Rope:
    """The table of tokens with a position on each axis.

    Args:
        positions: one array an axis, the same tokens in each (a grid's rows, columns, frames; `grid_positions`).
        dims: how many of the head's dims each axis rotates, in order; their sum is K.

    Raises:
        ValueError: an odd dim, or another number of axes.
    """
    if len(positions) != len(dims) or any(d % 2 for d in dims):
        raise ValueError(f"dims {tuple(dims)} must be even, one for each of the {len(positions)} axes")
    angles = [
        np.asarray(p, np.float64)[:, None] * theta ** -(np.arange(0, d, 2, dtype=np.float64) / d)
        for p, d in zip(positions, dims)
    ]
    joined = np.concatenate(angles, -1)
    return Rope(jnp.asarray(np.cos(joined), jnp.float32), jnp.asarray(np.sin(joined), jnp.float32))


def grid_positions(*sizes: int) -> list[Float[np.ndarray, "N"]]:
    """Positions of a grid's cells on each axis, in raster order: grid_positions(frames, rows, columns)."""
    return [axis.reshape(-1) for axis in np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")]


def grid_rope(axes: Sequence[Float[np.ndarray, "n"]], dims: Sequence[int], theta: float = 10000.0) -> Rope:
    """`rope_table` of a grid's cells in raster order, given the positions along each axis (frames, rows, columns).

    Only the lines along the axes are host tables: JAX spreads them, so that no constant of the grid's size gets into
    the compiled program.

    Raises:
        ValueError: an odd dim, or another number of axes.
    """
    if len(axes) != len(dims):
        raise ValueError(f"dims {tuple(dims)} must be one for each of the {len(axes)} axes")
    sizes, rank = tuple(len(a) for a in axes), len(axes)
    lines = [rope_table([a], [d], theta) for a, d in zip(axes, dims)]

    def cells(name: str) -> Float[Array, "N K/2"]:
        at = lambda i, line: line.reshape(*(1,) * i, sizes[i], *(1,) * (rank - 1 - i), -1)
        whole = [jnp.broadcast_to(a := at(i, getattr(x, name)), (*sizes, a.shape[-1])) for i, x in enumerate(lines)]
        return jnp.concatenate(whole, -1).reshape(-1, sum(dims) // 2)

    return Rope(cells("cos"), cells("sin"))


def rope_at(positions: Int[Array, "*S A"], axes: Int[np.ndarray, "K/2"], freqs: Float[np.ndarray, "K/2"]) -> Rope:
    """The table of positions that are only known when the program runs: each sample of a batch may have its own.

    Args:
        axes: for each rotated pair, the axis whose position turns it.
        freqs: radians a step, for each pair.
    """
    angles = positions[..., np.asarray(axes)].astype(jnp.float32) * np.asarray(freqs, np.float32)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: Float[Array, "B N H K"], rope: Rope, layout: Layout = "pairs") -> Float[Array, "B N H K"]:
    """Rotate queries or keys.

    Args:
        layout: which dims form a pair: "pairs" neighbours (0, 1), (2, 3), as in Flux, Wan, Hunyuan and CogVideoX;
            "halves" i and i + K/2, as in Llama and Qwen's language models.
    """
    x32 = x.astype(jnp.float32)
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]  # N 1 K/2, or B N 1 K/2
    if layout == "pairs":  # no concatenation: on GPUs XLA works it off an element a thread (pieces.joined)
        partner = x32.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
        sign = np.tile(np.array([-1, 1], np.float32), x.shape[-1] // 2)
        out = x32 * jnp.repeat(cos, 2, -1) + partner * (sign * jnp.repeat(sin, 2, -1))
    elif layout == "halves":
        a, b = jnp.split(x32, 2, -1)
        out = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        raise ValueError(f"layout={layout!r}; there are 'pairs' and 'halves'")
    return out.astype(x.dtype)
