"""Causal language models as text encoders: Qwen2.5's (arXiv 2502.13923; transformers'
models/qwen2_5_vl/modeling_qwen2_5_vl.py) and Llama's (arXiv 2407.21783; models/llama/modeling_llama.py).

B batch, N tokens, D width, H heads, G heads of keys and values, K head dim, F mlp, A axes of positions, L layers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn.context_parallel import attend_whole
from jdit.nn.layers import GatedMlp, RMSNorm, fused_linear, linear, scan_blocks, stack
from jdit.nn.rope import Rope, apply_rope, rope_at
from jdit.nn.text.activations import ACTIVATIONS, check_activation
from jdit.sharding import Rules, shard


class RopeScaling(NamedTuple):
    """Llama 3.1's stretch of the rotary wavelengths (transformers' `rope_type` "llama3"): those longer than
    original / low are made `factor` times longer, those shorter than original / high stay, between them it blends."""

    factor: float
    low: float
    high: float
    original: float


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder without its output layer. The defaults are Qwen2.5-VL 7B's.

    Attributes:
        kv_heads: heads of keys and values, each shared by heads / kv_heads heads of queries (arXiv 2305.13245).
        head_dim: None stands for width / heads.
        qkv_bias: whether queries, keys and values have biases (Qwen), or not (Llama).
        theta: base of the rotary frequencies.
        sections: rotated pairs turned by each axis in turn (M-RoPE: frame, row, column); None for one axis.
    """

    vocab_size: int = 152064
    width: int = 3584
    mlp: int = 18944
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    head_dim: int | None = None
    act: str = "silu"
    eps: float = 1e-6
    qkv_bias: bool = True
    theta: float = 1e6
    sections: tuple[int, ...] | None = (16, 24, 24)
    scaling: RopeScaling | None = None
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        check_activation(self.act)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}, and head_dim is not given")
        if self.sections is not None and sum(self.sections) * 2 != self.head:
            raise ValueError(f"sections={self.sections} must add up to half of the head dim, {self.head // 2}")
        if self.scaling is not None:  # a plain tuple from a file
            object.__setattr__(self, "scaling", RopeScaling(*self.scaling))

    @property
    def head(self) -> int:
        """Dims K of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def axes(self) -> int:
        """Axes A of a token's position."""
        return 1 if self.sections is None else len(self.sections)


def frequencies(cfg: DecoderConfig) -> Float[np.ndarray, "K/2"]:
    """Radians a step of each rotated pair, on the host in float64."""
    freqs = cfg.theta ** -(np.arange(0, cfg.head, 2, dtype=np.float64) / cfg.head)
    if cfg.scaling is None:
        return freqs
    factor, low, high, original = cfg.scaling
    turns = original * freqs / (2 * np.pi)  # in the context that the model was first trained on
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return freqs * (kept + (1 - kept) / factor)


def decoder_rope(cfg: DecoderConfig, positions: Int[Array, "*B N A"]) -> Rope:
    """The rotary table, float32. With M-RoPE each pair is turned by the position on its section's axis."""
    axes = np.repeat(np.arange(cfg.axes), cfg.sections or (cfg.head // 2,))
    return rope_at(positions, axes, frequencies(cfg))


class DecoderBlock(nnx.Module):
    """Pre-norm causal self-attention with grouped keys and values, and gated MLP."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, k, dtype = cfg.width, cfg.head, jnp.dtype(cfg.dtype)
        self.norm1 = RMSNorm(d, eps=cfg.eps, dtype=dtype)
        self.q = linear(d, cfg.heads * k, ("embed", "heads"), dtype=dtype, rngs=rngs, bias=cfg.qkv_bias)
        self.kv = fused_linear(d, 2, cfg.kv_heads * k, ("embed", "heads"), dtype=dtype, rngs=rngs, bias=cfg.qkv_bias)
        self.out = linear(cfg.heads * k, d, ("heads", "embed"), dtype=dtype, rngs=rngs, bias=False)
        self.norm2 = RMSNorm(d, eps=cfg.eps, dtype=dtype)
        self.mlp = GatedMlp(d, cfg.mlp, ACTIVATIONS[cfg.act], dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], rope: Rope) -> Float[Array, "B N D"]:
        cfg = self.cfg
        b, n, _ = x.shape
        with jax.named_scope("attention"):
            y = self.norm1(x)
            q = apply_rope(self.q(y).reshape(b, n, cfg.heads, cfg.head), rope, "halves")
            kv = self.kv(y).reshape(b, n, 2, cfg.kv_heads, cfg.head)
            k = apply_rope(kv[:, :, 0], rope, "halves")
            k, v = (jnp.repeat(a, cfg.heads // cfg.kv_heads, axis=2) for a in (k, kv[:, :, 1]))
            x = x + self.out(attend_whole(q, k, v, rules=cfg.rules, causal=True))
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.norm2(x))
        return shard(x, "batch", None, "width", rules=cfg.rules)


class Decoder(nnx.Module):
    """Token embedding, causal transformer, final RMS norm.

    No lengths are needed: padding goes last, and no token sees a later one.
    """

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype)
        self.tokens = nnx.Embed(
            cfg.vocab_size, cfg.width, dtype=dtype, param_dtype=dtype, rngs=rngs,
            embedding_metadata={"axes": ("vocab", "embed")},
        )  # fmt: skip
        self.blocks = stack(lambda r: DecoderBlock(cfg, rngs=r), cfg.layers, rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.eps, dtype=dtype)

    def __call__(
        self, tokens: Int[Array, "B N"], positions: Int[Array, "B N A"] | None = None, *, skip: int = 0
    ) -> Float[Array, "B N D"]:
        """Encode token ids; see `states` for the rest."""
        return self.states(self.tokens(tokens), positions, skip=skip)

    def states(
        self, x: Float[Array, "B N D"], positions: Int[Array, "B N A"] | None = None, *, skip: int = 0
    ) -> Float[Array, "B N D"]:
        """Run the layers on embeddings.

        Args:
            positions: of each token on each axis; None numbers the tokens from 0 on, the same on every axis.
            skip: which state to return: 0 the final normed one (`hidden_states[-1]` upstream), 1 what enters the last
                layer (`hidden_states[-2]`), and so on.

        Raises:
            ValueError: `skip` outside of 0 to L.
        """
        cfg = self.cfg
        if not 0 <= skip <= cfg.layers:
            raise ValueError(f"skip={skip}; with {cfg.layers} layers it can be 0 to {cfg.layers}")
        x = shard(x, "batch", None, "width", rules=cfg.rules)
        if positions is None:
            positions = jnp.repeat(jnp.arange(x.shape[1])[:, None], cfg.axes, axis=1)
        rope = decoder_rope(cfg, positions)
        if skip == 0:
            return self.norm(scan_blocks(self.blocks, x, call=lambda block, x, _: block(x, rope)))

        def call(block: DecoderBlock, carry, layer):
            x, kept = carry
            return block(x, rope), jnp.where(layer == cfg.layers - skip, x, kept)

        return scan_blocks(self.blocks, (x, x), jnp.arange(cfg.layers), call=call)[1]
