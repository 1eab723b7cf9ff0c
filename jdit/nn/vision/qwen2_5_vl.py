"""Vision tower of Qwen2.5-VL (arXiv 2502.13923, section 2.1; transformers' models/qwen2_5_vl/modeling_qwen2_5_vl.py).

B batch, Y X pixel rows and columns, C channels, N patches, D width, H heads, K head dim, m patches a side of a merged
token, M merged tokens (m m patches each), E width of the language model, S segments that attend within themselves, each
of L patches. The patches of a merged token follow one another, the merged tokens are in raster order.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn.context_parallel import attend_whole
from jdit.nn.layers import GatedMlp, Mlp, RMSNorm, fused_linear, gelu, linear, scan_blocks, stack
from jdit.nn.rope import Rope, apply_rope, rope_at
from jdit.nn.text.activations import ACTIVATIONS, check_activation
from jdit.sharding import Rules, shard

EPS = 1e-6
"""Of every norm in the tower; no config has it."""


@dataclasses.dataclass(frozen=True)
class Qwen2_5VisionConfig:
    """Architecture of the tower. The defaults are Qwen2.5-VL 7B's.

    Attributes:
        patch: pixels a side. frames: of video that a patch spans; a picture counts as that many equal ones.
        merge: patches a side of a merged token.
        window: pixels a side of the window that a patch attends to, but in the layers `full`: there, its picture.
        out: width E of the language model.
    """

    width: int = 1280
    mlp: int = 3420
    layers: int = 32
    heads: int = 16
    channels: int = 3
    patch: int = 14
    frames: int = 2
    merge: int = 2
    window: int = 112
    full: tuple[int, ...] = (7, 15, 23, 31)
    out: int = 3584
    act: str = "silu"
    theta: float = 10000.0
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        check_activation(self.act)
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width={self.width} must give each of the {self.heads} heads a multiple of 4 dims")
        if self.side < 1:
            raise ValueError(f"window={self.window} is smaller than a merged token of {self.factor} pixels")

    @property
    def factor(self) -> int:
        """Pixels a side of a merged token: what the sides of pictures are multiples of."""
        return self.patch * self.merge

    @property
    def side(self) -> int:
        """Merged tokens a side of a window."""
        return self.window // self.merge // self.patch


class Segments(NamedTuple):
    """Groups of patches that attend within themselves, on the host.

    index: the patches of each segment, filled up with 0 at the end. lengths: how many of them are real. place: where
    each patch is in `index`, flattened.
    """

    index: Int[np.ndarray, "S L"]
    lengths: Int[np.ndarray, "S"]
    place: Int[np.ndarray, "N"]


def segments(parts: Sequence[Int[np.ndarray, "_"]]) -> Segments:
    """Segments of these patches; together they hold each patch once."""
    longest, total = max(map(len, parts)), sum(map(len, parts))
    index, place = np.zeros((len(parts), longest), np.int32), np.zeros(total, np.int32)
    for s, part in enumerate(parts):
        index[s, : len(part)] = part
        place[part] = s * longest + np.arange(len(part))
    return Segments(index, np.array([len(p) for p in parts], np.int32), place)


def window_parts(rows: int, columns: int, side: int) -> list[Int[np.ndarray, "_"]]:
    """Cells (in raster order) of each window of side x side cells in a grid; those at the right and bottom are cut."""
    cells = np.arange(rows * columns).reshape(rows, columns)
    starts = [(y, x) for y in range(0, rows, side) for x in range(0, columns, side)]
    return [cells[y : y + side, x : x + side].reshape(-1) for y, x in starts]


def layout(grids: Sequence[tuple[int, int]], cfg: Qwen2_5VisionConfig) -> tuple[Segments, Segments, np.ndarray]:
    """(windows, whole pictures, rows and columns (N, 2) of the patches) of pictures of grids of merged tokens."""
    m, start = cfg.merge, 0
    windows, whole, positions = [], [], []
    for rows, columns in grids:
        patches = start + np.arange(rows * columns * m * m)
        whole.append(patches)
        windows += [patches.reshape(-1, m * m)[cells].reshape(-1) for cells in window_parts(rows, columns, cfg.side)]
        at = np.stack(np.meshgrid(np.arange(rows * m), np.arange(columns * m), indexing="ij"), -1)
        positions.append(rearrange(at, "(y p) (x q) a -> (y x p q) a", p=m, q=m))
        start += len(patches)
    return segments(windows), segments(whole), np.concatenate(positions)


def merged_patches(x: Float[Array, "B Y X C"], patch: int, merge: int) -> Float[Array, "B N P"]:
    """Patches of a picture, those of a merged token side by side; within a patch (row, column, channel)."""
    return rearrange(
        x, "b (y i p) (x j q) c -> b (y x i j) (p q c)", i=merge, j=merge, p=patch, q=patch
    )  # fmt: skip


class VisionBlock(nnx.Module):
    """Pre-norm self-attention within segments and gated MLP with biases."""

    def __init__(self, cfg: Qwen2_5VisionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, dtype = cfg.width, jnp.dtype(cfg.dtype)
        self.norm1 = RMSNorm(d, eps=EPS, dtype=dtype)
        self.qkv = fused_linear(d, 3, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(d, eps=EPS, dtype=dtype)
        self.mlp = GatedMlp(d, cfg.mlp, ACTIVATIONS[cfg.act], dtype=dtype, rngs=rngs, bias=True)

    def __call__(
        self, x: Float[Array, "B N D"], rope: Rope, windows: Segments, pictures: Segments, full: Array
    ) -> Float[Array, "B N D"]:
        """`full` (a boolean) chooses the segments: whole pictures, or windows."""
        cfg = self.cfg
        b, n, d = x.shape
        with jax.named_scope("attention"):
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, cfg.heads, d // cfg.heads)
            q, k = (apply_rope(qkv[:, :, i], rope, "halves") for i in range(2))
            within = lambda s: lambda q, k, v: self._within(s, q, k, v)
            x = x + self.out(jax.lax.cond(full, within(pictures), within(windows), q, k, qkv[:, :, 2]))
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.norm2(x))
        return shard(x, "batch", None, "width", rules=cfg.rules)

    def _within(self, s: Segments, q, k, v) -> Float[Array, "B N D"]:
        """Attention of each patch to those of its segment: the segments as a batch, cut by lengths."""
        b, _, h, dims = q.shape
        count, longest = s.index.shape
        q, k, v = (a[:, s.index.reshape(-1)].reshape(b * count, longest, h, dims) for a in (q, k, v))
        lengths = None if (s.lengths == longest).all() else jnp.tile(jnp.asarray(s.lengths), b)
        out = attend_whole(q, k, v, rules=self.cfg.rules, kv_lengths=lengths)
        return out.reshape(b, count * longest, h * dims)[:, s.place]


class Qwen2_5Vision(nnx.Module):
    """Patch embedding, transformer with window attention and 2D rotary positions, merging of patches to tokens."""

    def __init__(self, cfg: Qwen2_5VisionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, dtype = cfg.width, jnp.dtype(cfg.dtype)
        merged = d * cfg.merge**2
        inputs = cfg.frames * cfg.patch**2 * cfg.channels
        self.patch = linear(inputs, d, (None, "embed"), dtype=dtype, rngs=rngs, bias=False)
        self.blocks = stack(lambda r: VisionBlock(cfg, rngs=r), cfg.layers, rngs)
        self.norm = RMSNorm(d, eps=EPS, dtype=dtype)
        self.merger = Mlp(merged, merged, gelu, d_out=cfg.out, dtype=dtype, rngs=rngs)

    def __call__(self, pictures: Sequence[Float[Array, "B Y X C"]]) -> Float[Array, "B M E"]:
        """Tokens of pictures, one picture's after the other's.

        Args:
            pictures: normalised (jdit.pipeline.qwen_pictures makes them), each of its own size.

        Raises:
            ValueError: no picture, or one whose sides or channels do not fit.
        """
        cfg = self.cfg
        shapes = [p.shape[1:] for p in pictures]
        if not shapes or any(y % cfg.factor or x % cfg.factor or c != cfg.channels for y, x, c in shapes):
            raise ValueError(
                f"pictures of {shapes}; this vision tower takes one or more with {cfg.channels} channels and sides that"
                f" are multiples of {cfg.factor}"
            )
        grids = [(y // cfg.factor, x // cfg.factor) for y, x, _ in shapes]
        windows, whole, positions = layout(grids, cfg)
        with jax.named_scope("embed"):
            patches = jnp.concatenate([merged_patches(p, cfg.patch, cfg.merge) for p in pictures], 1)
            x = self.patch(jnp.tile(patches.astype(cfg.dtype), cfg.frames))
        pairs = cfg.width // cfg.heads // 4  # turned by each of the two axes
        freqs = np.tile(cfg.theta ** -(np.arange(pairs) / pairs), 2)
        rope = rope_at(jnp.asarray(positions), np.repeat((0, 1), pairs), freqs)
        full = jnp.array([i in cfg.full for i in range(cfg.layers)])
        x = shard(x, "batch", None, "width", rules=cfg.rules)
        x = scan_blocks(self.blocks, x, full, call=lambda block, x, f: block(x, rope, windows, whole, f))
        with jax.named_scope("merge"):
            x = self.norm(x)
            return self.merger(x.reshape(len(x), -1, cfg.merge**2 * cfg.width))
