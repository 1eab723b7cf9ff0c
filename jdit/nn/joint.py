"""Blocks of two streams, picture and context, that have weights of their own and meet in attention (MMDiT, arXiv
2403.03206): what Stable Diffusion 3, Qwen-Image and HunyuanVideo share.

Legend: B batch, N image tokens, L context tokens, D width, K head dim, M rows of modulation, n parts of one.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn import layers
from jdit.nn.context_parallel import attend, attend_parts, project
from jdit.nn.pieces import Part, joined, padded
from jdit.nn.rope import Rope, apply_rope
from jdit.sharding import Rules, shard


class JointConfig(Protocol):
    """What a block reads of its family's config; qk_norm: "rms_norm" normalises queries and keys a head, None not; mlp:
    the width inside the MLPs."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp(self) -> int: ...
    @property
    def qk_norm(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def rules(self) -> Rules: ...


class Stream(nnx.Module):
    """One stream's share of a block: modulation, queries/keys/values, and (unless `ends`) output and MLP."""

    def __init__(self, cfg: JointConfig, parts: int, *, ends: bool = False, rngs: nnx.Rngs):
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.mod = layers.fused_linear(d, parts, d, ("embed", "mlp"), **kw)
        self.attn = SelfAttention(cfg, out=not ends, rngs=rngs)
        self.mlp = None if ends else layers.Mlp(d, cfg.mlp, layers.gelu_tanh, **kw)

    def feed_forward(self, x, shift, scale, gate):
        assert self.mlp is not None, "this stream ends at attention"
        return gated_add(x, self.mlp(layers.modulate_rows(x, shift, scale)), gate)


class SelfAttention(nnx.Module):
    """Projections of one attention: fused q, k, v, optional norms a head, output.

    `more` further products of width D on the same input are fused with them, for callers that split them off.
    """

    def __init__(self, cfg: JointConfig, *, out: bool = True, more: int = 0, rngs: nnx.Rngs):
        self.heads, self.head_dim = cfg.heads, cfg.head_dim
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        norm = lambda: layers.RMSNorm(cfg.head_dim, eps=1e-6, dtype=cfg.dtype) if cfg.qk_norm else None
        self.qkv = layers.fused_linear(d, 3 + more, d, ("embed", "heads"), **kw)
        self.norm_q, self.norm_k = norm(), norm()
        self.out = layers.linear(d, d, ("heads", "embed"), **kw) if out else None

    def project(self, x: Float[Array, "B N D"], rules: Rules, rope: Rope | None = None, *, joint: bool = False) -> Part:
        """Queries, keys and values, the first two rotated by `rope`. `joint`: x is one of several parts of the sequence
        that is attended to."""
        turn = lambda norm: lambda a: self._turned(norm, a, rope)
        q, k, v = project(self.qkv, x, turn(self.norm_q), turn(self.norm_k), self.heads, rules, joint=joint)
        return q, k, self._split(v)

    def split(self, qkv: Float[Array, "B N m D"], rope: Rope) -> Part:
        """`project` of a product that is made already: its first three parts."""
        q, k = (self._turned(n, qkv[:, :, i], rope) for i, n in enumerate((self.norm_q, self.norm_k)))
        return q, k, self._split(qkv[:, :, 2])

    def _split(self, x: Float[Array, "B N D"]) -> Float[Array, "B N heads K"]:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim)

    def _turned(self, norm: layers.RMSNorm | None, x, rope: Rope | None) -> Float[Array, "B N heads K"]:
        x = self._split(x) if norm is None else norm(self._split(x), rotated=rope is not None)
        return x if rope is None else apply_rope(x, rope)

    def merge(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Heads, side by side, to the output."""
        assert self.out is not None, "nobody reads this stream's attention"
        return self.out(x)


class JointBlock(nnx.Module):
    """A block of both streams (figure 2b of the paper); `dual` adds image-only attention, `last` drops the context."""

    def __init__(self, cfg: JointConfig, dual: bool = False, last: bool = False, *, rngs: nnx.Rngs):
        self.cfg, self.last = cfg, last
        self.image = Stream(cfg, 9 if dual else 6, rngs=rngs)
        self.context = Stream(cfg, 2 if last else 6, ends=last, rngs=rngs)
        self.attn2 = SelfAttention(cfg, rngs=rngs) if dual else None

    def __call__(
        self,
        x: Float[Array, "B N D"],
        c: Float[Array, "B L D"],
        mod_x: Float[Array, "B M n D"],
        mod_c: Float[Array, "B 1 m D"],
        *,
        first: int = 0,
        rope: Rope | None = None,
        kv_lengths: Int[Array, "B"] | None = None,
        key_counts: Float[Array, "N+L"] | None = None,
        tokens: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B L D"]]:
        """Both streams after the block.

        Args:
            mod_x, mod_c: shifts, scales and gates. Where M is 2, one row is for the `first` image tokens and the other
                for the rest.
            rope: of the joined sequence, image before context, as `kv_lengths` and `key_counts` of `attention` are.
            tokens: how many image and context tokens attention has, where padding follows them (`whole_tiles`).
        """
        cfg, tokens = self.cfg, tokens or (x.shape[1], c.shape[1])
        mx, mc = of_tokens(mod_x, x.shape[1], first), of_tokens(mod_c, c.shape[1])
        with jax.named_scope("joint_attention"):
            given = layers.modulate_rows(x, mx[0], mx[1]), layers.modulate_rows(c, mc[0], mc[1])
            seen = self._attend(*given, tokens, rope, kv_lengths=kv_lengths, key_counts=key_counts)
        before = x
        x = gated_add(x, self.image.attn.merge(seen[0]), mx[2])
        if self.attn2 is not None:
            with jax.named_scope("dual_attention"):
                qkv = self.attn2.project(layers.modulate_rows(before, mx[6], mx[7]), cfg.rules)
                x = gated_add(x, self.attn2.merge(attend(*qkv, rules=cfg.rules, tokens=tokens[0])), mx[8])
        with jax.named_scope("mlp"):
            x = self.image.feed_forward(x, *mx[3:6])
            if not self.last:
                c = self.context.feed_forward(gated_add(c, self.context.attn.merge(seen[1]), mc[2]), *mc[3:6])
        return shard(x, "batch", "seq", "width", rules=cfg.rules), shard(c, "batch", "seq", "width", rules=cfg.rules)

    def _attend(
        self, x: Float[Array, "B N D"], c: Float[Array, "B L D"], tokens: tuple[int, int], rope: Rope | None, **kw
    ) -> list[Float[Array, "B N_or_L D"]]:
        """Attention among both streams' tokens; the results apart, padded as the streams are."""
        rules, n = self.cfg.rules, tokens[0]
        ropes = (None, None) if rope is None else _cut(rope, n, rules)
        image, context = (
            stream.attn.project(a, rules, r and r.padded(a.shape[1]), joint=True)
            for stream, a, r in zip((self.image, self.context), (x, c), ropes)
        )
        if self.last:  # nobody reads the context's output
            context = (context[0][:, :0], context[1], context[2])
        if rules.ways("seq") > 1 or rope is not None or self.cfg.qk_norm is None:
            return attend_parts([image, context], rules=rules, tokens=tokens, **kw)
        # the kernels of norms carry the joining of q and k along; v comes as it is
        q, k, v = ([a[:, :m] for a, m in zip(pair, tokens)] for pair in zip(image, context))
        q, k = (jnp.concatenate(pair, 1) for pair in (q, k))
        joint = attend(q, k, joined(v), rules=rules, **kw)
        return [padded(joint[:, :n], image[0].shape[1]), padded(joint[:, n:], context[0].shape[1])]


def of_tokens(rows: Float[Array, "B M n D"], tokens: int, first: int = 0) -> list[Float[Array, "B N_or_1 D"]]:
    """Each of the n parts, for all tokens. Where M is 2, one row is for the `first` tokens, the other for the rest."""
    parts = list(jnp.moveaxis(rows, -2, 0))
    if rows.shape[1] != 2:
        return parts
    return [jnp.where(jnp.arange(tokens)[:, None] < first, p[:, :1], p[:, 1:]) for p in parts]  # fused with its use


def modulation_rows(blocks, stream: Callable[[Any], Any], emb: Float[Array, "*S D"]) -> Float[Array, "l *S n D"]:
    """What `emb` makes of the modulation (`mod`) of a stream in each of the stacked `blocks`, float32.

    Layer by layer: all layers' products at once would hold every float32 result and kernel copy together.
    """
    return jax.lax.map(lambda block: layers.dense32(stream(block).mod, emb), blocks)


def _cut(rope: Rope, n: int, rules: Rules) -> tuple[Rope, Rope]:
    """The table of the first `n` tokens and that of the others, whole on each device: cut where it is spread, its rows
    would have to move."""
    whole = lambda a: shard(a, None, None, rules=rules)
    cut = lambda part: Rope(*(whole(whole(a)[..., part, :]) for a in rope))
    return cut(slice(n)), cut(slice(n, None))


def gated_add(x, update, gate):
    """x + gate update, in x's dtype."""
    return (x + gate * update).astype(x.dtype)
