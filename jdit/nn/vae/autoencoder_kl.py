"""The image autoencoder of Stable Diffusion (3, and its kin): pictures to a Gaussian over latents and back.

B batch, H pixel rows, W pixel columns, C latent channels; h = H/f, w = W/f with f = 2**(levels - 1).
Source: diffusers models/autoencoders/autoencoder_kl.py and vae.py; arXiv 2112.10752, arXiv 2403.03206.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jdit.nn.layers import conv
from jdit.nn.vae.blocks import AttentionBlock, Downsample, GroupNorm, ResnetBlock, Upsample, pointwise
from jdit.sharding import Rules, shard

ACTIVATIONS = {"silu": nnx.silu}


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Architecture; the defaults are Stable Diffusion 3's.

    Attributes:
        channels: width of each level, finest first; each further level halves the resolution.
        layers: residual blocks a level in the encoder (the decoder has one more).
        groups: groups of each group norm.
        scale, shift: latents are handed to the transformer as (z - shift) * scale.
        quant_conv, post_quant_conv: 1x1 convolutions after the encoder and before the decoder.
        mid_attention: pixels attend to pixels at the coarsest level.
        sample_size: pixels that a side of a tile has, see jdit.nn.vae.tiling.
        force_upcast: upstream's wish for float32, which the pipelines of SD3 and Flux do not heed; `dtype` decides.

    Raises:
        ValueError: the values contradict one another; the message has all findings.
    """

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 16
    groups: int = 32
    scale: float = 1.5305
    shift: float = 0.0609
    quant_conv: bool = False
    post_quant_conv: bool = False
    mid_attention: bool = True
    sample_size: int = 1024
    act: str = "silu"
    eps: float = 1e-6
    force_upcast: bool = True
    dtype: str = "float32"
    rules: Rules = dataclasses.field(default_factory=Rules)

    def __post_init__(self):
        wrong = []
        if not self.channels:
            wrong.append("channels is empty")
        if bad := [c for c in self.channels if c % self.groups]:
            wrong.append(f"channels {bad} are not divisible into {self.groups} norm groups")
        if self.act not in ACTIVATIONS:
            wrong.append(f"act {self.act!r} is not among {list(ACTIVATIONS)}")
        if self.scale == 0:
            wrong.append("scale is 0")
        if wrong:
            raise ValueError("autoencoder config: " + "; ".join(wrong))

    @property
    def factor(self) -> int:
        """Pixels a latent pixel has along each side."""
        return 2 ** (len(self.channels) - 1)


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, float32."""

    mean: Float[Array, "B h w C"]
    logvar: Float[Array, "B h w C"]

    @classmethod
    def of(cls, moments: Float[Array, "B h w 2*C"]) -> "Posterior":
        """From mean and log variance side by side; the log variance is held in [-30, 20]."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B h w C"]:
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, jnp.float32)

    def mode(self) -> Float[Array, "B h w C"]:
        return self.mean

    def kl(self) -> Float[Array, "B"]:
        """Divergence from the standard normal, in nats, summed over a picture's latents."""
        nats = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * nats.sum((1, 2, 3))


class Level(nnx.Module):
    """The residual blocks of one resolution; the encoder's and decoder's classes add a change of resolution."""

    def __init__(self, c_in: int, c_out: int, layers: int, cfg: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.resnets = nnx.List([resnet(cfg, c_out if i else c_in, c_out, rngs) for i in range(layers)])

    def run(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        for block in self.resnets:
            x = _rows(block(x), self.cfg)
        return x


class Down(Level):
    """A level of the encoder: residual blocks, then half the resolution unless it is the last."""

    def __init__(self, c_in: int, c_out: int, cfg: AutoencoderKLConfig, *, last: bool, rngs: nnx.Rngs):
        super().__init__(c_in, c_out, cfg.layers, cfg, rngs=rngs)
        self.downsample = None if last else Downsample(c_out, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    @jax.named_scope("down")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Y X D"]:
        x = self.run(x)
        return x if self.downsample is None else _rows(self.downsample(x), self.cfg)


class Up(Level):
    """A level of the decoder: one residual block more than the encoder's, then twice the resolution unless last."""

    def __init__(self, c_in: int, c_out: int, cfg: AutoencoderKLConfig, *, last: bool, rngs: nnx.Rngs):
        super().__init__(c_in, c_out, cfg.layers + 1, cfg, rngs=rngs)
        self.upsample = None if last else Upsample(c_out, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    @jax.named_scope("up")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Y X D"]:
        x = self.run(x)
        return x if self.upsample is None else _rows(self.upsample(x), self.cfg)


class Mid(nnx.Module):
    """The coarsest level: residual block, attention over pixels (optional), residual block."""

    def __init__(self, c: int, cfg: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.resnets = nnx.List([resnet(cfg, c, c, rngs) for _ in range(2)])
        make = functools.partial(AttentionBlock, groups=cfg.groups, eps=cfg.eps, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        self.attention = make(c) if cfg.mid_attention else None

    @jax.named_scope("mid")
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        x = _rows(self.resnets[0](x), self.cfg)
        if self.attention is not None:
            x = _rows(self.attention(x), self.cfg)
        return _rows(self.resnets[1](x), self.cfg)


class Encoder(nnx.Module):
    """Pixels to moments: levels from fine to coarse, the middle, a convolution to 2 C channels."""

    def __init__(self, cfg: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, widths, n = jnp.dtype(cfg.dtype), cfg.channels, len(cfg.channels)
        self.conv_in = conv(cfg.in_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.down = nnx.List(
            [Down(widths[max(i - 1, 0)], widths[i], cfg, last=i == n - 1, rngs=rngs) for i in range(n)]
        )
        self.mid = Mid(widths[-1], cfg, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=cfg.groups, eps=cfg.eps, dtype=dtype)
        self.conv_out = conv(widths[-1], 2 * cfg.latent_channels, 3, dtype=dtype, rngs=rngs)

    @jax.named_scope("encoder")
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2*C"]:
        x = _rows(self.conv_in(x), self.cfg)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents to pixels: a convolution, the middle, levels from coarse to fine, a convolution to 3 channels."""

    def __init__(self, cfg: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, widths, n = jnp.dtype(cfg.dtype), cfg.channels[::-1], len(cfg.channels)
        self.conv_in = conv(cfg.latent_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.mid = Mid(widths[0], cfg, rngs=rngs)
        self.up = nnx.List([Up(widths[max(i - 1, 0)], widths[i], cfg, last=i == n - 1, rngs=rngs) for i in range(n)])
        self.norm_out = GroupNorm(widths[-1], groups=cfg.groups, eps=cfg.eps, dtype=dtype)
        self.conv_out = conv(widths[-1], cfg.out_channels, 3, dtype=dtype, rngs=rngs)

    @jax.named_scope("decoder")
    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        x = self.mid(_rows(self.conv_in(z), self.cfg))
        for level in self.up:
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder with their 1x1 convolutions. Inputs of any float dtype, results in float32."""

    def __init__(self, cfg: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype, c = jnp.dtype(cfg.dtype), cfg.latent_channels
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.quant_conv = pointwise(2 * c, 2 * c, dtype=dtype, rngs=rngs) if cfg.quant_conv else None
        self.post_quant_conv = pointwise(c, c, dtype=dtype, rngs=rngs) if cfg.post_quant_conv else None

    def moments(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2*C"]:
        """Mean and log variance side by side, the latter not yet held in bounds.

        Raises:
            ValueError: a picture smaller than one latent pixel.
        """
        f = self.cfg.factor
        if min(pixels.shape[1:3]) < f:
            raise ValueError(f"a picture of {pixels.shape[1]}x{pixels.shape[2]} pixels is below the smallest, {f}x{f}")
        x = self.encoder(_rows(pixels, self.cfg))
        return (x if self.quant_conv is None else self.quant_conv(x)).astype(jnp.float32)

    def encode(self, pixels: Float[Array, "B H W 3"]) -> Posterior:
        """Pixels in [-1, 1] -> posterior over raw latents; rows and columns beyond a multiple of f are cut."""
        return Posterior.of(self.moments(pixels))

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Raw latents (see `denormalise`) -> pixels, nominally in [-1, 1], not clipped."""
        z = _rows(latents, self.cfg)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def normalise(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Raw latents -> latents of about unit variance, as the transformer sees them."""
        return (z - self.cfg.shift) * self.cfg.scale

    def denormalise(self, z: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The inverse of `normalise`."""
        return z / self.cfg.scale + self.cfg.shift


def resnet(cfg: AutoencoderKLConfig, c_in: int, c_out: int, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(
        c_in, c_out, groups=cfg.groups, eps=cfg.eps, dtype=jnp.dtype(cfg.dtype), rngs=rngs, act=ACTIVATIONS[cfg.act]
    )


def _rows(x: Float[Array, "B H W C"], cfg: AutoencoderKLConfig) -> Float[Array, "B H W C"]:
    return shard(x, "batch", "rows", None, None, rules=cfg.rules)
