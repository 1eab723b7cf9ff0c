"""HunyuanVideo's causal video autoencoder: latents of 16 channels, 4 x 8 x 8 pixels each.

B batch, T frames, H pixel rows, W pixel columns, C latent channels; S = 1 + (T - 1) / 4 latent frames, h = H / 8 and
w = W / 8 rounded up. The first latent frame is one frame of pixels, each later one four.

The norms' statistics and the attention of the coarsest level are over all frames, so that a long video goes through the
network by tiles of frames (see `FrameTiles`), always as upstream, and each of these, if wanted, by tiles of rows and
columns. Tiles of frames run in a scan, in memory that grows with the length only by the result.
Source: diffusers models/autoencoders/autoencoder_kl_hunyuan_video.py; arXiv 2412.03603, section 4.1.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.attention import attention
from jdit.nn.layers import silu
from jdit.nn.vae.autoencoder_kl import Posterior
from jdit.nn.vae.autoencoder_kl_hunyuan_video_config import ACTIVATIONS, EPS, AutoencoderKLHunyuanVideoConfig, Level
from jdit.nn.vae.blocks import AttentionBlock, GroupNorm, pointwise
from jdit.nn.vae.causal import CausalConv, Frames
from jdit.nn.vae.causal_blocks import ResidualBlock, repeat_to
from jdit.nn.vae.tiling import FrameTiles, Tiles, join_grid, run_frames, run_grid
from jdit.sharding import shard

Finish = Callable[[Float[Array, "B T H W 3"]], Array]
FRAME_TILES = FrameTiles()


class CausalAttentionBlock(AttentionBlock):
    """x + out(attention(norm(x))): every pixel attends to those of its own and of earlier frames, with one head."""

    @jax.named_scope("attention")
    def __call__(self, x: Frames) -> Frames:
        b, t, h, w, c = x.shape
        tokens = self.norm(x).reshape(b, t * h * w, 1, c)
        k, v = self.k(tokens), self.v(tokens)
        queries = self.q(tokens).reshape(b, t, h * w, 1, c).swapaxes(0, 1)

        def one(frame):
            q, seen = frame
            return attention(q, k, v, kv_lengths=jnp.full(b, seen * h * w))

        y = jax.lax.map(one, (queries, jnp.arange(1, t + 1)))
        return x + self.out(y.swapaxes(0, 1).reshape(x.shape))


class Mid(nnx.Module):
    """The coarsest level: residual block, attention (optional), residual block."""

    def __init__(self, c: int, cfg: AutoencoderKLHunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.resnets = nnx.List([_resnet(c, c, cfg, rngs) for _ in range(2)])
        make = partial(CausalAttentionBlock, groups=cfg.groups, eps=EPS, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        self.attention = make(c) if cfg.mid_attention else None

    @jax.named_scope("mid")
    def __call__(self, x: Frames) -> Frames:
        x = _rows(self.resnets[0](x), self.cfg)
        x = x if self.attention is None else _rows(self.attention(x), self.cfg)
        return _rows(self.resnets[1](x), self.cfg)


class Down(nnx.Module):
    """A level of the encoder: residual blocks, then a convolution with strides where the resolution changes."""

    def __init__(self, level: Level, cfg: AutoencoderKLHunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        c, c_out, time, space = level
        self.resnets = nnx.List([_resnet(c_out if i else c, c_out, cfg, rngs) for i in range(cfg.layers)])
        self.shrink = _conv(c_out, c_out, cfg, rngs, stride=time, step=space) if time * space > 1 else None

    @jax.named_scope("down")
    def __call__(self, x: Frames) -> Float[Array, "B S Y X D"]:
        for block in self.resnets:
            x = _rows(block(x), self.cfg)
        return x if self.shrink is None else _rows(self.shrink(x), self.cfg)


class Up(nnx.Module):
    """A level of the decoder: residual blocks, then pixels repeated (of frames the first stays single) and convolved
    where the resolution changes."""

    def __init__(self, level: Level, cfg: AutoencoderKLHunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg, self.level = cfg, level
        c, c_out, time, space = level
        self.resnets = nnx.List([_resnet(c_out if i else c, c_out, cfg, rngs) for i in range(cfg.layers + 1)])
        self.grow = _conv(c_out, c_out, cfg, rngs) if time * space > 1 else None

    @jax.named_scope("up")
    def __call__(self, x: Frames) -> Float[Array, "B S Y X D"]:
        for block in self.resnets:
            x = _rows(block(x), self.cfg)
        if self.grow is None:
            return x
        (_, t, h, w, _), level = x.shape, self.level
        x = repeat_to(x, (1 + (t - 1) * level.time, h * level.space, w * level.space))
        return _rows(self.grow(_rows(x, self.cfg)), self.cfg)


class Encoder(nnx.Module):
    """Pixels to moments: levels from fine to coarse, the middle, a convolution to 2 C channels."""

    def __init__(self, cfg: AutoencoderKLHunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg, c = cfg, cfg.channels
        self.conv_in = _conv(cfg.in_channels, c[0], cfg, rngs)
        self.down = nnx.List([Down(level, cfg, rngs=rngs) for level in cfg.encoder_levels])
        self.mid = Mid(c[-1], cfg, rngs=rngs)
        self.norm_out = _norm(c[-1], cfg)
        self.conv_out = _conv(c[-1], 2 * cfg.latent_channels, cfg, rngs)

    @jax.named_scope("encoder")
    def __call__(self, x: Frames) -> Frames:
        x = _rows(self.conv_in(_rows(x, self.cfg)), self.cfg)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents to pixels: a convolution, the middle, levels from coarse to fine, a convolution."""

    def __init__(self, cfg: AutoencoderKLHunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg, c = cfg, cfg.channels
        self.conv_in = _conv(cfg.latent_channels, c[-1], cfg, rngs)
        self.mid = Mid(c[-1], cfg, rngs=rngs)
        self.up = nnx.List([Up(level, cfg, rngs=rngs) for level in cfg.decoder_levels])
        self.norm_out = _norm(c[0], cfg)
        self.conv_out = _conv(c[0], cfg.out_channels, cfg, rngs)

    @jax.named_scope("decoder")
    def __call__(self, z: Frames) -> Frames:
        x = self.mid(_rows(self.conv_in(_rows(z, self.cfg)), self.cfg))
        for level in self.up:
            x = level(x)
        return _rows(self.conv_out(silu(self.norm_out(x))), self.cfg)


class AutoencoderKLHunyuanVideo(nnx.Module):
    """Encoder and decoder with their 1x1 convolutions. Inputs of any float dtype, results in float32."""

    def __init__(self, cfg: AutoencoderKLHunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, c = jnp.dtype(cfg.dtype), cfg.latent_channels
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.quant_conv = pointwise(2 * c, 2 * c, dtype=dtype, rngs=rngs)
        self.post_quant_conv = pointwise(c, c, dtype=dtype, rngs=rngs)

    # ---- frames that go through the network together

    def _encode(self, x: Frames) -> Frames:
        return self.quant_conv(self.encoder(x.astype(self.cfg.dtype))).astype(jnp.float32)

    def _decode(self, z: Frames) -> Frames:
        return self.decoder(self.post_quant_conv(z.astype(self.cfg.dtype))).astype(jnp.float32)

    def _encode_tiled(self, x: Frames, *, tiles: Tiles | None) -> Frames:
        f = self.cfg.space_factor
        if tiles is None or all(n <= m for n, m in zip(x.shape[2:4], tiles.size)):
            return self._encode(x)
        latent = tiles.over(f)
        grid = run_grid(self, x, "_encode", tiles.size, tiles.stride)
        joined = join_grid(grid, blend=latent.overlap, keep=latent.stride)
        return joined[:, :, : x.shape[2] // f, : x.shape[3] // f]

    def _decode_tiled(self, z: Frames, *, tiles: Tiles | None) -> Frames:
        f = self.cfg.space_factor
        if tiles is None or all(n <= m for n, m in zip(z.shape[2:4], tiles.over(f).size)):
            return self._decode(z)
        latent = tiles.over(f)
        grid = run_grid(self, z, "_decode", latent.size, latent.stride)
        joined = join_grid(grid, blend=tiles.overlap, keep=tiles.stride)
        return joined[:, :, : z.shape[2] * f, : z.shape[3] * f]

    # ---- whole videos

    def moments(
        self, pixels: Float[Array, "B T H W 3"], *, tiles: Tiles | None = None,
        frame_tiles: FrameTiles | None = FRAME_TILES,
    ) -> Float[Array, "B S h w 2*C"]:  # fmt: skip
        """Mean and log variance side by side, the latter not yet held in bounds; see `encode`."""
        run = partial(self._encode_tiled, tiles=tiles)
        if frame_tiles is None:
            return run(pixels)
        latent = frame_tiles.over(self.cfg.time_factor)
        if pixels.shape[1] <= frame_tiles.size:
            return run(pixels)
        return run_frames(run, pixels, tiles=frame_tiles, result=latent, count=self.cfg.latent_frames)

    def encode(
        self, pixels: Float[Array, "B T H W 3"], *, tiles: Tiles | None = None,
        frame_tiles: FrameTiles | None = FRAME_TILES,
    ) -> Posterior:  # fmt: skip
        """Pixels in [-1, 1] -> posterior over raw latents (its `mode` is what pipelines condition on).

        Frames beyond 1 + 4 n make no latent frame. Rows and columns beyond a multiple of the compression make a latent
        pixel of their own; with tiles of rows and columns they are cut, as upstream.

        Args:
            tiles: encode by tiles of rows and columns where the video is larger than one; `Tiles()` is what upstream
                takes once tiling is enabled.
            frame_tiles: encode by tiles of frames where the video is longer than one, which upstream always does. None:
                all frames at once, which are other numbers.

        Raises:
            ValueError: tiles of less than a latent pixel, or of no whole number of latent frames.
        """
        return Posterior.of(self.moments(pixels, tiles=tiles, frame_tiles=frame_tiles))

    def decode(
        self, latents: Float[Array, "B S h w C"], *, tiles: Tiles | None = None,
        frame_tiles: FrameTiles | None = FRAME_TILES, finish: Finish | None = None,
    ) -> Float[Array, "B T H W 3"]:  # fmt: skip
        """Raw latents (see `denormalise`) -> pixels, nominally in [-1, 1], not clipped, as upstream.

        Args:
            tiles, frame_tiles: as in `encode`, in pixels.
            finish: applied to the pixels of each tile of frames inside the loop, such as rounding to uint8: then no
                long video of floats is ever there.

        Raises:
            ValueError: as `encode`.
        """
        run, finish = partial(self._decode_tiled, tiles=tiles), finish or (lambda x: x)
        if frame_tiles is None:
            return finish(run(latents))
        latent = frame_tiles.over(self.cfg.time_factor)
        if latents.shape[1] <= latent.size:
            return finish(run(latents))
        return run_frames(run, latents, tiles=latent, result=frame_tiles, count=self.cfg.frames, finish=finish)

    # ---- the transformer's latents

    def normalise(self, z: Float[Array, "B S h w C"]) -> Float[Array, "B S h w C"]:
        """Raw latents -> latents of about unit variance, as the transformer sees them."""
        return z * np.float32(self.cfg.scale)

    def denormalise(self, z: Float[Array, "B S h w C"]) -> Float[Array, "B S h w C"]:
        """The inverse of `normalise`."""
        return z / np.float32(self.cfg.scale)


def _conv(
    c_in: int, c_out: int, cfg: AutoencoderKLHunyuanVideoConfig, rngs: nnx.Rngs, *, stride: int = 1, step: int = 1
) -> CausalConv:
    """A causal convolution beyond whose edges the outermost frame, rows and columns are repeated."""
    return CausalConv(
        c_in, c_out, stride=stride, step=step, padding="replicate", edges="replicate", dtype=jnp.dtype(cfg.dtype),
        rngs=rngs,
    )  # fmt: skip


def _norm(c: int, cfg: AutoencoderKLHunyuanVideoConfig) -> GroupNorm:
    return GroupNorm(c, groups=cfg.groups, eps=EPS, dtype=jnp.dtype(cfg.dtype))


def _resnet(c_in: int, c_out: int, cfg: AutoencoderKLHunyuanVideoConfig, rngs: nnx.Rngs) -> ResidualBlock:
    return ResidualBlock(
        c_in, c_out, norm=partial(_norm, cfg=cfg), act=ACTIVATIONS[cfg.act], padding="replicate", edges="replicate",
        dtype=jnp.dtype(cfg.dtype), rngs=rngs,
    )  # fmt: skip


def _rows(x: Frames, cfg: AutoencoderKLHunyuanVideoConfig) -> Frames:
    return shard(x, "batch", None, "rows", None, None, rules=cfg.rules)
