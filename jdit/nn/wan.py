"""Wan's video transformer, 2.1 and 2.2 (arXiv 2503.20314; upstream transformer_wan.py).

Legend: B batch, T Y X latent frames, rows and columns, C latent channels, N tokens, D width, H heads, K head dim, L
text tokens of width J, I image tokens of width E, M rows of modulation a sample, S steps. One stream of video tokens
attends to itself with rotary positions, then to text (and a picture's tokens) whose keys depend on the prompt alone.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn import layers
from jdit.nn.context_parallel import attend, project, whole_tiles
from jdit.nn.patch import patch_grid, patchify_3d, unpatchify_3d
from jdit.nn.rope import Rope, apply_rope, grid_rope
from jdit.sharding import Rules, shard

IMAGE_EPS = 1e-5
KeysValues = tuple[Float[Array, "*layers B L H K"], Float[Array, "*layers B L H K"]]


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Architecture; the names in brackets are upstream's. The defaults are Wan 2.1 T2V 14B.

    Attributes:
        patch: frames, rows and columns of a patch [patch_size].
        mlp: [ffn_dim]. freq_dim: features of the timestep.
        cross_norm: affine norm before cross-attention [cross_attn_norm].
        image_dim: width of the image encoder's tokens; None takes no picture.
        image_keys: the picture has keys and values of its own [added_kv_proj_dim, which must be the width]; without
            them its tokens go before the text's.
        image_positions: learned positions of the image tokens [pos_embed_seq_len]: first and last frame, side by side.
        max_positions: the longest axis of the token grid [rope_max_seq_len].
    """

    patch: tuple[int, int, int] = (1, 2, 2)
    heads: int = 40
    head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    mlp: int = 13824
    layers: int = 40
    cross_norm: bool = True
    eps: float = 1e-6
    image_dim: int | None = None
    image_keys: bool = False
    image_positions: int | None = None
    max_positions: int = 1024
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        if len(self.patch) != 3:
            raise ValueError(f"patch {self.patch} must have three sizes: frames, rows, columns")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """How many dims of a head turn with the frame, the row and the column."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side


class Modulation(NamedTuple):
    """Everything that depends on time only, float32. A table for S steps has them as leading axis.

    Each of the M rows of a sample serves N/M consecutive tokens: one row for all, one a latent frame, or one a token.
    """

    block: Float[Array, "*S B M 6 D"]
    final: Float[Array, "*S B M 2 D"]


class Context(NamedTuple):
    """Keys and values of cross-attention, of every layer (leading axis) or of one; they depend on the prompt only.

    counts: text token j stands for counts[j] equal tokens (padding, all of which upstream attends to).
    """

    text: KeysValues
    image: KeysValues | None
    counts: Float[Array, "*layers L"] | None = None


class SelfAttention(nnx.Module):
    """Attention among video tokens; queries and keys are normalised across heads and rotated."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.width
        self.qkv = layers.fused_linear(d, 3, d, ("embed", "heads"), dtype=cfg.dtype, rngs=rngs)
        self.norm_q, self.norm_k = _across_heads(cfg), _across_heads(cfg)
        self.out = layers.linear(d, d, ("heads", "embed"), dtype=cfg.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], rope: Rope, tokens: int | None = None) -> Float[Array, "B N D"]:
        cfg = self.cfg
        turn = lambda norm: lambda a: apply_rope(_split(cfg, norm(a, rotated=True)), rope)
        q, k, v = project(self.qkv, x, turn(self.norm_q), turn(self.norm_k), cfg.heads, cfg.rules)
        return self.out(attend(q, k, _split(cfg, v), rules=cfg.rules, tokens=tokens))


class CrossAttention(nnx.Module):
    """Attention of video tokens to text and, apart from it and added to it, to a picture."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.q = layers.linear(d, d, ("embed", "heads"), **kw)
        self.kv = layers.fused_linear(d, 2, d, ("embed", "heads"), **kw)
        self.norm_q, self.norm_k = _across_heads(cfg), _across_heads(cfg)
        self.image_kv = layers.fused_linear(d, 2, d, ("embed", "heads"), **kw) if cfg.image_keys else None
        self.norm_image_k = _across_heads(cfg) if cfg.image_keys else None
        self.out = layers.linear(d, d, ("heads", "embed"), **kw)

    def context(self, text: Float[Array, "B L D"], image: Float[Array, "B I D"] | None) -> Context:
        """Keys and values of the embedded prompt."""

        def whole(dense, norm, states) -> KeysValues:
            kv = dense(states)
            pair = _split(self.cfg, norm(kv[:, :, 0])), _split(self.cfg, kv[:, :, 1])
            k, v = (shard(a, "batch", None, "heads", None, rules=self.cfg.rules) for a in pair)
            return k, v

        picture = None if image is None else whole(self.image_kv, self.norm_image_k, image)
        return Context(whole(self.kv, self.norm_k, text), picture)

    def __call__(self, x: Float[Array, "B N D"], context: Context) -> Float[Array, "B N D"]:
        q = _split(self.cfg, self.norm_q(self.q(x)))
        seen = functools.partial(attend, q, rules=self.cfg.rules, whole_keys=True)
        out = seen(*context.text, key_counts=context.counts)
        return self.out(out if context.image is None else out + seen(*context.image))


class WanBlock(nnx.Module):
    """Self-attention, cross-attention, MLP; the first and the last are modulated by time."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.table = _table(6, cfg.width, rngs)
        self.attn = SelfAttention(cfg, rngs=rngs)
        self.norm = layers.LayerNorm(cfg.width, eps=cfg.eps, dtype="float32") if cfg.cross_norm else None
        self.cross = CrossAttention(cfg, rngs=rngs)
        self.mlp = layers.Mlp(cfg.width, cfg.mlp, layers.gelu_tanh, dtype=cfg.dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        modulation: Float[Array, "B M 6 D"],
        rope: Rope,
        context: Context,
        tokens: int | None = None,
    ) -> Float[Array, "B N D"]:
        """`tokens` is how many there are; padding may follow them (`whole_tiles`)."""
        cfg, n = self.cfg, x.shape[1]
        shift, scale, gate, shift_2, scale_2, gate_2 = jnp.moveaxis(self.table.get_value() + modulation, -2, 0)
        modulate = lambda x, shift, scale: layers.modulate_rows(x, shift, scale, cfg.eps)
        add = lambda x, update, gate: (x + layers.spread(gate, n) * update).astype(x.dtype)
        with jax.named_scope("self_attention"):
            x = add(x, self.attn(modulate(x, shift, scale), rope, tokens), gate)
        with jax.named_scope("cross_attention"):
            x = x + self.cross(x if self.norm is None else self.norm(x), context)
        with jax.named_scope("mlp"):
            x = add(x, self.mlp(modulate(x, shift_2, scale_2)), gate_2)
        return shard(x, "batch", "seq", "width", rules=cfg.rules)


class ImageEmbedding(nnx.Module):
    """An image encoder's tokens to the model's width; with learned positions for the tokens of two pictures."""

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        e, p = cfg.image_dim, cfg.image_positions
        assert e is not None, "this transformer takes no picture"
        self.pos = None if p is None else nnx.Param(jnp.zeros((p, e), cfg.dtype), axes=(None, None))
        self.norm_in = layers.LayerNorm(e, eps=IMAGE_EPS, dtype="float32")
        self.mlp = layers.Mlp(e, e, layers.gelu, d_out=cfg.width, dtype=cfg.dtype, rngs=rngs)
        self.norm_out = layers.LayerNorm(cfg.width, eps=IMAGE_EPS, dtype="float32")

    def __call__(self, x: Float[Array, "B I E"]) -> Float[Array, "B I D"]:
        if self.pos is not None:
            pos = self.pos.get_value()
            if len(pos) not in (x.shape[1], 2 * x.shape[1]) or x.shape[0] * x.shape[1] % len(pos):
                raise ValueError(f"image tokens {x.shape[:2]}: those of first and last frame are {len(pos)} together")
            x = x.reshape(-1, *pos.shape) + pos
        return self.norm_out(self.mlp(self.norm_in(x)))


class WanTrunk(nnx.Module):
    """What Wan's transformers have in common: time, text and a picture in, the stack of blocks, latents in and out."""

    modulation_weights: ClassVar = ("time.*", "time_mod.*", "final_table")  # see jdit.nn.parts

    def __init__(self, cfg: WanConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, size = cfg.width, int(np.prod(cfg.patch))
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.patch = layers.linear(size * cfg.in_channels, d, (None, "embed"), **kw)
        self.time = layers.TimeMlp(cfg.freq_dim, d, dtype="float32", rngs=rngs)
        self.time_mod = layers.fused_linear(d, 6, d, ("embed", "mlp"), **kw)
        self.text = layers.Mlp(cfg.text_dim, d, layers.gelu_tanh, d_out=d, **kw)
        self.image = None if cfg.image_dim is None else ImageEmbedding(cfg, rngs=rngs)
        self.blocks = layers.stack(lambda r: WanBlock(cfg, rngs=r), cfg.layers, rngs)
        self.final_table = _table(2, d, rngs)
        self.final = layers.linear(d, size * cfg.out_channels, ("embed", None), **kw)

    def modulation(self, t: Float[Array, "..."] | float) -> Modulation:
        """What time does to every layer, before each layer adds its own table.

        Args:
            t: timesteps in [0, 1000]: a scalar, (B,), (B, M), or (S, B, M) for a table of S steps.
        """
        t = jnp.asarray(t, jnp.float32)
        t = t.reshape(-1, 1) if t.ndim < 2 else t
        with jax.default_matmul_precision("highest"):  # float32 as upstream's; it is made once
            emb = self.time(layers.timestep_embedding(t, self.cfg.freq_dim))
        block = layers.dense32(self.time_mod, layers.silu(emb))
        return Modulation(block, self.final_table.get_value() + emb[..., None, :])

    def modulation_table(self, timesteps: Float[Array, "S"] | Float[Array, "S B M"]) -> Modulation:
        """`modulation` of every step, steps leading, computed once before the sampling loop."""
        return self.modulation(timesteps[:, None, None] if timesteps.ndim == 1 else timesteps)

    def embed_context(
        self,
        text: Float[Array, "B L J"],
        image: Float[Array, "B I E"] | None = None,
        counts: Float[Array, "L"] | None = None,
    ) -> Context:
        """Every layer's keys and values, computed once a prompt.

        Args:
            text: states of all tokens; upstream attends to its padding (zeros) too.
            image: the image encoder's tokens; with learned positions, those of the first frame, then of the last, as
                (B, I, E) or, as upstream stacks them, (2 B, I / 2, E).
            counts: text token j stands for counts[j] equal tokens; None where each stands for itself. Not with a
                picture whose tokens go before the text's.

        Raises:
            ValueError: a picture for a transformer that takes none, or another number of tokens than it has positions.
        """
        cfg = self.cfg
        states = self.text(text.astype(cfg.dtype))
        if image is not None and self.image is None:
            raise ValueError("image tokens were given, but this transformer has no image embedding (image_dim=None)")
        picture = None if image is None or self.image is None else self.image(image.astype(cfg.dtype))
        if picture is not None and not cfg.image_keys:
            if counts is not None:
                raise ValueError("counts are of text tokens alone, and this transformer puts the picture's before them")
            states, picture = jnp.concatenate([picture, states], 1), None
        keys = lambda block: block.cross.context(states, picture)._replace(counts=counts)
        return jax.lax.map(keys, self.blocks)

    def embed(self, x: Float[Array, "B T Y X C"], modulation: Modulation) -> Float[Array, "B N D"]:
        """Latents to tokens, with padding behind them (`whole_tiles`) unless time differs between tokens."""
        tokens = self.patch(patchify_3d(x.astype(self.cfg.dtype), self.cfg.patch))
        tokens = whole_tiles(tokens, self.cfg.rules) if modulation.block.shape[1] == 1 else tokens
        return shard(tokens, "batch", "seq", "width", rules=self.cfg.rules)

    def rope(self, grid: tuple[int, ...]) -> Rope:
        """Rotary positions of a grid of frames, rows and columns of patches."""
        cfg = self.cfg
        if max(grid) > cfg.max_positions:
            raise ValueError(f"a grid of {grid} patches; a side may be {cfg.max_positions} (rope_max_seq_len)")
        return grid_rope([np.arange(n) for n in grid], cfg.rope_dims)

    def head(
        self, h: Float[Array, "B N D"], final: Float[Array, "B M 2 D"], grid: tuple[int, ...]
    ) -> Float[Array, "B T Y X C"]:
        """Tokens to the velocity."""
        h = layers.modulate_rows(h, final[..., 0, :], final[..., 1, :], self.cfg.eps)
        return unpatchify_3d(self.final(h)[:, : math.prod(grid)], self.cfg.patch, grid)


class Wan(WanTrunk):
    """The whole network: latents, text and a picture to the flow velocity (noise minus data)."""

    def velocity(
        self, x: Float[Array, "B T Y X C"], modulation: Modulation, context: Context
    ) -> Float[Array, "B T Y X C"]:
        """One evaluation, given `modulation` at this step and the prompt's keys and values.

        Raises:
            ValueError: latents that do not divide into patches, or of more patches a side than there are positions.
        """
        cfg = self.cfg
        grid = patch_grid(x.shape[1:4], cfg.patch)
        h, tokens = self.embed(x, modulation), math.prod(grid)
        rope = self.rope(grid).padded(h.shape[1])
        call = lambda block, h, c: block(h, modulation.block, rope, c, tokens)
        return self.head(layers.scan_blocks(self.blocks, h, context, call=call), modulation.final, grid)

    def __call__(self, x, t, text, image=None):
        """Velocity for latents x (B, T, Y, X, C) at timestep t (scalar, (B,), or one a token or a frame, (B, M)), text
        states (B, L, J) and image tokens (B, I, E); see `modulation` and `embed_context`."""
        return self.velocity(x, self.modulation(t), self.embed_context(text, image))


def _across_heads(cfg: WanConfig) -> layers.RMSNorm:
    return layers.RMSNorm(cfg.width, eps=cfg.eps, dtype=cfg.dtype)


def _split(cfg: WanConfig, x: Float[Array, "B N D"]) -> Float[Array, "B N H K"]:
    return x.reshape(*x.shape[:2], cfg.heads, cfg.head_dim)


def _table(parts: int, d: int, rngs: nnx.Rngs) -> nnx.Param:
    """Learned shifts, scales and gates, in float32 whatever the compute dtype."""
    return nnx.Param(jax.random.normal(rngs.params(), (parts, d)) / d**0.5, axes=(None, None))
