"""Patches in and out, and fixed 2D position tables. p patch size, h w patches a column and a row, C channels."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float


def patchify(x: Float[Array, "B H W C"], p: int) -> Float[Array, "B N P"]:
    """Non-overlapping p x p patches in raster order; within a patch (row, column, channel), P = p p C."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)


def unpatchify(x: Float[Array, "B N P"], p: int, h: int) -> Float[Array, "B H W C"]:
    """The inverse of `patchify` for a grid of h rows of patches."""
    return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", p=p, q=p, h=h)


def sincos_2d(dim: int, size: int, base: int) -> Float[Array, "size size dim"]:
    """Fixed sine-cosine table (size, size, dim), float32, after ViT and SD3 (arXiv 2403.03206, appendix; upstream
    get_2d_sincos_pos_embed): the first half of the channels codes the column, the second the row, each [sin, cos].

    Args:
        size: side of the square grid. base: side that spans positions 0..base, the training resolution.
    """
    position = np.arange(size, dtype=np.float64) * base / size
    freqs = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    angles = position[:, None] * freqs
    line = np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)  # size, dim/2
    # spread by JAX: the whole table is 0.9 GB in SD3.5-medium, and nothing where a module is only described
    columns = jnp.broadcast_to(line[None], (size, size, dim // 2))
    rows = jnp.broadcast_to(line[:, None], (size, size, dim // 2))
    return jnp.concatenate([columns, rows], -1)


def crop_centre(table: Float[Array, "S S D"], h: int, w: int) -> Float[Array, "N D"]:
    """The central h x w window of a position table, flattened in raster order.

    Raises:
        ValueError: a window larger than the table.
    """
    size = table.shape[0]
    if max(h, w) > size:
        raise ValueError(f"{h} x {w} patches exceed the position table of {size} x {size}")
    top, left = (size - h) // 2, (size - w) // 2
    return table[top : top + h, left : left + w].reshape(h * w, -1)
