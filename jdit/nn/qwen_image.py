"""Qwen-Image's transformer: text to image, editing of one or several pictures, layers (arXiv 2508.02324; upstream
transformer_qwenimage.py).

Legend: B batch, H W latent rows and columns, C latent channels, T pictures that are made (layers; else one), N image
tokens, those of the given pictures last, L text tokens of width J, D width, K head dim, M rows of modulation, S steps.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn import layers
from jdit.nn.context_parallel import whole_tiles
from jdit.nn.joint import JointBlock, modulation_rows
from jdit.nn.patch import patch_grid, patchify_3d, unpatchify_3d
from jdit.nn.rope import Rope, grid_rope, rope_table
from jdit.sharding import Rules, shard

KIND = 0
"""What upstream's pipeline of layers always gives the second embedding of time."""


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
    """Architecture; the names in brackets are upstream's. The defaults are Qwen-Image.

    Attributes:
        in_channels: of latents, before they are packed into patches [in_channels / patch_size^2].
        text_dim: [joint_attention_dim]. rope_dims: dims of a head that turn with the picture's number, the row and the
            column [axes_dims_rope].
        zero_cond_t: given pictures are modulated as at time 0 (Edit-2511).
        added_t: time has a second embedding, of a kind 0 or 1 [use_additional_t_cond] (Layered).
        layered: the last picture is numbered -1 [use_layer3d_rope] (Layered).
    """

    patch: int = 2
    in_channels: int = 16
    out_channels: int = 16
    layers: int = 60
    heads: int = 24
    head_dim: int = 128
    text_dim: int = 3584
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False
    added_t: bool = False
    layered: bool = False
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        if len(self.rope_dims) != 3 or sum(self.rope_dims) != self.head_dim or any(d % 2 for d in self.rope_dims):
            raise ValueError(
                f"axes_dims_rope={self.rope_dims} must be three even numbers whose sum is the head dim {self.head_dim}"
            )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        return 4 * self.width

    @property
    def qk_norm(self) -> str:
        return "rms_norm"

    @property
    def patch_3d(self) -> tuple[int, int, int]:
        return 1, self.patch, self.patch


class Modulation(NamedTuple):
    """Everything that depends on time only, float32; a table for S steps has them as leading axis.

    M is 2 where given pictures have a row of their own, that of time 0, else 1.
    """

    image: Float[Array, "*S layers B M 6 D"]
    text: Float[Array, "*S layers B 1 6 D"]
    final: Float[Array, "*S B 2 D"]


class QwenImage(nnx.Module):
    """The whole network: latents, text and given pictures to the flow velocity (noise minus data)."""

    modulation_weights: ClassVar = ("time.*", "kinds", "blocks.*.mod.*", "final_mod.*")  # see jdit.nn.parts

    def __init__(self, cfg: QwenImageConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, size = cfg.width, cfg.patch**2
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.patch = layers.linear(size * cfg.in_channels, d, (None, "embed"), **kw)
        self.time = layers.TimeMlp(256, d, **kw)
        kinds = lambda: nnx.initializers.normal()(rngs.params(), (2, d), cfg.dtype)
        self.kinds = nnx.Param(kinds(), axes=(None, "embed")) if cfg.added_t else None
        self.text_norm = layers.RMSNorm(cfg.text_dim, eps=1e-6, dtype=cfg.dtype)
        self.text = layers.linear(cfg.text_dim, d, (None, "embed"), **kw)
        self.blocks = layers.stack(lambda r: JointBlock(cfg, rngs=r), cfg.layers, rngs)
        self.final_mod = layers.fused_linear(d, 2, d, ("embed", "mlp"), **kw)
        self.final = layers.linear(d, size * cfg.out_channels, ("embed", None), **kw)

    def modulation(self, t: Float[Array, "..."] | float, kind: Int[Array, "B"] | int = KIND) -> Modulation:
        """Shifts, scales and gates of every layer.

        Args:
            t: timesteps in [0, 1000]: a scalar, (B,), or (S, B) for a table of S steps.
            kind: of the second embedding of time; others do not read it.

        Returns:
            leaves with the axes of t leading, those of the blocks after the layers'.
        """
        t = jnp.asarray(t, jnp.float32)
        t = t.reshape(-1) if t.ndim < 2 else t
        rows = jnp.stack([t, jnp.zeros_like(t)] if self.cfg.zero_cond_t else [t], -1)
        # upstream is told t / 1000 and multiplies last. At t = 1000 another rounding moves cosines by 1e-4: the number
        # is hidden from the compiler, which would fold division and multiplication into other constants
        thousand = jax.lax.optimization_barrier(jnp.float32(1000))
        emb = self.time(layers.timestep_embedding(rows / thousand, 256, scale=thousand))
        if self.kinds is not None:
            emb += self.kinds.get_value()[jnp.asarray(kind)][..., None, :]
        emb = layers.silu(emb)  # ... B M D
        return Modulation(
            modulation_rows(self.blocks, lambda block: block.image, emb),
            modulation_rows(self.blocks, lambda block: block.context, emb[..., :1, :]),
            layers.dense32(self.final_mod, emb[..., 0, :]),
        )

    def modulation_table(self, timesteps: Float[Array, "S"], kind: Int[Array, "B"] | int = KIND) -> Modulation:
        """`modulation` of every step, steps leading, computed once before the sampling loop."""
        image, text, final = self.modulation(timesteps[:, None], kind)
        return Modulation(jnp.moveaxis(image, 1, 0), jnp.moveaxis(text, 1, 0), final)

    def embed_text(self, text: Float[Array, "B L J"]) -> Float[Array, "B L D"]:
        """States of the prompt to the model's width, padding last (`velocity` is told the lengths)."""
        return self.text(self.text_norm(text.astype(self.cfg.dtype)))

    def velocity(
        self,
        x: Float[Array, "B *T H W C"],
        modulation: Modulation,
        text: Float[Array, "B L D"],
        *,
        text_lengths: Int[Array, "B"] | None = None,
        pictures: Sequence[Float[Array, "B h w C"]] = (),
    ) -> Float[Array, "B *T H W C"]:
        """One evaluation, given `modulation` at this step and the embedded text.

        Args:
            x: one picture, or several layers.
            text_lengths: text tokens from this index on are padding; None where there is none.
            pictures: latents of given pictures (editing), each of its own size, numbered after those that are made; a
                batch of one serves all of x.

        Raises:
            ValueError: latents that do not divide into patches.
        """
        cfg = self.cfg
        made = x if x.ndim == 5 else x[:, None]
        both = (made, *(jnp.broadcast_to(p, (x.shape[0], *p.shape[1:]))[:, None] for p in pictures))
        grids = [patch_grid(p.shape[1:4], cfg.patch_3d) for p in both]
        tokens = jnp.concatenate([patchify_3d(p.astype(cfg.dtype), cfg.patch_3d) for p in both], 1)
        n, own = tokens.shape[1], math.prod(grids[0])
        rope = ms_rope(
            [g[1:] for g in grids[:1] * grids[0][0] + grids[1:]], text.shape[1], cfg.rope_dims, layered=cfg.layered
        )
        # upstream gives time 0 to all pictures but the first, further layers included
        kw: dict[str, Any] = dict(first=math.prod(grids[0][1:]), rope=rope, tokens=(n, text.shape[1]))
        if text_lengths is not None:
            kw["kv_lengths"] = n + text_lengths
        h = shard(whole_tiles(self.patch(tokens), cfg.rules), "batch", "seq", "width", rules=cfg.rules)
        text = whole_tiles(text, cfg.rules)
        call = lambda block, carry, rows: block(*carry, *rows, **kw)
        h, _ = layers.scan_blocks(self.blocks, (h, text), (modulation.image, modulation.text), call=call)
        shift, scale = jnp.moveaxis(modulation.final, -2, 0)
        out = unpatchify_3d(self.final(layers.modulate(h, shift, scale))[:, :own], cfg.patch_3d, grids[0])
        return out if x.ndim == 5 else out[:, 0]

    def __call__(self, x, t, text, *, text_lengths=None, pictures=(), kind=KIND):
        """Velocity for latents x (B, H, W, C) at timestep t (scalar or (B,)) and text states (B, L, J)."""
        rows = self.modulation(t, kind)
        return self.velocity(x, rows, self.embed_text(text), text_lengths=text_lengths, pictures=pictures)


def ms_rope(grids: Sequence[tuple[int, ...]], text: int, dims: Sequence[int], *, layered: bool = False) -> Rope:
    """MSRoPE (section 2.4 of the paper): pictures, one after another, before `text` tokens.

    A picture turns with its number and with rows and columns counted from its centre; text goes on along the diagonal
    of all three axes from where the largest picture ends.

    Args:
        grids: rows and columns of patches of each picture.
        layered: the last picture, the one that layers are taken from, is numbered -1.
    """
    centred = lambda n: np.arange(n) - (n - n // 2)
    numbers = [*range(len(grids) - 1), -1 if layered else len(grids) - 1]
    start = max(max(side // 2 for grid in grids for side in grid), len(grids) - 1 if layered else 0)
    parts = [grid_rope([np.array([i]), *map(centred, grid)], dims) for i, grid in zip(numbers, grids)]
    parts.append(rope_table([start + np.arange(text)] * 3, dims))
    return Rope(jnp.concatenate([p.cos for p in parts]), jnp.concatenate([p.sin for p in parts]))
