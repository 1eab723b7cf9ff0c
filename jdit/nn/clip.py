"""What both towers of CLIP are made of (arXiv 2103.00020; transformers' models/clip/modeling_clip.py): the transformer
layer, and the run over a stack of them. Text: jdit.nn.text.clip; pictures: jdit.nn.vision.clip.

B batch, N tokens, D width, H heads, K head dim, F mlp, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.layers import LayerNorm, Mlp, fused_linear, linear, scan_blocks
from jdit.nn.text.activations import ACTIVATIONS, check_activation
from jdit.sharding import Rules, shard


@dataclasses.dataclass(frozen=True)
class CLIPTowerConfig:
    """What the two towers' configs share."""

    width: int = 768
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    act: str = "quick_gelu"
    eps: float = 1e-5
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        check_activation(self.act)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")


class CLIPBlock(nnx.Module):
    """Pre-norm self-attention and MLP; `causal` lets a token see itself and those before it only."""

    def __init__(self, cfg: CLIPTowerConfig, *, causal: bool, rngs: nnx.Rngs):
        self.cfg, self.causal = cfg, causal
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
            if self.causal:
                logits = jnp.where(jnp.tri(n, dtype=bool), logits, -jnp.inf)
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            x = x + self.out(jnp.einsum("bhns,bshk->bnhk", weights, v).reshape(b, n, d))
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.norm2(x))
        return shard(x, "batch", None, "width", rules=self.cfg.rules)


def run_tower(blocks: nnx.Module, x: Float[Array, "B N D"], layers: int, skip: int):
    """Run a stack of layers.

    Args:
        skip: which state to keep: 0 is the input of the last layer (`hidden_states[-2]` upstream), 1 that of the layer
            before, and so on.

    Returns:
        (what leaves the last layer, the kept state), both (B, N, D).

    Raises:
        ValueError: `skip` outside of 0 to L - 1.
    """
    if not 0 <= skip < layers:
        raise ValueError(f"skip={skip}; with {layers} layers it can be 0 to {layers - 1}")
    wanted = layers - 1 - skip

    def call(block: CLIPBlock, carry, layer):
        x, kept = carry
        return block(x), jnp.where(layer == wanted, x, kept)

    return scan_blocks(blocks, (x, x), jnp.arange(layers), call=call)
