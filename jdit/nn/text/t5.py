"""T5 encoder (arXiv 1910.10683, v1.1 of 2002.05202; transformers' models/t5/modeling_t5.py) and UMT5's.

B batch, N tokens, D width, H heads, K head dim, F mlp.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn.layers import RMSNorm, fused_linear, linear, scan_blocks, stack
from jdit.nn.text.activations import ACTIVATIONS, check_activation
from jdit.sharding import Rules, shard


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture of a T5 encoder. The defaults are T5 v1.1 XXL.

    Attributes:
        kv: dims of one head; heads * kv need not be the width.
        gated: the MLP is act(x A) * (x B) C instead of act(x A) C.
        buckets, max_distance: of the relative position bias.
        shared_bias: one bias table for all layers (T5) or one a layer (UMT5).
    """

    vocab_size: int = 32128
    width: int = 4096
    kv: int = 64
    heads: int = 64
    mlp: int = 10240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    gated: bool = True
    act: str = "gelu_new"
    shared_bias: bool = True
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        check_activation(self.act)


def relative_buckets(n: int, buckets: int, max_distance: int) -> Int[np.ndarray, "2N-1"]:
    """Bucket of each offset key - query from 1 - N to N - 1, both directions (arXiv 1910.10683, section 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half holds single offsets and the second
    grows logarithmically up to `max_distance`. In float32, as the reference takes its logarithm.
    """
    offset = np.arange(1 - n, n)
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class PositionBias(nnx.Module):
    """Learned score offset for each head and distance bucket."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype)
        init = nnx.initializers.normal(cfg.width**-0.5)
        self.table = nnx.Param(init(rngs.params(), (cfg.buckets, cfg.heads), dtype), axes=(None, "heads"))

    def __call__(self, n: int) -> Float[Array, "H N N"]:
        """Bias of N queries (rows) and N keys (columns), float32."""
        by_offset = self.table[...].astype(jnp.float32)[relative_buckets(n, self.cfg.buckets, self.cfg.max_distance)]
        place = jnp.arange(n)
        return by_offset.T[:, place[None, :] - place[:, None] + n - 1]


class T5Block(nnx.Module):
    """Pre-norm bidirectional self-attention, scores not scaled by 1/sqrt(K), and MLP. No biases."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, inner, dtype = cfg.width, cfg.heads * cfg.kv, jnp.dtype(cfg.dtype)
        self.norm1 = RMSNorm(d, eps=cfg.eps, dtype=dtype)
        self.qkv = fused_linear(d, 3, inner, ("embed", "heads"), dtype=dtype, rngs=rngs, bias=False)
        self.out = linear(inner, d, ("heads", "embed"), dtype=dtype, rngs=rngs, bias=False)
        if not cfg.shared_bias:
            self.bias = PositionBias(cfg, rngs=rngs)
        self.norm2 = RMSNorm(d, eps=cfg.eps, dtype=dtype)
        ups = 2 if cfg.gated else 1
        self.up = fused_linear(d, ups, cfg.mlp, ("embed", "mlp"), dtype=dtype, rngs=rngs, bias=False)
        self.down = linear(cfg.mlp, d, ("mlp", "embed"), dtype=dtype, rngs=rngs, bias=False)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        bias: Float[Array, "H N N"] | None,
        lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B N D"]:
        """`bias` is None where the block has its own table; keys from `lengths` on get no weight."""
        cfg = self.cfg
        b, n, _ = x.shape
        with jax.named_scope("attention"):
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, cfg.heads, cfg.kv)
            qkv = shard(qkv, "batch", None, None, "heads", None, rules=cfg.rules)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            logits = jnp.einsum("bnhk,bshk->bhns", q, k, preferred_element_type=jnp.float32)
            logits = logits + (self.bias(n) if bias is None else bias)
            if lengths is not None:
                logits = jnp.where(jnp.arange(n) < lengths[:, None, None, None], logits, -jnp.inf)
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            x = x + self.out(jnp.einsum("bhns,bshk->bnhk", weights, v).reshape(b, n, -1))
        with jax.named_scope("mlp"):
            up = self.up(self.norm2(x))
            y = ACTIVATIONS[cfg.act](up[:, :, 0])
            x = x + self.down(y * up[:, :, 1] if cfg.gated else y)
        return shard(x, "batch", None, "width", rules=cfg.rules)


class T5(nnx.Module):
    """Token embedding, transformer with relative position bias, final RMS norm."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype)
        self.tokens = nnx.Embed(
            cfg.vocab_size, cfg.width, dtype=dtype, param_dtype=dtype, rngs=rngs,
            embedding_metadata={"axes": ("vocab", "embed")},
        )  # fmt: skip
        if cfg.shared_bias:
            self.bias = PositionBias(cfg, rngs=rngs)
        self.blocks = stack(lambda r: T5Block(cfg, rngs=r), cfg.layers, rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.eps, dtype=dtype)

    def __call__(self, tokens: Int[Array, "B N"], lengths: Int[Array, "B"] | None = None) -> Float[Array, "B N D"]:
        """Encode token ids.

        Args:
            tokens: ids with the end token and padding.
            lengths: tokens of each row that are attended to, the rest being padding; None attends to padding too, as
                Stable Diffusion 3 does.
        """
        x = shard(self.tokens(tokens), "batch", None, "width", rules=self.cfg.rules)
        bias = self.bias(tokens.shape[1]) if self.cfg.shared_bias else None
        return self.norm(scan_blocks(self.blocks, x, call=lambda block, x, _: block(x, bias, lengths)))

    def padded(self, tokens: Int[Array, "B N"], lengths: Int[Array, "B"]) -> Float[Array, "B N D"]:
        """States of each row's first `lengths` tokens, which attend to nothing else, and zeros after them (Wan)."""
        states = self(tokens, lengths)
        return jnp.where((jnp.arange(tokens.shape[1]) < lengths[:, None])[..., None], states, 0)
