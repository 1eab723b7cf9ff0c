"""A face's motion: one vector a frame, then tokens a latent frame (Wan-Animate, arXiv 2509.14055).

Source: upstream transformer_wan_animate.py; the motion encoder is that of LIA (arXiv 2203.09043). Legend: B batch,
F video frames, T latent frames, H W rows and columns of pixels, C channels, M directions of motion, E the width of
their space, n tokens, D the transformer's width.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn import layers
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.sharding import shard

SLOPE = 0.2
BLUR = np.array([1, 3, 3, 1], np.float32) / 8
LINEARS = 5
"""Dense layers from appearance to motion."""
EPS = 1e-6

Pixels = Float[Array, "B H W C"]


def leaky_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Leaky ReLU times sqrt(2), which keeps the variance (arXiv 1912.04958), in float32 inside."""
    return (nnx.leaky_relu(x.astype(jnp.float32), SLOPE) * 2**0.5).astype(x.dtype)


def equalised(layer: nnx.Conv | nnx.Linear, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A layer whose kernel counts as kernel / sqrt(fan-in): an equalised learning rate (arXiv 1710.10196)."""
    return layer(x * math.prod(layer.kernel.get_value().shape[:-1]) ** -0.5)


def blur(x: Pixels, pad: int) -> Pixels:
    """The binomial filter of four taps along rows and columns, zeros outside: H + 2 pad - 3 rows are left."""
    h, w = (n + 2 * pad - len(BLUR) + 1 for n in x.shape[1:3])
    out = jnp.pad(x.astype(jnp.float32), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = sum((tap * out[:, i : i + h] for i, tap in enumerate(BLUR)), jnp.float32(0))
    out = sum((tap * out[:, :, i : i + w] for i, tap in enumerate(BLUR)), jnp.float32(0))
    return out.astype(x.dtype)


class MotionBlock(nnx.Module):
    """Half the rows and columns: two convolutions beside a straight one, each smoothed before it leaves pixels out."""

    def __init__(self, c_in: int, c_out: int, *, dtype, rngs: nnx.Rngs):
        self.conv1 = layers.conv(c_in, c_in, 3, dtype=dtype, rngs=rngs)
        self.conv2 = layers.conv(c_in, c_out, 3, stride=2, padding="VALID", dtype=dtype, rngs=rngs)
        self.skip = layers.conv(c_in, c_out, 1, stride=2, padding="VALID", bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Pixels) -> Float[Array, "B H/2 W/2 D"]:
        h = leaky_relu(equalised(self.conv1, x))
        h = leaky_relu(equalised(self.conv2, blur(h, 2)))
        return (h + equalised(self.skip, blur(x, 1))) * 0.5**0.5


class MotionEncoder(nnx.Module):
    """Faces to motion vectors: how far along each of M orthonormal directions, summed up in a space of width E."""

    def __init__(self, cfg: WanAnimateConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        c, d, m = cfg.face_channels, cfg.motion_features, cfg.motion_directions
        dense = lambda d_out, r: layers.linear(d, d_out, (None, None), dtype=cfg.dtype, rngs=r)
        self.conv_in = layers.conv(3, c[0], 1, dtype=cfg.dtype, rngs=rngs)
        self.blocks = nnx.List([MotionBlock(a, b, dtype=cfg.dtype, rngs=rngs) for a, b in itertools.pairwise(c)])
        self.conv_out = layers.conv(c[-1], d, 4, padding="VALID", bias=False, dtype=cfg.dtype, rngs=rngs)
        self.linears = layers.stack(lambda r: dense(d, r), LINEARS - 1, rngs)
        self.linear_out = dense(m, rngs)
        # float32 whatever the compute dtype: its columns are made orthonormal
        self.basis = nnx.Param(jax.random.normal(rngs.params(), (cfg.motion_width, m)), axes=(None, None))

    def directions(self) -> Float[Array, "E M"]:
        """Orthonormal directions of motion. They depend on weights only: made once, not once a chunk of frames.

        The signs are the Householder reflections' (LAPACK's), which motion depends on.
        """
        return jnp.linalg.qr(self.basis.get_value() + 1e-8)[0]

    def __call__(self, faces: Pixels, directions: Float[Array, "E M"]) -> Float[Array, "B E"]:
        """Motion of faces in [-1, 1] of the config's size."""
        x = leaky_relu(equalised(self.conv_in, faces.astype(self.cfg.dtype)))
        for block in self.blocks:
            x = block(x)
        x = equalised(self.conv_out, x)[:, 0, 0]
        x = layers.scan_blocks(self.linears, x, call=lambda dense, x, _: equalised(dense, x))
        x = equalised(self.linear_out, x)
        return jnp.matmul(x.astype(jnp.float32), directions.T, precision="highest").astype(x.dtype)

    def frames(self, faces: Float[Array, "B F H W 3"]) -> Float[Array, "B F E"]:
        """Motion of every frame, some frames after the others: memory does not grow with the number of frames."""
        f, directions = faces.shape[1], self.directions()
        size = min(self.cfg.face_chunk, f)
        whole = jnp.pad(faces, ((0, 0), (0, -f % size), (0, 0), (0, 0), (0, 0)))

        def some(chunk: Float[Array, "B f H W 3"]) -> Float[Array, "B f E"]:
            chunk = shard(chunk, "batch", "seq", None, None, None, rules=self.cfg.rules)
            return self(chunk.reshape(-1, *chunk.shape[2:]), directions).reshape(*chunk.shape[:2], -1)

        out = jax.lax.map(some, rearrange(whole, "b (n f) h w c -> n b f h w c", f=size))
        return rearrange(out, "n b f e -> b (n f) e")[:, :f]


class FaceEncoder(nnx.Module):
    """Motion to tokens: convolutions over time that look back only, two of which halve it, and one learned token."""

    def __init__(self, cfg: WanAnimateConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.face_width
        conv = lambda c_in, c_out, stride: layers.conv(
            c_in, c_out, 3, stride=stride, padding="VALID", rank=1, dtype=cfg.dtype, rngs=rngs
        )
        self.conv1 = conv(cfg.motion_width, d * cfg.face_tokens, 1)
        self.conv2, self.conv3 = conv(d, d, 2), conv(d, d, 2)
        self.out = layers.linear(d, cfg.width, (None, "embed"), dtype=cfg.dtype, rngs=rngs)
        self.token = nnx.Param(jnp.zeros(cfg.width, cfg.dtype), axes=(None,))

    def __call__(self, motion: Float[Array, "B F E"]) -> Float[Array, "B T n D"]:
        past = lambda conv, x: conv(jnp.pad(x, ((0, 0), (2, 0), (0, 0)), mode="edge"))
        act = lambda x: nnx.silu(layers.layer_norm(x, EPS)).astype(self.cfg.dtype)
        x = rearrange(past(self.conv1, motion), "b f (n d) -> (b n) f d", n=self.cfg.face_tokens)
        for conv in (self.conv2, self.conv3):
            x = past(conv, act(x))
        x = rearrange(self.out(act(x)), "(b n) t d -> b t n d", n=self.cfg.face_tokens)
        return jnp.concatenate([x, jnp.broadcast_to(self.token.get_value(), (*x.shape[:2], 1, x.shape[-1]))], 2)
