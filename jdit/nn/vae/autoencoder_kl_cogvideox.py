"""CogVideoX's causal video autoencoder: latents of 16 channels, 4 x 8 x 8 pixels each.

B batch, T frames, H pixel rows, W pixel columns, C latent channels; S latent frames, h w latent rows and columns. Of an
odd number of frames the first becomes a latent frame by itself: T = 1 + 4 (S - 1); an even number has T = 4 S.

The norms' statistics are over the frames of a batch, so that the batches are part of the architecture: 8 frames (2
latent ones) each, what is left over joining the first. Each goes through the network with the last frames of the one
before (`encode_batch`, `decode_batch`); `encode` and `decode` scan over them in memory that does not grow with the
length.
Source: diffusers models/autoencoders/autoencoder_kl_cogvideox.py; arXiv 2408.06072, section 2.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.layers import silu
from jdit.nn.vae.autoencoder_kl import Posterior
from jdit.nn.vae.autoencoder_kl_cogvideox_blocks import Grow, Shrink, SpatialNorm
from jdit.nn.vae.autoencoder_kl_cogvideox_config import ACTIVATIONS, AutoencoderKLCogVideoXConfig, ShareTiles
from jdit.nn.vae.blocks import GroupNorm, pointwise
from jdit.nn.vae.causal import Cache, CausalConv, Frames, Stream, run_chunks
from jdit.nn.vae.causal_blocks import ResidualBlock
from jdit.nn.vae.tiling import join_grid, run_grid
from jdit.sharding import shard

FRAMES, LATENT_FRAMES = 8, 2
"""Frames and latent frames of a batch, whatever the config, as upstream."""
Finish = Callable[[Float[Array, "B T H W 3"]], Array]


class Level(nnx.Module):
    """Residual blocks of one resolution, then (not in the last level of a side) a change of resolution."""

    def __init__(
        self, c_in: int, c_out: int, layers: int, cfg: AutoencoderKLCogVideoXConfig, *, c_z: int | None = None,
        change: type[Shrink] | type[Grow] | None = None, temporal: bool = False, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.cfg = cfg
        kw = {"dtype": jnp.dtype(cfg.dtype), "rngs": rngs}

        def norm(c: int) -> GroupNorm | SpatialNorm:
            if c_z is None:
                return GroupNorm(c, groups=cfg.groups, eps=cfg.eps, dtype=kw["dtype"])
            return SpatialNorm(c, c_z, groups=cfg.groups, **kw)

        make = lambda c: ResidualBlock(c, c_out, norm=norm, act=ACTIVATIONS[cfg.act], padding="replicate", **kw)
        self.resnets = nnx.List([make(c_out if i else c_in) for i in range(layers)])
        self.change = change(c_out, temporal=temporal, **kw) if change else None

    def __call__(self, x: Frames, z: Frames | None, stream: Stream) -> Frames:
        condition = () if z is None else (z,)
        for block in self.resnets:
            x = _rows(block(x, stream, *condition), self.cfg)
        return x if self.change is None else _rows(self.change(x), self.cfg)


class Encoder(nnx.Module):
    """A batch of frames to moments."""

    def __init__(self, cfg: AutoencoderKLCogVideoXConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kw, c, last = {"dtype": jnp.dtype(cfg.dtype), "rngs": rngs}, cfg.channels, len(cfg.channels) - 1
        self.conv_in = CausalConv(cfg.in_channels, c[0], padding="replicate", **kw)
        make = lambda i: Level(
            c[max(i - 1, 0)], c[i], cfg.layers, cfg, change=Shrink if i < last else None, temporal=i < cfg.halvings,
            rngs=rngs,
        )  # fmt: skip
        self.down = nnx.List([make(i) for i in range(len(c))])
        self.mid = Level(c[-1], c[-1], 2, cfg, rngs=rngs)
        self.norm_out = GroupNorm(c[-1], groups=cfg.groups, eps=1e-6, dtype=kw["dtype"])
        self.conv_out = CausalConv(c[-1], 2 * cfg.latent_channels, padding="replicate", **kw)

    @jax.named_scope("encoder")
    def __call__(self, x: Frames, stream: Stream) -> Frames:
        x = _rows(self.conv_in(_rows(x, self.cfg), stream), self.cfg)
        for level in (*self.down, self.mid):
            x = level(x, None, stream)
        return self.conv_out(silu(self.norm_out(x)), stream)


class Decoder(nnx.Module):
    """A batch of latents to pixels; every norm is conditioned on the latents."""

    def __init__(self, cfg: AutoencoderKLCogVideoXConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kw, c, last = {"dtype": jnp.dtype(cfg.dtype), "rngs": rngs}, cfg.channels[::-1], len(cfg.channels) - 1
        c_z = cfg.latent_channels
        self.conv_in = CausalConv(c_z, c[0], padding="replicate", **kw)
        self.mid = Level(c[0], c[0], 2, cfg, c_z=c_z, rngs=rngs)
        make = lambda i: Level(
            c[max(i - 1, 0)], c[i], cfg.layers + 1, cfg, c_z=c_z, change=Grow if i < last else None,
            temporal=i < cfg.halvings, rngs=rngs,
        )  # fmt: skip
        self.up = nnx.List([make(i) for i in range(len(c))])
        self.norm_out = SpatialNorm(c[-1], c_z, groups=cfg.groups, **kw)
        self.conv_out = CausalConv(c[-1], cfg.out_channels, padding="replicate", **kw)

    @jax.named_scope("decoder")
    def __call__(self, z: Frames, stream: Stream) -> Frames:
        x = _rows(self.conv_in(_rows(z, self.cfg), stream), self.cfg)
        for level in (self.mid, *self.up):
            x = level(x, z, stream)
        return _rows(self.conv_out(silu(self.norm_out(x, z)), stream), self.cfg)


class AutoencoderKLCogVideoX(nnx.Module):
    """Encoder and decoder with their 1x1 convolutions. Inputs of any float dtype, results in float32."""

    def __init__(self, cfg: AutoencoderKLCogVideoXConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, c = jnp.dtype(cfg.dtype), cfg.latent_channels
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.quant_conv = pointwise(2 * c, 2 * c, dtype=dtype, rngs=rngs) if cfg.quant_conv else None
        self.post_quant_conv = pointwise(c, c, dtype=dtype, rngs=rngs) if cfg.post_quant_conv else None

    # ---- a batch of frames at a time

    def encode_batch(
        self, pixels: Float[Array, "B T H W 3"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B S h w 2*C"], Cache]:
        """Moments of one batch of frames, and what the next one needs.

        The first has at most 15 frames with cache None (T % 8 more than 8 of a video of T frames), each later one 8.

        Raises:
            ValueError: another number of frames, a size that does not fit, or a cache of another network.
        """
        self._check(pixels)
        _check_frames(pixels, FRAMES, cache)
        return self._encode(pixels, cache)

    def decode_batch(
        self, latents: Float[Array, "B S h w C"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T H W 3"], Cache]:
        """Pixels of one batch of raw latents, and what the next one needs.

        The first has at most 3 latent frames with cache None (3 where their number is odd), each later one 2.

        Raises:
            ValueError: another number of latent frames, or a cache of another network.
        """
        _check_frames(latents, LATENT_FRAMES, cache)
        return self._decode(latents, cache)

    def _encode(self, x: Frames, cache: Cache | None) -> tuple[Frames, Cache]:
        stream = Stream(cache)
        x = self.encoder(x.astype(self.cfg.dtype), stream)
        x = x if self.quant_conv is None else self.quant_conv(x)
        return x.astype(jnp.float32), stream.cache()

    def _decode(self, z: Frames, cache: Cache | None) -> tuple[Frames, Cache]:
        stream, z = Stream(cache), z.astype(self.cfg.dtype)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z, stream).astype(jnp.float32), stream.cache()

    def _check(self, pixels: Frames):
        size, f = pixels.shape[2:4], self.cfg.space_factor
        if min(size) < f:
            raise ValueError(f"frames of {size[0]}x{size[1]} pixels are below the smallest, {f}x{f}")

    # ---- whole videos

    def _all_moments(self, x: Frames) -> Frames:
        return run_chunks(
            self._encode, x, size=FRAMES, out=max(FRAMES // self.cfg.frame_factors[0], 1), first=_first(x, FRAMES)
        )

    def _all_frames(self, z: Frames, finish: Finish = lambda x: x) -> Array:
        def step(z: Frames, cache: Cache | None) -> tuple[Array, Cache]:
            x, cache = self._decode(z, cache)
            return finish(x), cache

        out = LATENT_FRAMES * self.cfg.frame_factors[1]
        return run_chunks(step, z, size=LATENT_FRAMES, out=out, first=_first(z, LATENT_FRAMES))

    def moments(
        self, pixels: Float[Array, "B T H W 3"], *, tiles: ShareTiles | None = None
    ) -> Float[Array, "B S h w 2*C"]:
        """Mean and log variance side by side, the latter not yet held in bounds; see `encode`."""
        self._check(pixels)
        f = self.cfg.space_factor
        if tiles is None or (pixels.shape[2] <= tiles.height and pixels.shape[3] <= tiles.width):
            return self._all_moments(pixels)
        grid = tiles.grid(f, decode=False)
        rests = [min(n - i, size) for n, size, step in zip(pixels.shape[2:4], grid.size, grid.stride)
                 for i in range(0, n, step)]  # fmt: skip
        if bad := [n for n in rests if n < f]:
            raise ValueError(f"{tiles} leave tiles of {bad} pixels a side: at least {f} are needed")
        cells = run_grid(self, pixels, "_all_moments", grid.size, grid.stride)
        return join_grid(cells, blend=grid.blend, keep=grid.keep)

    def encode(self, pixels: Float[Array, "B T H W 3"], *, tiles: ShareTiles | None = None) -> Posterior:
        """Pixels in [-1, 1] -> posterior over raw latents (its `mode` is what pipelines condition on).

        Rows and columns beyond a multiple of the compression are cut, as upstream.

        Args:
            tiles: encode by tiles where the video is larger than one; upstream's are `cfg.tiles`.

        Raises:
            ValueError: frames, or tiles of them, smaller than a latent pixel.
        """
        return Posterior.of(self.moments(pixels, tiles=tiles))

    def decode(
        self, latents: Float[Array, "B S h w C"], *, tiles: ShareTiles | None = None, finish: Finish | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Raw latents (see `denormalise`) -> pixels, nominally in [-1, 1], not clipped, as upstream.

        Args:
            tiles: decode by tiles where the video is larger than one; upstream's are `cfg.tiles`.
            finish: applied to the pixels of each batch of frames inside the loop (with tiles: of the whole), such as
                rounding to uint8: then no video of floats is ever there.
        """
        finish = finish or (lambda x: x)
        f = self.cfg.space_factor
        if tiles is None or (latents.shape[2] <= tiles.height // f and latents.shape[3] <= tiles.width // f):
            return self._all_frames(latents, finish)
        grid = tiles.grid(f, decode=True)
        cells = run_grid(self, latents, "_all_frames", grid.size, grid.stride)
        return finish(join_grid(cells, blend=grid.blend, keep=grid.keep))

    # ---- the transformer's latents

    def normalise(self, z: Float[Array, "B S h w C"]) -> Float[Array, "B S h w C"]:
        """Raw latents -> latents of about unit variance, as the transformer sees them."""
        return z * np.float32(self.cfg.scale)

    def denormalise(self, z: Float[Array, "B S h w C"]) -> Float[Array, "B S h w C"]:
        """The inverse of `normalise`, by the product with 1 / scale, as upstream's pipelines."""
        return z * np.float32(1 / self.cfg.scale)


def _first(x: Frames, size: int) -> int:
    """Frames of the first batch: a whole batch and what is left over, or all of a video shorter than a batch."""
    return min(x.shape[1], size + x.shape[1] % size)


def _check_frames(x: Frames, size: int, cache: Cache | None):
    n = x.shape[1]
    if n != size if cache else not 0 < n < 2 * size:
        raise ValueError(f"a batch of {n} frames: the first has 1 to {2 * size - 1}, each later one {size}")


def _rows(x: Frames, cfg: AutoencoderKLCogVideoXConfig) -> Frames:
    return shard(x, "batch", None, "rows", None, None, rules=cfg.rules)
