"""Wan's causal video autoencoders: 2.1 (latents of 16 channels, 4 x 8 x 8 pixels each) and 2.2 (48, 4 x 16 x 16).

B batch, T frames, H pixel rows, W pixel columns, C latent channels; S = 1 + (T - 1) / 4 latent frames, h w latent rows
and columns. The first latent frame is one frame of pixels, each later one four: a picture is a video of one frame.
Encoding and decoding go chunk by chunk (`encode_chunk`, `decode_chunk`) with an explicit cache; `encode` and `decode`
scan over the chunks in memory that does not grow with the length.
Source: diffusers models/autoencoders/autoencoder_kl_wan.py; arXiv 2503.20314, section 4.1.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.layers import silu
from jdit.nn.vae.autoencoder_kl import Posterior
from jdit.nn.vae.autoencoder_kl_wan_blocks import (
    AttentionBlock,
    Grow,
    Shrink,
    UnitNorm,
    from_patches,
    grow_repeat,
    shrink_average,
    to_patches,
)
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.nn.vae.blocks import pointwise
from jdit.nn.vae.causal import Cache, CausalConv, Frames, Stream, run_chunks
from jdit.nn.vae.causal_blocks import ResidualBlock
from jdit.nn.vae.tiling import Tiles, join_grid, run_grid
from jdit.sharding import shard

CHUNK = 4
"""Frames that the encoder takes at a time after the first, whatever the config, as upstream."""
Finish = Callable[[Float[Array, "B T H W 3"]], Array]


class Level(nnx.Module):
    """The blocks of one resolution, a change of resolution, and in `residual` networks the shortcut around them."""

    def __init__(self, level: tuple[int, int, int, int], layers: int, cfg: AutoencoderKLWanConfig, *, rngs: nnx.Rngs):
        self.cfg, self.level = cfg, level
        c_in, c_out, *_ = level
        self.resnets = nnx.List([_resnet(c_out if i else c_in, c_out, cfg, rngs) for i in range(layers)])

    def run(self, x: Frames, stream: Stream) -> Frames:
        for block in self.resnets:
            x = _rows(block(x, stream), self.cfg)
        return x


class Down(Level):
    """A level of the encoder."""

    def __init__(self, i: int, cfg: AutoencoderKLWanConfig, *, rngs: nnx.Rngs):
        level = cfg.encoder_levels[i]
        super().__init__(level, cfg.layers, cfg, rngs=rngs)
        _, c, time, space = level
        dtype = jnp.dtype(cfg.dtype)
        attends = not cfg.residual and 0.5**i in cfg.attention
        make = lambda: AttentionBlock(c, dtype=dtype, rngs=rngs)
        self.attentions = nnx.List([make() for _ in range(cfg.layers)]) if attends else None
        self.shrink = Shrink(c, temporal=time > 1, dtype=dtype, rngs=rngs) if space > 1 else None

    @jax.named_scope("down")
    def __call__(self, x: Frames, stream: Stream) -> Frames:
        y = x
        for i, block in enumerate(self.resnets):
            y = _rows(block(y, stream), self.cfg)
            y = y if self.attentions is None else _rows(self.attentions[i](y), self.cfg)
        y = y if self.shrink is None else _rows(self.shrink(y, stream), self.cfg)
        return y + shrink_average(x, *self.level[1:]) if self.cfg.residual else y


class Up(Level):
    """A level of the decoder."""

    def __init__(self, i: int, cfg: AutoencoderKLWanConfig, *, rngs: nnx.Rngs):
        level = cfg.decoder_levels[i]
        super().__init__(level, cfg.layers + 1, cfg, rngs=rngs)
        _, c, time, space = level
        out, dtype = c if cfg.residual else c // 2, jnp.dtype(cfg.dtype)
        self.grow = Grow(c, out, temporal=time > 1, dtype=dtype, rngs=rngs) if space > 1 else None

    @jax.named_scope("up")
    def __call__(self, x: Frames, stream: Stream) -> Frames:
        y = self.run(x, stream)
        if self.grow is None:
            return y
        y = _rows(self.grow(y, stream), self.cfg)
        return y + grow_repeat(x, *self.level[1:], stream.first) if self.cfg.residual else y


class Mid(nnx.Module):
    """The coarsest level: residual block, attention within each frame, residual block."""

    def __init__(self, c: int, cfg: AutoencoderKLWanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.resnets = nnx.List([_resnet(c, c, cfg, rngs) for _ in range(2)])
        self.attention = AttentionBlock(c, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    @jax.named_scope("mid")
    def __call__(self, x: Frames, stream: Stream) -> Frames:
        x = _rows(self.resnets[0](x, stream), self.cfg)
        x = _rows(self.attention(x), self.cfg)
        return _rows(self.resnets[1](x, stream), self.cfg)


class Encoder(nnx.Module):
    """A chunk of (patched) pixels to moments."""

    def __init__(self, cfg: AutoencoderKLWanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, levels = jnp.dtype(cfg.dtype), cfg.encoder_levels
        self.conv_in = CausalConv(cfg.in_channels, levels[0][0], dtype=dtype, rngs=rngs)
        self.down = nnx.List([Down(i, cfg, rngs=rngs) for i in range(len(levels))])
        self.mid = Mid(levels[-1][1], cfg, rngs=rngs)
        self.norm_out = UnitNorm(levels[-1][1], dtype=dtype)
        self.conv_out = CausalConv(levels[-1][1], 2 * cfg.latent_channels, dtype=dtype, rngs=rngs)

    @jax.named_scope("encoder")
    def __call__(self, x: Frames, stream: Stream) -> Frames:
        x = _rows(self.conv_in(_rows(x, self.cfg), stream), self.cfg)
        for level in self.down:
            x = level(x, stream)
        x = self.mid(x, stream)
        return self.conv_out(silu(self.norm_out(x)), stream)


class Decoder(nnx.Module):
    """A chunk of latents to (patched) pixels."""

    def __init__(self, cfg: AutoencoderKLWanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, levels = jnp.dtype(cfg.dtype), cfg.decoder_levels
        self.conv_in = CausalConv(cfg.latent_channels, levels[0][0], dtype=dtype, rngs=rngs)
        self.mid = Mid(levels[0][0], cfg, rngs=rngs)
        self.up = nnx.List([Up(i, cfg, rngs=rngs) for i in range(len(levels))])
        self.norm_out = UnitNorm(levels[-1][1], dtype=dtype)
        self.conv_out = CausalConv(levels[-1][1], cfg.out_channels, dtype=dtype, rngs=rngs)

    @jax.named_scope("decoder")
    def __call__(self, z: Frames, stream: Stream) -> Frames:
        x = self.mid(_rows(self.conv_in(_rows(z, self.cfg), stream), self.cfg), stream)
        for level in self.up:
            x = level(x, stream)
        return _rows(self.conv_out(silu(self.norm_out(x)), stream), self.cfg)


class AutoencoderKLWan(nnx.Module):
    """Encoder and decoder with their 1x1 convolutions. Inputs of any float dtype, results in float32."""

    def __init__(self, cfg: AutoencoderKLWanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, c = jnp.dtype(cfg.dtype), cfg.latent_channels
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.quant_conv = pointwise(2 * c, 2 * c, dtype=dtype, rngs=rngs)
        self.post_quant_conv = pointwise(c, c, dtype=dtype, rngs=rngs)

    # ---- a chunk at a time

    def encode_chunk(
        self, pixels: Float[Array, "B T H W 3"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B S h w 2*C"], Cache]:
        """Moments of one chunk, and what the next one needs: the first frame with cache None, then 4 frames each time.

        Raises:
            ValueError: another number of frames, a size that does not fit, or a cache of another network.
        """
        self._check(pixels)
        return self._encode(to_patches(pixels, self.cfg.patch), cache)

    def decode_chunk(
        self, latents: Float[Array, "B S h w C"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T H W 3"], Cache]:
        """Pixels in [-1, 1] of one chunk of raw latents, and what the next one needs.

        The first latent frame comes alone with cache None; then any number at a time (`decode` takes one).

        Raises:
            ValueError: more than one frame in the first chunk, or a cache of another network.
        """
        x, cache = self._decode(latents, cache)
        return self._pixels(x), cache

    def _encode(self, x: Frames, cache: Cache | None) -> tuple[Frames, Cache]:
        want = CHUNK if cache else 1
        if x.shape[1] != want:
            raise ValueError(f"a chunk of {x.shape[1]} frames: the first has 1, each later one {CHUNK}")
        if cache and CHUNK % self.cfg.frame_factors[0]:
            raise ValueError(f"temporal={self.cfg.temporal}: chunks of {CHUNK} frames can be halved twice at most")
        stream = Stream(cache)
        moments = self.quant_conv(self.encoder(x.astype(self.cfg.dtype), stream))
        return moments.astype(jnp.float32), stream.cache()

    def _decode(self, z: Frames, cache: Cache | None) -> tuple[Frames, Cache]:
        if cache is None and z.shape[1] != 1:
            raise ValueError(f"a first chunk of {z.shape[1]} latent frames: the first frame is decoded alone")
        stream = Stream(cache)
        x = self.decoder(self.post_quant_conv(z.astype(self.cfg.dtype)), stream)
        return x.astype(jnp.float32), stream.cache()

    def _pixels(self, x: Frames) -> Float[Array, "B T H W 3"]:
        return jnp.clip(from_patches(x, self.cfg.patch), -1.0, 1.0)

    def _check(self, pixels: Frames):
        """A size that can be encoded: at least a latent pixel, and whole blocks where the network needs them."""
        f, patch = self.cfg.pixel_factor, self.cfg.patch or 1
        size, need = pixels.shape[2:4], f if self.cfg.residual else patch
        if min(size) < f or any(n % need for n in size):
            raise ValueError(f"frames of {size[0]}x{size[1]} pixels: sides are at least {f} and multiples of {need}")

    # ---- whole videos

    def _all_moments(self, x: Frames) -> Frames:
        return run_chunks(self._encode, x, size=CHUNK, out=CHUNK // min(CHUNK, self.cfg.frame_factors[0]))

    def _all_frames(self, z: Frames) -> Frames:
        return run_chunks(self._decode, z, size=1, out=self.cfg.frame_factors[1])

    def moments(self, pixels: Float[Array, "B T H W 3"], *, tiles: Tiles | None = None) -> Float[Array, "B S h w 2*C"]:
        """Mean and log variance side by side, the latter not yet held in bounds; see `encode`."""
        self._check(pixels)
        x = to_patches(pixels, self.cfg.patch)
        if tiles is None or all(n <= m for n, m in zip(pixels.shape[2:4], tiles.size)):
            return self._all_moments(x)
        # upstream counts the tiles of the patched picture in pixels, and its compression without the patches
        f = self._factor() // (self.cfg.patch or 1)
        latent, smallest = tiles.over(f), 2 ** (len(self.cfg.multipliers) - 1)
        rests = [min(n - i, size) for n, size, step in zip(x.shape[2:4], tiles.size, tiles.stride)
                 for i in range(0, n, step)]  # fmt: skip
        if bad := [n for n in rests if n < smallest or (self.cfg.residual and n % smallest)]:
            raise ValueError(f"{tiles} leave tiles of {bad} pixels a side: multiples of {smallest} are needed")
        grid = run_grid(self, x, "_all_moments", tiles.size, tiles.stride)
        joined = join_grid(grid, blend=latent.overlap, keep=latent.stride)
        return joined[:, :, : x.shape[2] // f, : x.shape[3] // f]

    def encode(self, pixels: Float[Array, "B T H W 3"], *, tiles: Tiles | None = None) -> Posterior:
        """Pixels in [-1, 1] -> posterior over raw latents (its `mode` is what pipelines condition on).

        Frames beyond 1 + 4 n, and rows and columns beyond a multiple of the compression, are cut, as upstream.

        Args:
            tiles: encode by tiles where the video is larger than one.

        Raises:
            ValueError: frames smaller than a latent pixel, or with `residual` or `patch` no multiple of it; tiles that
                leave such frames; more than two temporal halvings with more than one frame.
        """
        return Posterior.of(self.moments(pixels, tiles=tiles))

    def decode(
        self, latents: Float[Array, "B S h w C"], *, tiles: Tiles | None = None, finish: Finish | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Raw latents (see `denormalise`) -> pixels in [-1, 1].

        Args:
            tiles: decode by tiles where the video is larger than one.
            finish: applied to the pixels of each chunk inside the loop (with tiles: of the whole), such as rounding to
                uint8: then no video of floats is ever there.
        """

        def done(x: Frames) -> Array:
            return self._pixels(x) if finish is None else finish(self._pixels(x))

        def step(z: Frames, cache: Cache | None) -> tuple[Array, Cache]:
            x, cache = self._decode(z, cache)
            return done(x), cache

        if tiles is None or all(n <= m for n, m in zip(latents.shape[2:4], tiles.over(self._factor()).size)):
            return run_chunks(step, latents, size=1, out=self.cfg.frame_factors[1])
        f, p = self._factor(), self.cfg.patch or 1
        latent, patched = tiles.over(f), tiles.over(p)
        grid = run_grid(self, latents, "_all_frames", latent.size, latent.stride)
        joined = join_grid(grid, blend=patched.overlap, keep=patched.stride)
        return done(joined[:, :, : latents.shape[2] * f // p, : latents.shape[3] * f // p])

    def _factor(self) -> int:
        if self.cfg.space_factor is None:
            raise ValueError("space_factor (scale_factor_spatial) is None: tiles need it")
        return self.cfg.space_factor

    # ---- the transformer's latents

    def normalise(self, z: Float[Array, "B S h w C"]) -> Float[Array, "B S h w C"]:
        """Raw latents -> latents of about unit variance, as the transformer sees them."""
        mean, inverse = self._statistics()
        return (z - mean) * inverse

    def denormalise(self, z: Float[Array, "B S h w C"]) -> Float[Array, "B S h w C"]:
        """The inverse of `normalise`; divides by 1 / std in float32, as upstream's pipelines."""
        mean, inverse = self._statistics()
        return z / inverse + mean

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        cfg = self.cfg
        if not len(cfg.mean) == len(cfg.std) == cfg.latent_channels:
            raise ValueError(
                f"mean has {len(cfg.mean)} and std {len(cfg.std)} values for {cfg.latent_channels} latent channels"
            )
        return np.array(cfg.mean, np.float32), np.float32(1) / np.array(cfg.std, np.float32)


def _resnet(c_in: int, c_out: int, cfg: AutoencoderKLWanConfig, rngs: nnx.Rngs) -> ResidualBlock:
    dtype = jnp.dtype(cfg.dtype)
    return ResidualBlock(c_in, c_out, norm=functools.partial(UnitNorm, dtype=dtype), dtype=dtype, rngs=rngs)


def _rows(x: Frames, cfg: AutoencoderKLWanConfig) -> Frames:
    return shard(x, "batch", None, "rows", None, None, rules=cfg.rules)
