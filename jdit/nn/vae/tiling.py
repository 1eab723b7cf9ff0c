"""Bounded memory for autoencoders: one sample at a time, and overlapping tiles that are blended.

B batch, H pixel rows, W pixel columns, C latent channels, h = H/f, w = W/f. The tile grid and the blending are those
of diffusers models/autoencoders/autoencoder_kl.py (`enable_tiling`), so the numbers are the same. Tiles of one shape
run one after another in a single compiled loop; a grid has at most nine shapes, whatever the size of the picture.
`run_grid` and `join_grid` also take videos (B T H W C): rows and columns are the axes before the last.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior

T = TypeVar("T")
Pair = tuple[int, int]


class Tiles(NamedTuple):
    """Tiles of a video autoencoder in pixels, as upstream's `enable_tiling` takes them: size, and step to the next."""

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    @property
    def size(self) -> Pair:
        return self.height, self.width

    @property
    def stride(self) -> Pair:
        return self.stride_height, self.stride_width

    @property
    def overlap(self) -> Pair:
        return self.height - self.stride_height, self.width - self.stride_width

    def over(self, factor: int) -> "Tiles":
        """The same tiles counted in units of `factor` pixels, rounded down.

        Raises:
            ValueError: a tile or step of less than a unit.
        """
        out = Tiles(*(n // factor for n in self))
        if min(out) < 1:
            raise ValueError(f"{self}: sizes and strides are at least {factor} pixels")
        return out


class FrameTiles(NamedTuple):
    """Tiles of frames, and frames to the next: a tile has one frame more, of which only the first tile keeps it."""

    size: int = 16
    stride: int = 12

    @property
    def overlap(self) -> int:
        return self.size - self.stride

    def over(self, factor: int) -> "FrameTiles":
        """The same tiles counted in units of `factor` frames.

        Raises:
            ValueError: no whole number of units, or steps that leave out frames.
        """
        if any(n < factor or n % factor for n in self) or self.stride > self.size:
            raise ValueError(f"{self}: size and stride are multiples of {factor} frames, the stride at most the size")
        return FrameTiles(self.size // factor, self.stride // factor)


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
    tiles = run_grid(vae, z, "decode", _both(latent), _both(stride))
    return join_grid(tiles, blend=_both(int(pixels * overlap)), keep=_both(stride * vae.cfg.factor))


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
    tiles = run_grid(vae, pixels, "moments", _both(size), _both(stride * f))
    return Posterior.of(join_grid(tiles, blend=_both(int(latent * overlap)), keep=_both(stride)))


def _both(n: int) -> Pair:
    return n, n


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


def run_grid(vae: nnx.Module, x: Float[Array, "... H W C"], method: str, size: Pair, stride: Pair) -> list[list[Array]]:
    """The grid of tiles of x, each through the autoencoder's method. Tiles are cut at the lower and right border."""
    (height, width), shape = size, x.shape[-3:-1]
    starts = [range(0, n, step) for n, step in zip(shape, stride)]
    cells = defaultdict(list)
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            cells[min(height, shape[0] - top), min(width, shape[1] - left)].append((i, j, top, left))
    grid: list[list[Array]] = [[x] * len(starts[1]) for _ in starts[0]]
    for tile, group in cells.items():
        out = _equal_tiles(vae, x, np.array([c[2:] for c in group], np.int32), method=method, shape=tile)
        for n, (i, j, *_) in enumerate(group):
            grid[i][j] = out[n]
    return grid


@functools.partial(jax.jit, static_argnames=("method", "shape"))
def _equal_tiles(vae: nnx.Module, x: Array, corners: Array, *, method: str, shape: Pair) -> Array:
    def one(corner):
        begin = (*(0 for _ in x.shape[:-3]), corner[0], corner[1], 0)
        return getattr(vae, method)(jax.lax.dynamic_slice(x, begin, (*x.shape[:-3], *shape, x.shape[-1])))

    return jax.lax.map(one, corners)


def join_grid(grid: list[list[Array]], *, blend: Pair, keep: Pair) -> Float[Array, "... H W C"]:
    """Blend each tile with its (already blended) upper and left neighbours, cut it to `keep`, and put all together."""
    for i, row in enumerate(grid):
        for j, tile in enumerate(row):
            if i > 0:
                tile = _blend(grid[i - 1][j], tile, blend[0], axis=tile.ndim - 3)
            if j > 0:
                tile = _blend(row[j - 1], tile, blend[1], axis=tile.ndim - 2)
            row[j] = tile
    return jnp.concatenate([jnp.concatenate([t[..., : keep[0], : keep[1], :] for t in row], -2) for row in grid], -3)


def _blend(a: Array, b: Array, extent: int, axis: int) -> Array:
    """b, whose first `extent` rows or columns fade over from the last ones of a."""
    extent = min(a.shape[axis], b.shape[axis], extent)
    if extent <= 0:
        return b
    weight = (jnp.arange(extent) / extent).reshape(-1, *(1 for _ in range(axis + 1, a.ndim)))
    end = jax.lax.slice_in_dim(a, a.shape[axis] - extent, None, axis=axis)
    start = jax.lax.slice_in_dim(b, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(b, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis)


def run_frames(
    fn: Callable[[Float[Array, "B t ..."]], Float[Array, "B s ..."]], x: Float[Array, "B T ..."], *,
    tiles: FrameTiles, result: FrameTiles, count: Callable[[int], int], finish: Callable[[Array], Array] = lambda y: y,
) -> Float[Array, "B S ..."]:  # fmt: skip
    """fn of overlapping tiles of frames, each blended with the one before, as diffusers
    models/autoencoders/autoencoder_kl_hunyuan_video.py does it.

    Tile i are the frames from i * stride on, size + 1 of them; of the first result, which lacks its past, all but the
    first tile make no use. Whole tiles run in a scan that writes into one buffer; those that the end cuts short come
    after it.

    Args:
        x: more than `tiles.size` frames.
        result: `tiles` counted in fn's frames. count: fn's frames of a number of frames of x.
        finish: applied to frames that are done, inside the loop.
    """
    n, (size, stride), (_, keep), blend = x.shape[1], tiles, result, result.overlap
    y, done = jax.eval_shape(lambda x: (y := fn(x[:, : size + 1]), finish(y)), x)
    blank = lambda frames: jnp.zeros((y.shape[0], frames, *y.shape[2:]), y.dtype)
    results = jnp.zeros((done.shape[0], count(n), *done.shape[2:]), done.dtype)
    ramp = (np.arange(blend, dtype=np.float32) / max(blend, 1)).reshape(-1, *(1 for _ in y.shape[2:]))

    def write(results, y, begin):
        return jax.lax.dynamic_update_slice_in_dim(results, finish(y), begin, 1)

    def whole(carry, i):
        first, before, results = carry
        y = fn(jax.lax.dynamic_slice_in_dim(x, i * stride, size + 1, 1))
        first, own = jnp.where(i == 0, y[:, :1], first), jnp.where(i == 0, 1.0, ramp)
        y = jnp.concatenate([before * (1 - own) + y[:, 1 : 1 + blend] * own, y[:, 1 + blend :]], 1)
        return (first, y[:, keep:], write(results, y[:, :keep], 1 + i * keep)), None

    tiled = (n - size - 1) // stride + 1
    (first, before, results), _ = jax.lax.scan(whole, (blank(1), blank(blend), results), jnp.arange(tiled))
    results = write(results, first, 0)
    for i in range(tiled, -(-n // stride)):
        if count(n - i * stride) > 1:
            y = _blend(before, fn(x[:, i * stride :])[:, 1:], blend, axis=1)
            results = write(results, y[:, :keep], 1 + i * keep)
            before = y[:, max(y.shape[1] - blend, 0) :]
    return results
