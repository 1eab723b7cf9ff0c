"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (arXiv 2403.03206; upstream transformer_sd3.py).

Legend: B batch, H W latent rows and columns, C latent channels, N image tokens, L context tokens, D width, S steps,
P pooled text width.
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
from jdit.nn.context_parallel import whole_tiles
from jdit.nn.joint import JointBlock, modulation_rows
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
    def mlp(self) -> int:
        return 4 * self.width

    @property
    def groups(self) -> tuple[Group, ...]:
        kind = lambda i: (i in self.dual_layers, i == self.layers - 1)
        return tuple(Group(tuple(run), *k) for k, run in itertools.groupby(range(self.layers), kind))


class Modulation(NamedTuple):
    """Everything that depends on time and pooled text only, float32: one entry a group with leading layer axis."""

    image: tuple[Float[Array, "layers B n D"], ...]
    context: tuple[Float[Array, "layers B m D"], ...]
    final: Float[Array, "B 2 D"]


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
        self.final_mod = layers.fused_linear(d, 2, d, ("embed", "mlp"), **kw)
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
        return Modulation(
            tuple(modulation_rows(b, lambda block: block.image, emb) for b in self.blocks),
            tuple(modulation_rows(b, lambda block: block.context, emb) for b in self.blocks),
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
        tokens = h.shape[1], context.shape[1]
        carry = (
            shard(whole_tiles(h, cfg.rules), "batch", "seq", "width", rules=cfg.rules), whole_tiles(context, cfg.rules),
        )  # fmt: skip
        for group, blocks, image, text in zip(cfg.groups, self.blocks, modulation.image, modulation.context):
            off = None if skip is None else skip[np.asarray(group.layers)]
            carry = layers.scan_blocks(
                blocks, carry, (image, text, off), call=lambda b, c, m: _run(b, c, *m, counts=counts, tokens=tokens)
            )
        shift, scale = jnp.moveaxis(modulation.final, -2, 0)
        return unpatchify(self.final(layers.modulate(carry[0], shift, scale))[:, : tokens[0]], cfg.patch, rows)

    def __call__(self, x, t, context, pooled, *, context_counts=None, skip=None):
        """Velocity for latents x (B, H, W, C) at timestep t (scalar or (B,)), raw context (B, L, J), pooled (B, P)."""
        modulation = self.modulation(jnp.asarray(t, jnp.float32), pooled)
        return self.velocity(x, modulation, self.embed_context(context), context_counts=context_counts, skip=skip)


def _run(block: JointBlock, carry, image, text, off, *, counts, tokens):
    call = lambda xc: block(xc[0], xc[1], image[:, None], text[:, None], key_counts=counts, tokens=tokens)
    return call(carry) if off is None else jax.lax.cond(off, lambda xc: xc, call, carry)
