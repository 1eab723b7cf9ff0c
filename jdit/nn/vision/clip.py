"""CLIP vision encoder (arXiv 2103.00020; transformers' models/clip/modeling_clip.py): Wan's ViT-H/14, LLaVA's
ViT-L/14 and their kin.

B batch, Y X pixel rows and columns, C channels, N tokens (the class token, then patches in raster order), D width,
P projection, L layers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn.clip import CLIPBlock, CLIPTowerConfig, run_tower
from jdit.nn.layers import LayerNorm, linear, stack
from jdit.nn.patch import patchify
from jdit.sharding import shard


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(CLIPTowerConfig):
    """Architecture of a CLIP vision tower. The defaults are ViT-H/14 as Wan's image to video has it.

    Attributes:
        image_size, patch: pixels a side; what the patches leave over at the right and the bottom is not seen.
        projection: width P of the visual projection, None for a tower without one.
    """

    width: int = 1280
    mlp: int = 5120
    layers: int = 32
    heads: int = 16
    act: str = "gelu"
    image_size: int = 224
    patch: int = 14
    channels: int = 3
    projection: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.patch <= self.image_size:
            raise ValueError(f"patches of {self.patch} pixels do not fit pictures of {self.image_size}")

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1


CLIP_L_336 = CLIPVisionConfig(width=1024, mlp=4096, layers=24, act="quick_gelu", image_size=336)
"""CLIP's ViT-L/14 for pictures of 336 pixels, as LLaVA has it."""


class CLIPVisionOutput(NamedTuple):
    """states: the hidden state that `skip` chooses. last: what leaves the last layer, without the final norm.
    pooled: last at the class token, normed. projected: pooled times the projection (pooled where there is none)."""

    states: Float[Array, "B N D"]
    last: Float[Array, "B N D"]
    pooled: Float[Array, "B D"]
    projected: Float[Array, "B P"]


class CLIPVision(nnx.Module):
    """Patch, class and position embeddings, norm, transformer, final norm at the class token, projection."""

    def __init__(self, cfg: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, dtype = cfg.width, jnp.dtype(cfg.dtype)
        normal = lambda shape: nnx.initializers.normal(0.02)(rngs.params(), shape, dtype)
        inputs = cfg.patch**2 * cfg.channels
        self.patch = linear(inputs, d, (None, "embed"), dtype=dtype, rngs=rngs, bias=False)
        self.token = nnx.Param(normal((d,)), axes=("embed",))
        self.positions = nnx.Param(normal((cfg.tokens, d)), axes=(None, "embed"))
        self.norm_in = LayerNorm(d, eps=cfg.eps, dtype=dtype)
        self.blocks = stack(lambda r: CLIPBlock(cfg, causal=False, rngs=r), cfg.layers, rngs)
        self.norm = LayerNorm(d, eps=cfg.eps, dtype=dtype)
        if cfg.projection is not None:
            self.projection = linear(d, cfg.projection, ("embed", None), dtype=dtype, rngs=rngs, bias=False)

    def __call__(self, pixels: Float[Array, "B Y X C"], *, skip: int = 0) -> CLIPVisionOutput:
        """Encode pictures.

        Args:
            pixels: normalised pictures of the encoder's size (jdit.preprocess makes them).
            skip: which state to return: 0 is the input of the last layer (`hidden_states[-2]` upstream, as Wan takes
                it), 1 that of the layer before, and so on.

        Raises:
            ValueError: pictures of another size, or `skip` outside of 0 to L - 1.
        """
        cfg = self.cfg
        if pixels.shape[1:] != (want := (cfg.image_size, cfg.image_size, cfg.channels)):
            raise ValueError(f"pictures of {tuple(pixels.shape[1:])}; this CLIP vision encoder takes {want}")
        with jax.named_scope("embed"):
            side = cfg.image_size // cfg.patch * cfg.patch
            patches = self.patch(patchify(pixels[:, :side, :side].astype(cfg.dtype), cfg.patch))
            token = jnp.broadcast_to(self.token[...], (len(pixels), 1, cfg.width))
            x = jnp.concatenate([token, patches], 1) + self.positions[...]
        x = shard(self.norm_in(x), "batch", None, "width", rules=cfg.rules)
        last, states = run_tower(self.blocks, x, cfg.layers, skip)
        pooled = self.norm(last[:, 0])
        return CLIPVisionOutput(states, last, pooled, pooled if cfg.projection is None else self.projection(pooled))
