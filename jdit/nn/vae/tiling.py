"""Bounded memory for image autoencoders: one picture at a time, and overlapping tiles that are blended.

B batch, H pixel rows, W pixel columns, C latent channels, h = H/f, w = W/f. The tile grid and the blending are those
of diffusers models/autoencoders/autoencoder_kl.py (`enable_tiling`), so the numbers are the same. Tiles of one shape
run one after another in a single compiled loop; a grid has at most nine shapes, whatever the size of the picture.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdit.nn.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior

T = TypeVar("T")


def one_at_a_time(fn: Callable[[Float[Array, "1 ..."]], T], batch: Float[Array, "B ..."]) -> T:
    """`fn` of each batch element alone, in turn: memory of one, results as from the whole batch.

    Example: `one_at_a_time(vae.decode, z)`, or with tiles `one_at_a_time(lambda z: decode_tiled(vae, z), z)`.
    """
    return jax.tree.map(lambda a: a[:, 0], jax.lax.map(lambda x: fn(x[None]), batch))


def decode_tiled(
    vae: AutoencoderKL, z: Float[Array, "B h w C"], *, tile: int | None = None, overlap: float = 0.25
) -> Float[Array, "B H W 3"]:
    """`vae.decode` by tiles; what fits into one tile is decoded whole.

    Args:
        tile: pixels a side of a tile; None is the config's sample_size.
        overlap: share of a tile that is blended with the next one.

    Raises:
        ValueError: a tile whose stride is not a whole number of latent pixels.
    """
    pixels, latent, stride = _geometry(vae.cfg, tile, overlap)
    if max(z.shape[1:3]) <= latent:
        return vae.decode(z)
    tiles = _run(vae, z, "decode", latent, stride)
    return _join(tiles, blend=int(pixels * overlap), keep=stride * vae.cfg.factor)


def encode_tiled(
    vae: AutoencoderKL, pixels: Float[Array, "B H W 3"], *, tile: int | None = None, overlap: float = 0.25
) -> Posterior:
    """`vae.encode` by tiles; see `decode_tiled`.

    Raises:
        ValueError: as `decode_tiled`; a size that leaves a last tile of less than one latent pixel.
    """
    f = vae.cfg.factor
    size, latent, stride = _geometry(vae.cfg, tile, overlap)
    if max(pixels.shape[1:3]) <= size:
        return vae.encode(pixels)
    if bad := [n for n in pixels.shape[1:3] if 0 < n % (stride * f) < f]:
        raise ValueError(f"sizes {bad} leave a tile of less than {f} pixels: take multiples of {f}")
    tiles = _run(vae, pixels, "moments", size, stride * f)
    return Posterior.of(_join(tiles, blend=int(latent * overlap), keep=stride))


def _geometry(cfg: AutoencoderKLConfig, tile: int | None, overlap: float) -> tuple[int, int, int]:
    """Pixels and latent pixels a side of a tile, and the stride in latent pixels."""
    pixels = cfg.sample_size if tile is None else tile
    latent = pixels // cfg.factor
    stride = int(latent * (1 - overlap))
    # the blended strips must have the same extent in pixels and latents, else the joined picture has another size
    fits = pixels == latent * cfg.factor and stride > 0 and 0 <= overlap < 1
    fits = fits and latent - int(latent * overlap) == stride and pixels - int(pixels * overlap) == stride * cfg.factor
    if not fits:
        raise ValueError(
            f"tile {pixels} with overlap {overlap}: the tile and its overlap must be multiples of {cfg.factor} pixels "
            f"(with overlap 0.25: tiles that are multiples of {4 * cfg.factor})"
        )
    return pixels, latent, stride


def _run(vae: AutoencoderKL, x: Array, method: str, size: int, stride: int) -> list[list[Array]]:
    """The grid of tiles of x, each through the method. Tiles are cut at the lower and right border."""
    starts = [range(0, n, stride) for n in x.shape[1:3]]
    cells = defaultdict(list)
    for i, y in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            cells[min(size, x.shape[1] - y), min(size, x.shape[2] - left)].append((i, j, y, left))
    grid: list[list[Array]] = [[x] * len(starts[1]) for _ in starts[0]]
    for shape, group in cells.items():
        out = _equal_tiles(vae, x, np.array([c[2:] for c in group], np.int32), method=method, shape=shape)
        for n, (i, j, *_) in enumerate(group):
            grid[i][j] = out[n]
    return grid


@functools.partial(jax.jit, static_argnames=("method", "shape"))
def _equal_tiles(vae: AutoencoderKL, x: Array, corners: Array, *, method: str, shape: tuple[int, int]) -> Array:
    def one(corner):
        tile = jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), (x.shape[0], *shape, x.shape[-1]))
        return getattr(vae, method)(tile)

    return jax.lax.map(one, corners)


def _join(grid: list[list[Array]], *, blend: int, keep: int) -> Array:
    """Blend each tile with its (already blended) upper and left neighbours, cut it to `keep`, and put all together."""
    for i, row in enumerate(grid):
        for j, tile in enumerate(row):
            if i > 0:
                tile = _blend(grid[i - 1][j], tile, blend, axis=1)
            if j > 0:
                tile = _blend(row[j - 1], tile, blend, axis=2)
            row[j] = tile
    return jnp.concatenate([jnp.concatenate([t[:, :keep, :keep] for t in row], 2) for row in grid], 1)


def _blend(a: Array, b: Array, extent: int, axis: int) -> Array:
    """b, whose first `extent` rows or columns fade over from the last ones of a."""
    extent = min(a.shape[axis], b.shape[axis], extent)
    if extent == 0:
        return b
    weight = (jnp.arange(extent) / extent).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
    end = jax.lax.slice_in_dim(a, a.shape[axis] - extent, None, axis=axis)
    start = jax.lax.slice_in_dim(b, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(b, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis)
