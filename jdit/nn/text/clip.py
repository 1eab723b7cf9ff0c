"""CLIP text encoder (arXiv 2103.00020; transformers' models/clip/modeling_clip.py): CLIP-L, CLIP-G and their kin.

B batch, N tokens, D width, P projection, L layers. The layer is in jdit.nn.clip.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn.clip import CLIPBlock, CLIPTowerConfig, run_tower
from jdit.nn.layers import LayerNorm, linear, stack
from jdit.sharding import shard

LEGACY_EOS = 2
"""An `eos_token_id` that configs older than transformers 4.31 carry by mistake: it means "the highest id"."""


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(CLIPTowerConfig):
    """Architecture of a CLIP text tower. The defaults are CLIP-L as Stable Diffusion 3 has it.

    Attributes:
        projection: width P of the text projection, None for a tower without one.
        eos_token_id: the token whose state is pooled, its first occurrence; 2 stands for the highest id of each row.
    """

    vocab_size: int = 49408
    max_positions: int = 77
    projection: int | None = 768
    eos_token_id: int = LEGACY_EOS


class CLIPTextOutput(NamedTuple):
    """states: a hidden state before the final norm. pooled: the final normed state at the end of the text.
    projected: pooled times the projection (pooled itself where there is none)."""

    states: Float[Array, "B N D"]
    pooled: Float[Array, "B D"]
    projected: Float[Array, "B P"]


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
        self.blocks = stack(lambda r: CLIPBlock(cfg, causal=True, rngs=r), cfg.layers, rngs)
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
        x = shard(self.tokens(tokens) + self.positions(jnp.arange(n)), "batch", None, "width", rules=cfg.rules)
        last, states = run_tower(self.blocks, x, cfg.layers, skip)
        pooled = self.norm(jnp.take_along_axis(last, self._end(tokens)[:, None, None], axis=1)[:, 0])
        return CLIPTextOutput(states, pooled, pooled if cfg.projection is None else self.projection(pooled))

    def _end(self, tokens: Int[Array, "B N"]) -> Int[Array, "B"]:
        """Position of the pooled token; the first one if there is no end token, as upstream."""
        if self.cfg.eos_token_id == LEGACY_EOS:
            return tokens.argmax(-1)
        return (tokens == self.cfg.eos_token_id).argmax(-1)
