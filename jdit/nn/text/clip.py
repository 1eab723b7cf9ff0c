"""CLIP text encoder (arXiv 2103.00020; transformers' models/clip/modeling_clip.py): CLIP-L, CLIP-G and their kin.

B batch, N tokens, D width, H heads, K head dim, F mlp, P projection, L layers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn.layers import LayerNorm, Mlp, fused_linear, linear, scan_blocks, stack
from jdit.nn.text.activations import ACTIVATIONS, check_activation
from jdit.sharding import Rules, shard

LEGACY_EOS = 2
"""An `eos_token_id` that configs older than transformers 4.31 carry by mistake: it means "the highest id"."""


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Architecture of a CLIP text tower. The defaults are CLIP-L as Stable Diffusion 3 has it.

    Attributes:
        projection: width P of the text projection, None for a tower without one.
        eos_token_id: the token whose state is pooled, its first occurrence; 2 stands for the highest id of each row.
    """

    vocab_size: int = 49408
    width: int = 768
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    max_positions: int = 77
    act: str = "quick_gelu"
    eps: float = 1e-5
    projection: int | None = 768
    eos_token_id: int = LEGACY_EOS
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        check_activation(self.act)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")


class CLIPTextOutput(NamedTuple):
    """states: a hidden state before the final norm. pooled: the final normed state at the end of the text.
    projected: pooled times the projection (pooled itself where there is none)."""

    states: Float[Array, "B N D"]
    pooled: Float[Array, "B D"]
    projected: Float[Array, "B P"]


class CLIPBlock(nnx.Module):
    """Pre-norm causal self-attention and MLP."""

    def __init__(self, cfg: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, dtype = cfg.width, jnp.dtype(cfg.dtype)
        self.norm1 = LayerNorm(d, eps=cfg.eps, dtype=dtype)
        self.qkv = fused_linear(d, 3, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(d, eps=cfg.eps, dtype=dtype)
        self.mlp = Mlp(d, cfg.mlp, ACTIVATIONS[cfg.act], dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        b, n, d = x.shape
        heads = self.cfg.heads
        with jax.named_scope("attention"):
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, heads, d // heads)
            qkv = shard(qkv, "batch", None, None, "heads", None, rules=self.cfg.rules)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            logits = jnp.einsum("bnhk,bshk->bhns", q, k, preferred_element_type=jnp.float32) * (d // heads) ** -0.5
            logits = jnp.where(jnp.tri(n, dtype=bool), logits, -jnp.inf)
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            x = x + self.out(jnp.einsum("bhns,bshk->bnhk", weights, v).reshape(b, n, d))
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.norm2(x))
        return shard(x, "batch", None, "width", rules=self.cfg.rules)


class CLIPText(nnx.Module):
    """Token and position embeddings, causal transformer, final norm, pooling at the end token, projection."""

    def __init__(self, cfg: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, dtype = cfg.width, jnp.dtype(cfg.dtype)
        embed = lambda n, axes: nnx.Embed(
            n, d, dtype=dtype, param_dtype=dtype, rngs=rngs, embedding_metadata={"axes": axes}
        )
        self.tokens = embed(cfg.vocab_size, ("vocab", "embed"))
        self.positions = embed(cfg.max_positions, (None, "embed"))
        self.blocks = stack(lambda r: CLIPBlock(cfg, rngs=r), cfg.layers, rngs)
        self.norm = LayerNorm(d, eps=cfg.eps, dtype=dtype)
        if cfg.projection is not None:
            self.projection = linear(d, cfg.projection, ("embed", None), dtype=dtype, rngs=rngs, bias=False)

    def __call__(self, tokens: Int[Array, "B N"], *, skip: int = 0) -> CLIPTextOutput:
        """Encode token ids.

        Args:
            tokens: ids with start, end and padding tokens, N at most `max_positions`.
            skip: which state to return: 0 is the input of the last layer (`hidden_states[-2]` upstream), 1 that of the
                layer before, and so on.

        Raises:
            ValueError: too many tokens, or `skip` outside of 0 to L - 1.
        """
        cfg = self.cfg
        n = tokens.shape[1]
        if n > cfg.max_positions:
            raise ValueError(f"{n} tokens; this CLIP text encoder has {cfg.max_positions} positions")
        if not 0 <= skip < cfg.layers:
            raise ValueError(f"skip={skip}; with {cfg.layers} layers it can be 0 to {cfg.layers - 1}")
        x = shard(self.tokens(tokens) + self.positions(jnp.arange(n)), "batch", None, "width", rules=cfg.rules)
        wanted = cfg.layers - 1 - skip

        def call(block: CLIPBlock, carry, layer):
            x, kept = carry
            return block(x), jnp.where(layer == wanted, x, kept)

        last, states = scan_blocks(self.blocks, (x, x), jnp.arange(cfg.layers), call=call)
        pooled = self.norm(jnp.take_along_axis(last, self._end(tokens)[:, None, None], axis=1)[:, 0])
        return CLIPTextOutput(states, pooled, pooled if cfg.projection is None else self.projection(pooled))

    def _end(self, tokens: Int[Array, "B N"]) -> Int[Array, "B"]:
        """Position of the pooled token; the first one if there is no end token, as upstream."""
        if self.cfg.eos_token_id == LEGACY_EOS:
            return tokens.argmax(-1)
        return (tokens == self.cfg.eos_token_id).argmax(-1)
