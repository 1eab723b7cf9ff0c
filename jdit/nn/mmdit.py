"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (arXiv 2403.03206; upstream transformer_sd3.py).

Legend: B batch, H W latent rows and columns, C latent channels, N image tokens, L context tokens, D width, S steps,
P pooled text width. Two streams, image and context, have their own weights and meet in attention.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from jdit.nn import layers
from jdit.nn.attention import attend
from jdit.nn.patch import crop_centre, patchify, sincos_2d, unpatchify
from jdit.sharding import Rules, shard


class Group(NamedTuple):
    """A run of equal layers: upstream's numbers, with a second self-attention or not, the context-free end or not."""

    layers: tuple[int, ...]
    dual: bool
    last: bool


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Architecture; the names in brackets are upstream's.

    Attributes:
        sample_size: latent side that the position table was laid out for. patch: [patch_size].
        joint_dim: width of the text states [joint_attention_dim].
        pooled_dim: width of the pooled text [pooled_projection_dim].
        pos_size: side of the position table in patches [pos_embed_max_size].
        dual_layers: layers with a second attention among image tokens [dual_attention_layers], SD3.5-medium.
        qk_norm: "rms_norm" normalises queries and keys a head, None leaves them.
    """

    sample_size: int = 128
    patch: int = 2
    in_channels: int = 16
    out_channels: int = 16
    layers: int = 18
    heads: int = 18
    head_dim: int = 64
    joint_dim: int = 4096
    pooled_dim: int = 2048
    pos_size: int = 96
    dual_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={self.qk_norm!r} is not supported; there are None and 'rms_norm'")
        if self.width % 4:
            raise ValueError(f"width {self.width} = heads {self.heads} x head_dim {self.head_dim} must divide by 4")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def groups(self) -> tuple[Group, ...]:
        kind = lambda i: (i in self.dual_layers, i == self.layers - 1)
        return tuple(Group(tuple(run), *k) for k, run in itertools.groupby(range(self.layers), kind))


class Modulation(NamedTuple):
    """Everything that depends on time and pooled text only, float32: one entry a group with leading layer axis."""

    image: tuple[Float[Array, "layers B n D"], ...]
    context: tuple[Float[Array, "layers B m D"], ...]
    final: Float[Array, "B 2 D"]


class Stream(nnx.Module):
    """One stream's share of a block: modulation, queries/keys/values, and (unless `ends`) output and MLP."""

    def __init__(self, cfg: MMDiTConfig, parts: int, *, ends: bool = False, rngs: nnx.Rngs):
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.mod = layers.fused_linear(d, parts, d, (None, "mlp"), **kw)
        self.attn = SelfAttention(cfg, out=not ends, rngs=rngs)
        self.mlp = None if ends else layers.Mlp(d, 4 * d, layers.gelu_tanh, **kw)

    def feed_forward(self, x, shift, scale, gate):
        assert self.mlp is not None, "this stream ends at attention"
        return _add(x, self.mlp(layers.modulate(x, shift, scale)), gate)


class SelfAttention(nnx.Module):
    """Projections of one attention: fused q, k, v, optional norms a head, output."""

    def __init__(self, cfg: MMDiTConfig, *, out: bool = True, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        norm = lambda: layers.RMSNorm(cfg.head_dim, eps=1e-6, dtype=cfg.dtype) if cfg.qk_norm else None
        self.qkv = layers.fused_linear(d, 3, d, ("embed", "heads"), **kw)
        self.norm_q, self.norm_k = norm(), norm()
        self.out = layers.linear(d, d, ("heads", "embed"), **kw) if out else None

    def project(self, x: Float[Array, "B N D"]) -> list[Float[Array, "B N heads K"]]:
        cfg = self.cfg
        qkv = self.qkv(x)
        q, k, v = (qkv[:, :, i].reshape(*x.shape[:2], cfg.heads, cfg.head_dim) for i in range(3))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return [q, k, v]

    def merge(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Heads, side by side, to the output."""
        assert self.out is not None, "nobody reads this stream's attention"
        return self.out(x)


class JointBlock(nnx.Module):
    """A block of both streams (figure 2b of the paper); `dual` adds image-only attention, `last` drops the context."""

    def __init__(self, cfg: MMDiTConfig, dual: bool, last: bool, *, rngs: nnx.Rngs):
        self.cfg, self.last = cfg, last
        self.image = Stream(cfg, 9 if dual else 6, rngs=rngs)
        self.context = Stream(cfg, 2 if last else 6, ends=last, rngs=rngs)
        self.attn2 = SelfAttention(cfg, rngs=rngs) if dual else None

    def __call__(self, x, c, mod_x, mod_c, key_counts=None):
        cfg, n = self.cfg, x.shape[1]
        mx, mc = (jnp.moveaxis(m, -2, 0) for m in (mod_x, mod_c))
        with jax.named_scope("joint_attention"):
            image = self.image.attn.project(layers.modulate(x, mx[0], mx[1]))
            context = self.context.attn.project(layers.modulate(c, mc[0], mc[1]))
            if self.last:  # nobody reads the context's output
                context[0] = context[0][:, :0]
            # norms carry the joining of q and k along, v comes as it is
            joins = (_join if cfg.qk_norm is None else _concatenate,) * 2 + (_join,)
            pairs = (join(*pair) for join, *pair in zip(joins, image, context))
            joint = attend(*pairs, rules=cfg.rules, key_counts=key_counts)
        before = x
        x = _add(x, self.image.attn.merge(joint[:, :n]), mx[2])
        if self.attn2 is not None:
            with jax.named_scope("dual_attention"):
                second = attend(*self.attn2.project(layers.modulate(before, mx[6], mx[7])), rules=cfg.rules)
                x = _add(x, self.attn2.merge(second), mx[8])
        with jax.named_scope("mlp"):
            x = self.image.feed_forward(x, *mx[3:6])
            if not self.last:
                c = self.context.feed_forward(_add(c, self.context.attn.merge(joint[:, n:]), mc[2]), *mc[3:6])
        return shard(x, "batch", "seq", "width", rules=cfg.rules), shard(c, "batch", "seq", "width", rules=cfg.rules)


def _concatenate(image, context):
    return jnp.concatenate([image, context], 1)


def _join(image, context):
    """`_concatenate` as a selection. XLA's own kernel for a concatenation handles one element a thread: 96 us where a
    loop over the result takes 28 (v of SD3.5-large at 1024 px on an H200)."""
    n, m = image.shape[1], context.shape[1]
    ends = lambda before, after: ((0, 0), (before, after), (0, 0), (0, 0))
    first = jnp.arange(n + m)[:, None, None] < n
    return jnp.where(first, jnp.pad(image, ends(0, m)), jnp.pad(context, ends(n, 0)))


def _add(x, update, gate):
    return (x + gate[:, None] * update).astype(x.dtype)


class MMDiT(nnx.Module):
    """The whole network: latents and text to the flow velocity (noise minus data)."""

    modulation_weights: ClassVar = ("time.*", "pooled.*", "blocks.*.mod.*", "final_mod.*")  # see jdit.nn.parts

    def __init__(self, cfg: MMDiTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, p = cfg.width, cfg.patch
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.patch = layers.linear(p * p * cfg.in_channels, d, (None, "embed"), **kw)
        table = lambda: jnp.asarray(sincos_2d(d, cfg.pos_size, cfg.sample_size // p), cfg.dtype)
        self.pos = nnx.Param(table(), axes=(None, None, "embed"), fixed=True)
        self.time = layers.TimeMlp(256, d, **kw)
        self.pooled = layers.TimeMlp(cfg.pooled_dim, d, **kw)
        self.context = layers.linear(cfg.joint_dim, d, (None, "embed"), **kw)
        self.blocks = nnx.List(
            layers.stack(lambda r, g=g: JointBlock(cfg, g.dual, g.last, rngs=r), len(g.layers), rngs)
            for g in cfg.groups
        )
        self.final_mod = layers.fused_linear(d, 2, d, (None, "mlp"), **kw)
        self.final = layers.linear(d, p * p * cfg.out_channels, ("embed", None), **kw)

    def modulation(self, t: Float[Array, "..."], pooled: Float[Array, "B P"]) -> Modulation:
        """Shifts, scales and gates of every layer (equation 13 ff. of DiT, arXiv 2212.09748).

        Args:
            t: timesteps in [0, 1000]: a scalar, (B,), or (S, 1) for a table of S steps.

        Returns:
            leaves (layers, *t's leading axes, B, parts, D), float32.
        """
        emb = self.time(layers.timestep_embedding(t, 256)).astype(jnp.float32) + self.pooled(pooled)
        emb = nnx.silu(emb).astype(self.cfg.dtype)
        # layer by layer: all layers' products at once would hold every float32 result and kernel copy together
        each = lambda blocks, name: jax.lax.map(lambda b: layers.dense32(getattr(b, name).mod, emb), blocks)
        return Modulation(
            tuple(each(b, "image") for b in self.blocks),
            tuple(each(b, "context") for b in self.blocks),
            layers.dense32(self.final_mod, emb),
        )

    def modulation_table(self, timesteps: Float[Array, "S"], pooled: Float[Array, "B P"]) -> Modulation:
        """`modulation` of every step, steps leading, computed once before the sampling loop."""
        table = self.modulation(timesteps[:, None], pooled)
        by_step = lambda group: tuple(jnp.moveaxis(m, 1, 0) for m in group)
        return Modulation(by_step(table.image), by_step(table.context), table.final)

    def embed_context(self, context: Float[Array, "B L J"]) -> Float[Array, "B L D"]:
        return self.context(context.astype(self.cfg.dtype))

    def velocity(
        self,
        x: Float[Array, "B H W C"],
        modulation: Modulation,
        context: Float[Array, "B L D"],
        *,
        context_counts: Float[Array, "L"] | None = None,
        skip: Bool[Array, "layers"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """One evaluation, given `modulation` at this step and the embedded context.

        Args:
            context_counts: context token j stands for this many equal tokens (zeros in the place of an absent T5).
            skip: layers to pass over (skip-layer guidance).
        """
        cfg = self.cfg
        rows, columns = x.shape[1] // cfg.patch, x.shape[2] // cfg.patch
        counts = None
        if context_counts is not None:
            counts = jnp.concatenate([jnp.ones(rows * columns, jnp.float32), context_counts.astype(jnp.float32)])
        h = self.patch(patchify(x.astype(cfg.dtype), cfg.patch)) + crop_centre(self.pos.get_value(), rows, columns)
        carry = (shard(h, "batch", "seq", "width", rules=cfg.rules), context)
        for group, blocks, image, text in zip(cfg.groups, self.blocks, modulation.image, modulation.context):
            off = None if skip is None else skip[np.asarray(group.layers)]
            carry = layers.scan_blocks(
                blocks, carry, (image, text, off), call=lambda b, c, m: _run(b, c, *m, counts=counts)
            )
        shift, scale = jnp.moveaxis(modulation.final, -2, 0)
        return unpatchify(self.final(layers.modulate(carry[0], shift, scale)), cfg.patch, rows)

    def __call__(self, x, t, context, pooled, *, context_counts=None, skip=None):
        """Velocity for latents x (B, H, W, C) at timestep t (scalar or (B,)), raw context (B, L, J), pooled (B, P)."""
        modulation = self.modulation(jnp.asarray(t, jnp.float32), pooled)
        return self.velocity(x, modulation, self.embed_context(context), context_counts=context_counts, skip=skip)


def _run(block: JointBlock, carry, image, text, off, *, counts):
    call = lambda xc: block(xc[0], xc[1], image, text, counts)
    return call(carry) if off is None else jax.lax.cond(off, lambda xc: xc, call, carry)
