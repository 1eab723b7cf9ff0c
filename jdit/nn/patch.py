"""Patches in and out, and fixed position tables. p patch size, h w patches a column and a row, C channels.

In 3D: T Y X latent frames, rows, columns; t y x patches along each.
"""

from collections.abc import Sequence

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


def patch_grid(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Patches along each axis.

    Raises:
        ValueError: a size that is no multiple of its patch.
    """
    if len(sizes) != len(patch) or any(n % p for n, p in zip(sizes, patch)):
        raise ValueError(f"latents of {tuple(sizes)} do not divide into patches of {tuple(patch)}")
    return tuple(n // p for n, p in zip(sizes, patch))


def patchify_3d(x: Float[Array, "B T Y X C"], patch: Sequence[int]) -> Float[Array, "B N P"]:
    """Non-overlapping patches in raster order; within a patch (frame, row, column, channel)."""
    p, q, r = patch
    return rearrange(x, "b (t p) (y q) (x r) c -> b (t y x) (p q r c)", p=p, q=q, r=r)


def unpatchify_3d(x: Float[Array, "B N P"], patch: Sequence[int], grid: Sequence[int]) -> Float[Array, "B T Y X C"]:
    """The inverse of `patchify_3d` for a grid of t, y, x patches."""
    (p, q, r), (t, y, _) = patch, grid
    return rearrange(x, "b (t y x) (p q r c) -> b (t p) (y q) (x r) c", p=p, q=q, r=r, t=t, y=y)


def sincos_2d(dim: int, size: int, base: int) -> Float[Array, "size size dim"]:
    """Fixed sine-cosine table (size, size, dim), float32, after ViT and SD3 (arXiv 2403.03206, appendix; upstream
    get_2d_sincos_pos_embed): the first half of the channels codes the column, the second the row, each [sin, cos].

    Args:
        size: side of the square grid. base: side that spans positions 0..base, the training resolution.
    """
    line = _sincos(np.arange(size) * base / size, dim // 2)
    # spread by JAX: the whole table is 0.9 GB in SD3.5-medium, and nothing where a module is only described
    columns = jnp.broadcast_to(line[None], (size, size, dim // 2))
    rows = jnp.broadcast_to(line[:, None], (size, size, dim // 2))
    return jnp.concatenate([columns, rows], -1)


def sincos_3d(dim: int, grid: Sequence[int], scales: Sequence[float]) -> Float[Array, "N dim"]:
    """Sine-cosine positions of a grid of frames, rows and columns in raster order, float32 (CogVideoX; upstream
    get_3d_sincos_pos_embed): a quarter of the channels codes the frame, 3/8 the column, 3/8 the row.

    Args:
        scales: what the positions along each axis are divided by.
    """
    t, y, x = (np.arange(n) / scale for n, scale in zip(grid, scales))
    spread = lambda line, *shape: jnp.broadcast_to(line.reshape(*shape, line.shape[-1]), (*grid, line.shape[-1]))
    frames, columns, rows = _sincos(t, dim // 4), _sincos(x, 3 * dim // 8), _sincos(y, 3 * dim // 8)
    parts = [spread(frames, -1, 1, 1), spread(columns, 1, 1, -1), spread(rows, 1, -1, 1)]
    return jnp.concatenate(parts, -1).reshape(-1, dim)


def _sincos(positions: Float[np.ndarray, "n"], dim: int) -> Float[np.ndarray, "n dim"]:
    """[sin, cos] of positions along one axis, in float64 on the host."""
    freqs = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = np.asarray(positions, np.float64)[:, None] * freqs
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)


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
