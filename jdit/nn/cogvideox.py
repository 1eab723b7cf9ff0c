"""CogVideoX's transformer, 1.0 and 1.5 (arXiv 2408.06072; upstream cogvideox_transformer_3d.py).

Legend: B batch, T Y X latent frames, rows and columns, C latent channels, L text tokens of width J, N video tokens, M =
L + N tokens of the joined sequence, text first, D width, H heads, K head dim, E width of the time embedding, S steps.
Text and video share all weights but those that make the shifts, scales and gates of time ("expert" layer norms).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn import layers
from jdit.nn.context_parallel import attend, project, whole_tiles
from jdit.nn.patch import patch_grid, patchify_3d, sincos_3d, unpatchify_3d
from jdit.nn.rope import Rope, apply_rope, grid_rope
from jdit.sharding import Rules, shard

ACTIVATIONS = {"gelu-approximate": layers.gelu_tanh, "gelu": layers.gelu}
QK_EPS = 1e-6
OFS = 2.0
"""What upstream's pipeline always gives the offset embedding of 1.5 image to video."""


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """Architecture; the names in brackets are upstream's. The defaults are CogVideoX-2B.

    Attributes:
        patch: rows and columns of a patch [patch_size]. patch_frames: its frames [patch_size_t]; None is 1.0, whose
            patches have one and whose rotary grid is fitted into the sample size; a number is 1.5.
        time_dim: [time_embed_dim]. ofs_dim: of the offset embedding, None has none [ofs_embed_dim].
        sample_width, sample_height, sample_frames: what positions were laid out for, in latents but for the frames.
        time_factor: frames a latent frame [temporal_compression_ratio].
        text_tokens: length of a prompt [max_text_seq_length].
        act: of the MLP [activation_fn]. affine: layer norms have scale and bias [norm_elementwise_affine].
        space_scale, time_scale: sine-cosine positions are divided by them [spatial_, temporal_interpolation_scale].
        rotary: [use_rotary_positional_embeddings], else sine-cosine positions are added to the tokens; `learned` adds
            learned ones [use_learned_positional_embeddings].
    """

    heads: int = 30
    head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_dim: int = 512
    ofs_dim: int | None = None
    text_dim: int = 4096
    layers: int = 30
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch: int = 2
    patch_frames: int | None = None
    time_factor: int = 4
    text_tokens: int = 226
    act: str = "gelu-approximate"
    affine: bool = True
    eps: float = 1e-5
    space_scale: float = 1.875
    time_scale: float = 1.0
    rotary: bool = False
    learned: bool = False
    patch_bias: bool = True
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        if self.act not in ACTIVATIONS:
            raise ValueError(f"activation_fn={self.act!r} is not supported; there are {', '.join(ACTIVATIONS)}")
        if self.learned and not self.rotary:
            raise ValueError("use_learned_positional_embeddings needs use_rotary_positional_embeddings")
        if self.patch_frames is not None and (self.learned or not self.rotary):
            raise ValueError(f"patch_size_t={self.patch_frames} goes with rotary positions alone")
        if self.rotary and self.head_dim % 16:
            raise ValueError(f"attention_head_dim={self.head_dim} must be a multiple of 16: rotary positions split it")
        if self.width % 16 and not self.rotary:
            raise ValueError(f"the width {self.width} must be a multiple of 16: sine-cosine positions split it")
        if self.ofs_dim not in (None, self.time_dim):
            raise ValueError(f"ofs_embed_dim={self.ofs_dim} must equal time_embed_dim={self.time_dim}: they are added")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def patch_3d(self) -> tuple[int, int, int]:
        return self.patch_frames or 1, self.patch, self.patch

    @property
    def base(self) -> tuple[int, int, int]:
        """The grid of patches that positions were laid out for (1.0)."""
        frames = (self.sample_frames - 1) // self.time_factor + 1
        return frames, self.sample_height // self.patch, self.sample_width // self.patch

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """How many dims of a head turn with the frame, the row and the column."""
        return self.head_dim // 4, self.head_dim // 8 * 3, self.head_dim // 8 * 3


class Modulation(NamedTuple):
    """Everything that depends on time only, float32; a table for S steps has them as leading axis.

    A block has two norms, of video and of text each: the axes of 2 and 2, then shift, scale and gate. What a norm is
    scaled with has its own weights in it, so that normalising takes these rows alone.
    """

    block: Float[Array, "*S layers B 2 2 3 D"]
    final: Float[Array, "*S B 2 D"]


class JointAttention(nnx.Module):
    """Attention among all tokens; queries and keys are normalised a head, those of video rotated."""

    def __init__(self, cfg: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, bias = cfg.width, cfg.attention_bias
        self.qkv = layers.fused_linear(d, 3, d, ("embed", "heads"), bias=bias, dtype=cfg.dtype, rngs=rngs)
        self.norm_q, self.norm_k = (layers.LayerNorm(cfg.head_dim, eps=QK_EPS, dtype=cfg.dtype) for _ in "qk")
        self.out = layers.linear(d, d, ("heads", "embed"), dtype=cfg.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B M D"], rope: Rope | None, tokens: int | None = None) -> Float[Array, "B M D"]:
        cfg = self.cfg
        heads = lambda a: a.reshape(*a.shape[:2], cfg.heads, cfg.head_dim)
        rotate = lambda a: a if rope is None else apply_rope(a, rope)
        turn = lambda norm: lambda a: rotate(norm(heads(a), rotated=rope is not None))
        q, k, v = project(self.qkv, x, turn(self.norm_q), turn(self.norm_k), cfg.heads, cfg.rules)
        return self.out(attend(q, k, heads(v), rules=cfg.rules, tokens=tokens))


class CogVideoXBlock(nnx.Module):
    """Attention and MLP over the joined sequence, each modulated by time, text and video apart."""

    def __init__(self, cfg: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.width
        self.mod = layers.fused_linear(cfg.time_dim, 12, d, ("embed", "mlp"), dtype=cfg.dtype, rngs=rngs)
        self.norm1, self.norm2 = _norm(cfg), _norm(cfg)
        self.attn = JointAttention(cfg, rngs=rngs)
        self.mlp = layers.Mlp(d, 4 * d, ACTIVATIONS[cfg.act], dtype=cfg.dtype, rngs=rngs)

    def modulation(self, emb: Float[Array, "*S B E"]) -> Float[Array, "*S B 2 2 3 D"]:
        """Rows of both norms."""
        rows = layers.dense32(self.mod, emb)
        rows = rows.reshape(*rows.shape[:-2], 2, 2, 3, -1)
        norms = (_fold(rows[..., i, :, :, :], norm) for i, norm in enumerate((self.norm1, self.norm2)))
        return jnp.stack(list(norms), -4)

    def __call__(
        self,
        h: Float[Array, "B M D"],
        rows: Float[Array, "B 2 2 3 D"],
        rope: Rope | None,
        text: int,
        tokens: int | None = None,
    ) -> Float[Array, "B M D"]:
        """`text` is the number of text tokens, `tokens` of all; padding may follow them (`whole_tiles`)."""
        is_text = (jnp.arange(h.shape[1]) < text)[:, None]

        def add(h, rows, layer):
            pick = lambda i: jnp.where(is_text, rows[:, 1, None, i], rows[:, 0, None, i])  # B M D, fused with its use
            x = (layers.layer_norm(h, self.cfg.eps) * pick(1) + pick(0)).astype(h.dtype)
            return (h + pick(2) * layer(x)).astype(h.dtype)

        with jax.named_scope("joint_attention"):
            h = add(h, rows[:, 0], lambda x: self.attn(x, rope, tokens))
        with jax.named_scope("mlp"):
            h = add(h, rows[:, 1], self.mlp)
        return shard(h, "batch", "seq", "width", rules=self.cfg.rules)


class CogVideoX(nnx.Module):
    """The whole network: latents and text to v (alpha noise - sigma data)."""

    modulation_weights: ClassVar = (  # see jdit.nn.parts
        "time.*", "ofs.*", "blocks.mod.*", "blocks.norm?.*", "final_mod.*", "final_norm.*",
    )  # fmt: skip

    def __init__(self, cfg: CogVideoXConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, size = cfg.width, int(np.prod(cfg.patch_3d))
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        bias = cfg.patch_bias or cfg.patch_frames is not None  # upstream's dense patches of 1.5 always have one
        self.patch = layers.linear(size * cfg.in_channels, d, (None, "embed"), bias=bias, **kw)
        self.text = layers.linear(cfg.text_dim, d, (None, "embed"), **kw)
        positions = cfg.text_tokens + int(np.prod(cfg.base))  # of text, too
        table = lambda: jnp.zeros((positions, d), cfg.dtype)
        self.pos = nnx.Param(table(), axes=(None, "embed"), fixed=True) if cfg.learned else None
        self.time = layers.TimeMlp(d, cfg.time_dim, **kw)
        self.ofs = None if cfg.ofs_dim is None else layers.TimeMlp(cfg.ofs_dim, cfg.ofs_dim, **kw)
        self.blocks = layers.stack(lambda r: CogVideoXBlock(cfg, rngs=r), cfg.layers, rngs)
        self.norm, self.final_norm = _norm(cfg), _norm(cfg)
        self.final_mod = layers.fused_linear(cfg.time_dim, 2, d, ("embed", "mlp"), **kw)
        self.final = layers.linear(d, size * cfg.out_channels, ("embed", None), **kw)

    def modulation(self, t: Float[Array, "..."] | float, ofs: float = OFS) -> Modulation:
        """What time does to every layer.

        Args:
            t: timesteps in [0, 1000]: a scalar, (B,), or (S, B) for a table of S steps.
            ofs: the offset that 1.5 image to video is told; others do not read it.

        Returns:
            leaves with the axes of t leading, those of the blocks after the layers'.
        """
        cfg, t = self.cfg, jnp.asarray(t, jnp.float32)
        emb = self.time(layers.timestep_embedding(t.reshape(-1) if t.ndim < 2 else t, cfg.width))
        if self.ofs is not None:
            emb += self.ofs(layers.timestep_embedding(jnp.full(1, ofs, jnp.float32), cfg.time_dim))
        emb = layers.silu(emb)
        # layer by layer: all layers' products at once would hold every float32 result and kernel copy together
        block = jax.lax.map(lambda block: block.modulation(emb), self.blocks)
        return Modulation(block, _fold(layers.dense32(self.final_mod, emb), self.final_norm))

    def modulation_table(self, timesteps: Float[Array, "S"], ofs: float = OFS) -> Modulation:
        """`modulation` of every step, steps leading, computed once before the sampling loop."""
        table = self.modulation(timesteps[:, None], ofs)
        return table._replace(block=jnp.moveaxis(table.block, 1, 0))

    def embed_text(self, text: Float[Array, "B L J"]) -> Float[Array, "B L D"]:
        """States of all tokens of the prompt to the model's width; padding counts, as upstream.

        Raises:
            ValueError: another number of tokens than there are positions for.
        """
        cfg = self.cfg
        if text.shape[1] != cfg.text_tokens and (cfg.learned or not cfg.rotary):
            raise ValueError(f"{text.shape[1]} text tokens; this transformer has positions for {cfg.text_tokens}")
        return self.text(text.astype(cfg.dtype))

    def velocity(
        self, x: Float[Array, "B T Y X C"], modulation: Modulation, text: Float[Array, "B L D"]
    ) -> Float[Array, "B T Y X C"]:
        """One evaluation, given `modulation` at this step and the embedded text.

        Raises:
            ValueError: latents that do not divide into patches, or that there are no positions for.
        """
        cfg, length = self.cfg, text.shape[1]
        grid = patch_grid(x.shape[1:4], cfg.patch_3d)
        h, rope, tokens = self.embed(x, text, grid), self.rope(grid, length), length + int(np.prod(grid))
        rope = rope and rope.padded(h.shape[1])
        call = lambda block, h, rows: block(h, rows, rope, length, tokens)
        h = layers.scan_blocks(self.blocks, h, modulation.block, call=call)
        return self.head(h[:, length:tokens], modulation.final, grid)

    def embed(
        self, x: Float[Array, "B T Y X C"], text: Float[Array, "B L D"], grid: tuple[int, ...]
    ) -> Float[Array, "B M D"]:
        """Text and latents as the joined sequence, with the positions that are added and padding behind it
        (`whole_tiles`)."""
        cfg = self.cfg
        video = self.patch(patchify_3d(x.astype(cfg.dtype), cfg.patch_3d))
        frames, height, width = x.shape[1:4]
        if cfg.learned and (height, width) != (cfg.sample_height, cfg.sample_width):
            own = (cfg.sample_height, cfg.sample_width)
            raise ValueError(f"latents of {(height, width)}: learned positions are for {own} alone")
        if self.pos is not None and (frames - 1) * cfg.time_factor + 1 == cfg.sample_frames:
            h = jnp.concatenate([text, video], 1) + self.pos.get_value()
        else:
            if cfg.learned or not cfg.rotary:  # other numbers of frames have none that were learned
                scales = (cfg.time_scale, cfg.space_scale, cfg.space_scale)
                video += sincos_3d(cfg.width, grid, scales).astype(video.dtype)
            h = jnp.concatenate([text, video], 1)
        return shard(whole_tiles(h, cfg.rules), "batch", "seq", "width", rules=cfg.rules)

    def rope(self, grid: tuple[int, ...], text: int) -> Rope | None:
        """Rotary positions of `text` tokens, which are left as they are, and of a grid of patches."""
        cfg = self.cfg
        if not cfg.rotary:
            return None
        if cfg.patch_frames is None:
            rows, columns = fitted(grid[1:], cfg.base[1:])
        elif grid[1] > cfg.base[1] or grid[2] > cfg.base[2]:
            raise ValueError(f"a grid of {grid[1:]} patches; there are positions for {cfg.base[1:]}")
        else:
            rows, columns = np.arange(grid[1]), np.arange(grid[2])
        video = grid_rope([np.arange(grid[0]), rows, columns], cfg.rope_dims)
        before = jnp.zeros((text, cfg.head_dim // 2), jnp.float32)
        return Rope(jnp.concatenate([before + 1, video.cos]), jnp.concatenate([before, video.sin]))

    def head(
        self, h: Float[Array, "B N D"], final: Float[Array, "B 2 D"], grid: tuple[int, ...]
    ) -> Float[Array, "B T Y X C"]:
        """Video tokens to v."""
        cfg = self.cfg
        h = layers.layer_norm(h, cfg.eps).astype(h.dtype) if self.norm is None else self.norm(h)
        h = (layers.layer_norm(h, cfg.eps) * final[:, 1, None] + final[:, 0, None]).astype(h.dtype)
        return unpatchify_3d(self.final(h), cfg.patch_3d, grid)

    def __call__(self, x, t, text, ofs=OFS):
        """v for latents x (B, T, Y, X, C) at timestep t (scalar or (B,)) and text states (B, L, J)."""
        return self.velocity(x, self.modulation(t, ofs), self.embed_text(text))


def fitted(grid: tuple[int, ...], base: tuple[int, ...]) -> tuple[Float[np.ndarray, "y"], Float[np.ndarray, "x"]]:
    """Positions of rows and columns where a grid is resized to fit into the base grid, keeping its shape, and centred
    (upstream get_resize_crop_region_for_grid, get_3d_rotary_pos_embed)."""
    (rows, columns), (tall, wide) = grid, base
    if rows / columns > tall / wide:
        size = tall, round(tall / rows * columns)
    else:
        size = round(wide / columns * rows), wide
    starts = (round((whole - part) / 2) for whole, part in zip(base, size))
    along = lambda start, part, n: np.linspace(start, (start + part) * (n - 1) / n, n)
    y, x = (along(start, part, n) for start, part, n in zip(starts, size, grid))
    return y, x


def _norm(cfg: CogVideoXConfig) -> layers.LayerNorm | None:
    return layers.LayerNorm(cfg.width, eps=cfg.eps, dtype=cfg.dtype) if cfg.affine else None


def _fold(rows: Float[Array, "*S parts D"], norm: layers.LayerNorm | None) -> Float[Array, "*S parts D"]:
    """Rows shift, scale, ... as layer_norm(x) rows[1] + rows[0], with the norm's own scale and bias in them."""
    shift, scale = rows[..., 0, :], 1 + rows[..., 1, :]
    if norm is not None:
        shift += scale * norm.bias.get_value().astype(jnp.float32)
        scale *= norm.scale.get_value().astype(jnp.float32)
    return jnp.concatenate([jnp.stack([shift, scale], -2), rows[..., 2:, :]], -2)
