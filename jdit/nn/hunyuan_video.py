"""HunyuanVideo's transformer: text or picture to video (arXiv 2412.03603; upstream transformer_hunyuan_video.py).

Legend: B batch, T Y X latent frames, rows and columns, C latent channels, N video tokens, L text tokens of width J, D
width, K head dim, M rows of modulation, P pooled text width, S steps.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn import layers
from jdit.nn.context_parallel import attend, beside_products, whole_tiles
from jdit.nn.joint import JointBlock, SelfAttention, gated_add, modulation_rows, of_tokens
from jdit.nn.patch import patch_grid, patchify_3d, unpatchify_3d
from jdit.nn.rope import Rope, grid_rope
from jdit.sharding import Rules, shard

CONDITIONS = (None, "latent_concat", "token_replace")


@dataclasses.dataclass(frozen=True)
class HunyuanVideoConfig:
    """Architecture; the names in brackets are upstream's. The defaults are HunyuanVideo, text to video.

    Attributes:
        in_channels: of what `velocity` is given; with "latent_concat" the picture and its mask are among them.
        layers: of two streams [num_layers]. single_layers: of one fused stream. refiner_layers: of text alone.
        guidance: it is told the guidance scale that it was distilled for [guidance_embeds].
        text_dim: width of the language model's states [text_embed_dim]. pooled_dim: [pooled_projection_dim].
        theta: [rope_theta]. rope_dims: dims of a head that turn with frame, row and column [rope_axes_dim].
        condition: how a picture comes in [image_condition_type]: None; "latent_concat", by further channels;
            "token_replace", as the first frame, whose tokens are modulated as at time 0.
    """

    patch: int = 2
    patch_frames: int = 1
    in_channels: int = 16
    out_channels: int = 16
    layers: int = 20
    single_layers: int = 40
    refiner_layers: int = 2
    heads: int = 24
    head_dim: int = 128
    mlp_ratio: int = 4
    qk_norm: str | None = "rms_norm"
    guidance: bool = True
    text_dim: int = 4096
    pooled_dim: int = 768
    theta: float = 256.0
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    condition: str | None = None
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={self.qk_norm!r} is not supported; there are None and 'rms_norm'")
        if self.condition not in CONDITIONS:
            raise ValueError(f"image_condition_type={self.condition!r}; there are {', '.join(map(repr, CONDITIONS))}")
        if len(self.rope_dims) != 3 or sum(self.rope_dims) != self.head_dim or any(d % 2 for d in self.rope_dims):
            raise ValueError(
                f"rope_axes_dim={self.rope_dims} must be three even numbers whose sum is the head dim {self.head_dim}"
            )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        return self.mlp_ratio * self.width

    @property
    def patch_3d(self) -> tuple[int, int, int]:
        return self.patch_frames, self.patch, self.patch


class Modulation(NamedTuple):
    """Shifts, scales and gates, which depend on time, pooled text and guidance only, float32; a table for S steps has
    them as leading axis.

    M is 2 where the first frame has a row of its own, that of time 0 ("token_replace"), else 1.
    """

    video: Float[Array, "*S layers B M 6 D"]
    text: Float[Array, "*S layers B 1 6 D"]
    single: Float[Array, "*S single_layers B M 3 D"]
    final: Float[Array, "*S B 2 D"]

    def rows(self, at: Int[np.ndarray, "R"]) -> "Modulation":
        """That of these rows of the batch, in this order."""
        video, text, single = (m[..., at, :, :, :] for m in (self.video, self.text, self.single))
        return Modulation(video, text, single, self.final[..., at, :, :])


class RefinerBlock(nnx.Module):
    """Attention and MLP among text tokens, gated by time and the text's mean."""

    def __init__(self, cfg: HunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.mod = layers.fused_linear(d, 2, d, ("embed", "mlp"), **kw)
        self.norm1, self.norm2 = (layers.LayerNorm(d, eps=1e-6, dtype=cfg.dtype) for _ in range(2))
        self.attn = SelfAttention(dataclasses.replace(cfg, qk_norm=None), rngs=rngs)
        self.mlp = layers.Mlp(d, 4 * d, layers.silu, **kw)  # upstream: whatever mlp_ratio says

    def __call__(
        self, h: Float[Array, "B L D"], emb: Float[Array, "B D"], lengths: Int[Array, "B"] | None
    ) -> Float[Array, "B L D"]:
        gates = layers.dense32(self.mod, emb)[:, :, None]  # B 2 1 D
        seen = attend(*self.attn.project(self.norm1(h), self.cfg.rules), rules=self.cfg.rules, kv_lengths=lengths)
        h = gated_add(h, self.attn.merge(seen), gates[:, 0])
        h = gated_add(h, self.mlp(self.norm2(h)), gates[:, 1])
        return shard(h, "batch", "seq", "width", rules=self.cfg.rules)


class TokenRefiner(nnx.Module):
    """The language model's states, which are causal, to text tokens that see one another (section 4.3 of the paper)."""

    def __init__(self, cfg: HunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.time = layers.TimeMlp(256, cfg.width, **kw)
        self.pooled = layers.TimeMlp(cfg.text_dim, cfg.width, **kw)
        self.proj = layers.linear(cfg.text_dim, cfg.width, (None, "embed"), **kw)
        self.blocks = layers.stack(lambda r: RefinerBlock(cfg, rngs=r), cfg.refiner_layers, rngs)

    def __call__(
        self, t: Float[Array, "B"], text: Float[Array, "B L J"], lengths: Int[Array, "B"] | None
    ) -> Float[Array, "B L D"]:
        """Timesteps t may be (1,) for all."""
        dtype = self.cfg.dtype
        text, weights = text.astype(dtype), jnp.ones(text.shape[:2], jnp.float32)
        if lengths is not None:
            weights = (jnp.arange(text.shape[1]) < lengths[:, None]).astype(jnp.float32)
        mean = (text * weights[..., None]).sum(1) / weights.sum(1, keepdims=True)
        emb = self.time(layers.timestep_embedding(t, 256)).astype(jnp.float32) + self.pooled(mean.astype(dtype))
        emb = nnx.silu(emb).astype(dtype)
        h = shard(self.proj(text), "batch", "seq", "width", rules=self.cfg.rules)
        return layers.scan_blocks(self.blocks, h, call=lambda block, h, _: block(h, emb, lengths))


class SingleBlock(nnx.Module):
    """A block of one fused stream: attention and MLP side by side (arXiv 2302.05442).

    Queries, keys, values and the MLP's first layer are one product, and attention's output and the MLP's second layer
    another, in parts of width D, each of which is spread over devices by itself.
    """

    def __init__(self, cfg: HunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.mod = layers.fused_linear(d, 3, d, ("embed", "mlp"), **kw)
        self.attn = SelfAttention(cfg, out=False, more=cfg.mlp_ratio, rngs=rngs)
        self.out = layers.joined_linear(1 + cfg.mlp_ratio, d, d, ("mlp", "embed"), **kw)

    def __call__(
        self,
        h: Float[Array, "B N+L D"],
        rows: Float[Array, "B M 3 D"],
        *,
        first: int,
        rope: Rope,
        kv_lengths: Int[Array, "B"] | None,
        tokens: int | None = None,
    ) -> Float[Array, "B N+L D"]:
        """Arguments as of `JointBlock`, of one stream."""
        shift, scale, gate = of_tokens(rows, h.shape[1], first)
        given, qkv, rules = layers.modulate_rows(h, shift, scale), self.attn.qkv, self.cfg.rules
        # one product, but where the MLP's is to run while what attention needs or gives is sent
        made = None if beside_products(self.attn.heads, h.shape[1], rules) else qkv(given)
        with jax.named_scope("attention"):
            q, k, v = self.attn.project(given, rules, rope) if made is None else self.attn.split(made, rope)
            seen = attend(q, k, v, rules=rules, kv_lengths=kv_lengths, tokens=tokens)
        with jax.named_scope("mlp"):
            # attention's output in the place of v: a selection, where a concatenation is slow on GPUs (pieces.joined)
            is_seen = np.arange(1 + self.cfg.mlp_ratio)[:, None] == 0
            if made is None:
                more = layers.some_parts(qkv, given, slice(3, None), rules)
                more = jnp.pad(more, ((0, 0), (0, 0), (1, 0), (0, 0)))
            else:
                more = made[:, :, 2:]
            both = jnp.where(is_seen, seen[:, :, None], layers.gelu_tanh(more))
            h = gated_add(h, self.out(both), gate)
        return shard(h, "batch", "seq", "width", rules=rules)


class HunyuanVideo(nnx.Module):
    """The whole network: latents and text to the flow velocity (noise minus data)."""

    # Refined text depends on time and prompt alone. 256 tokens of it are 1.6 MB a step, 79 MB of 50 steps, less than
    # the refiner's 0.6 GB of weights (bfloat16): `text_table` makes that of all steps before the loop.
    modulation_weights: ClassVar = (  # see jdit.nn.parts
        "time.*", "guidance.*", "pooled.*", "refiner.*", "blocks.*.mod.*", "singles.mod.*", "final_mod.*",
    )  # fmt: skip

    def __init__(self, cfg: HunyuanVideoConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, size = cfg.width, math.prod(cfg.patch_3d)
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        self.patch = layers.linear(size * cfg.in_channels, d, (None, "embed"), **kw)
        self.time = layers.TimeMlp(256, d, **kw)
        self.guidance = layers.TimeMlp(256, d, **kw) if cfg.guidance else None
        self.pooled = layers.TimeMlp(cfg.pooled_dim, d, **kw)
        self.refiner = TokenRefiner(cfg, rngs=rngs)
        self.blocks = layers.stack(lambda r: JointBlock(cfg, rngs=r), cfg.layers, rngs)
        self.singles = layers.stack(lambda r: SingleBlock(cfg, rngs=r), cfg.single_layers, rngs)
        self.final_mod = layers.fused_linear(d, 2, d, ("embed", "mlp"), **kw)
        self.final = layers.linear(d, size * cfg.out_channels, ("embed", None), **kw)

    def modulation(
        self,
        t: Float[Array, "..."] | float,
        pooled: Float[Array, "B P"],
        guidance: Float[Array, "B"] | float | None = None,
    ) -> Modulation:
        """Shifts, scales and gates of every layer.

        Args:
            t: timesteps in [0, 1000]: a scalar, (B,), or (S, 1) for a table of S steps.
            pooled: CLIP's text.
            guidance: 1000 times the embedded scale (`sampling.embedded_scale`), where the config has guidance.

        Returns:
            leaves with the axes of t leading, those of the blocks after the layers'.

        Raises:
            ValueError: guidance is missing, or the model takes none.
        """
        if (guidance is None) != (self.guidance is None):
            what = "takes no embedded guidance" if self.guidance is None else "needs the guidance scale"
            raise ValueError(f"guidance={guidance}: this transformer {what} (guidance_embeds={self.cfg.guidance})")
        embed = lambda mlp, t: mlp(layers.timestep_embedding(t, 256)).astype(jnp.float32)
        t, text = jnp.asarray(t, jnp.float32), self.pooled(pooled.astype(self.cfg.dtype)).astype(jnp.float32)
        emb = embed(self.time, t.reshape(-1) if t.ndim < 2 else t) + text
        if self.guidance is not None:
            emb += embed(self.guidance, jnp.asarray(guidance, jnp.float32).reshape(-1))
        rows = [emb]
        if self.cfg.condition == "token_replace":  # upstream leaves guidance out of it
            rows = [jnp.broadcast_to(embed(self.time, jnp.zeros(1)) + text, emb.shape), emb]
        both = nnx.silu(jnp.stack(rows, -2)).astype(self.cfg.dtype)  # ... B M D
        return Modulation(
            modulation_rows(self.blocks, lambda block: block.image, both),
            modulation_rows(self.blocks, lambda block: block.context, both[..., -1:, :]),
            modulation_rows(self.singles, lambda block: block, both),
            layers.dense32(self.final_mod, both[..., -1, :]),
        )

    def modulation_table(
        self,
        timesteps: Float[Array, "S"],
        pooled: Float[Array, "B P"],
        guidance: Float[Array, "B"] | float | None = None,
    ) -> Modulation:
        """`modulation` of every step, steps leading, computed once before the sampling loop."""
        video, text, single, final = self.modulation(timesteps[:, None], pooled, guidance)
        by_step = lambda m: jnp.moveaxis(m, 1, 0)
        return Modulation(by_step(video), by_step(text), by_step(single), final)

    def embed_text(
        self,
        t: Float[Array, "B"] | float,
        text: Float[Array, "B L J"],
        *,
        text_lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The language model's states, padding last, as the text tokens of timestep t (a scalar or (B,))."""
        return self.refiner(jnp.asarray(t, jnp.float32).reshape(-1), text, text_lengths)

    def text_table(
        self,
        timesteps: Float[Array, "S"],
        text: Float[Array, "B L J"],
        *,
        text_lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "S B L D"]:
        """`embed_text` of every step, computed once before the sampling loop, one step after another."""
        return jax.lax.map(lambda t: self.embed_text(t, text, text_lengths=text_lengths), timesteps)

    def velocity(
        self,
        x: Float[Array, "B T Y X C"],
        modulation: Modulation,
        text: Float[Array, "B L D"],
        *,
        text_lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T Y X C"]:
        """One evaluation, given `modulation` and `embed_text` at this step.

        Args:
            x: with "latent_concat", the channels of latents, picture and mask; with "token_replace", the first frame is
                the picture.
            text_lengths: text tokens from this index on are padding; None where there is none.

        Raises:
            ValueError: latents that do not divide into patches.
        """
        cfg = self.cfg
        grid = patch_grid(x.shape[1:4], cfg.patch_3d)
        n, m, rope = math.prod(grid), text.shape[1], self.rope(grid, text.shape[1])
        spread = lambda h: shard(whole_tiles(h, cfg.rules), "batch", "seq", "width", rules=cfg.rules)
        kw: dict[str, Any] = dict(first=math.prod(grid[1:]))
        kw["kv_lengths"] = None if text_lengths is None else n + text_lengths
        h = spread(self.patch(patchify_3d(x.astype(cfg.dtype), cfg.patch_3d)))
        call = lambda block, carry, rows: block(*carry, *rows, rope=rope, tokens=(n, m), **kw)
        video, words = layers.scan_blocks(
            self.blocks, (h, whole_tiles(text, cfg.rules)), (modulation.video, modulation.text), call=call
        )
        h = spread(jnp.concatenate([video[:, :n], words[:, :m]], 1))
        kw |= dict(rope=rope.padded(h.shape[1]), tokens=n + m)
        h = layers.scan_blocks(self.singles, h, modulation.single, call=lambda block, h, rows: block(h, rows, **kw))
        shift, scale = jnp.moveaxis(modulation.final, -2, 0)
        return unpatchify_3d(self.final(layers.modulate(h, shift, scale))[:, :n], cfg.patch_3d, grid)

    def rope(self, grid: tuple[int, ...], text: int) -> Rope:
        """Rotary positions of a grid of patches, and of `text` tokens after it, which are left as they are."""
        video = grid_rope([np.arange(n) for n in grid], self.cfg.rope_dims, self.cfg.theta)
        after = jnp.zeros((text, self.cfg.head_dim // 2), jnp.float32)
        return Rope(jnp.concatenate([video.cos, after + 1]), jnp.concatenate([video.sin, after]))

    def __call__(self, x, t, text, pooled, guidance=None, *, text_lengths=None):
        """Velocity for latents x (B, T, Y, X, C) at timestep t (scalar or (B,)), states of the language model (B, L, J)
        and pooled text (B, P)."""
        rows, tokens = self.modulation(t, pooled, guidance), self.embed_text(t, text, text_lengths=text_lengths)
        return self.velocity(x, rows, tokens, text_lengths=text_lengths)
