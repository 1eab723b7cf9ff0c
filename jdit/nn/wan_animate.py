"""Wan-Animate's video transformer (arXiv 2509.14055; upstream transformer_wan_animate.py).

Wan's image-to-video transformer, whose video tokens also have a pose added to them and, behind every few blocks, attend
to what a face does in their frame. Legend as in `jdit.nn.wan`; F frames and S rows and columns of a face in pixels, n
face tokens a latent frame, A face adapters. The first latent frame is the reference picture's: it has no pose, and a
face of zeros.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jdit.nn import layers
from jdit.nn.context_parallel import attend_frames
from jdit.nn.motion import FaceEncoder, MotionEncoder
from jdit.nn.patch import patch_grid, patchify_3d
from jdit.nn.pieces import padded
from jdit.nn.wan import Context, Modulation, WanTrunk
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.sharding import shard

Face = tuple[Float[Array, "*A B T n H K"], Float[Array, "*A B T n H K"]]
"""Keys and values of a face, of every adapter (leading axis) or of one."""


class FaceAdapter(nnx.Module):
    """Attention of a latent frame's tokens to the same frame's face tokens."""

    def __init__(self, cfg: WanAnimateConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d = cfg.width
        kw: dict[str, Any] = dict(dtype=cfg.dtype, rngs=rngs)
        norm = lambda: layers.RMSNorm(cfg.head_dim, eps=cfg.eps, dtype=cfg.dtype)
        self.q = layers.linear(d, d, ("embed", "heads"), **kw)
        self.kv = layers.fused_linear(d, 2, d, ("embed", "heads"), **kw)
        self.norm_q, self.norm_k = norm(), norm()
        self.out = layers.linear(d, d, ("heads", "embed"), **kw)

    def keys(self, face: Float[Array, "B T n D"]) -> Face:
        """Keys and values of face tokens."""
        kv = rearrange(self.kv(self._norm(face)), "b t n two (h k) -> two b t n h k", h=self.cfg.heads)
        k, v = (shard(a, "batch", None, None, "heads", None, rules=self.cfg.rules) for a in (self.norm_k(kv[0]), kv[1]))
        return k, v

    def __call__(self, x: Float[Array, "B N D"], face: Face, tokens: int | None = None) -> Float[Array, "B N D"]:
        q = self.norm_q(rearrange(self.q(self._norm(x)), "b n (h k) -> b n h k", h=self.cfg.heads))
        return self.out(attend_frames(q, *face, rules=self.cfg.rules, tokens=tokens))

    def _norm(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return layers.layer_norm(x, self.cfg.eps).astype(x.dtype)


class WanAnimate(WanTrunk):
    """The whole network: latents, text, a picture, a pose and a face to the flow velocity (noise minus data).

    Latents x hold, one after another along C, noise, a mask of 4 and what is known. `modulation_table` and
    `embed_context` are Wan's and made once a run, `embed_pose` and `embed_face` once a segment.
    """

    cfg: WanAnimateConfig

    def __init__(self, cfg: WanAnimateConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        size = int(np.prod(cfg.patch)) * cfg.latent_channels
        self.pose = layers.linear(size, cfg.width, (None, "embed"), dtype=cfg.dtype, rngs=rngs)
        self.motion = MotionEncoder(cfg, rngs=rngs)
        self.face = FaceEncoder(cfg, rngs=rngs)
        self.adapters = layers.stack(lambda r: FaceAdapter(cfg, rngs=r), cfg.layers // cfg.group, rngs)

    def embed_pose(self, pose: Float[Array, "B T-1 Y X C"]) -> Float[Array, "B N D"]:
        """Latents of the pose video to what is added to the video's tokens: zeros for the reference frame, which `pose`
        leaves out.

        Raises:
            ValueError: rows or columns that do not divide into patches, or another number of channels.
        """
        cfg, p = self.cfg, self.cfg.patch[0]
        if pose.shape[-1] != cfg.latent_channels:
            raise ValueError(f"a pose of {pose.shape[-1]} channels; it has the latents' {cfg.latent_channels}")
        pose = pose[:, : pose.shape[1] // p * p]  # one frame short of whole patches where they span several
        _, rows, columns = patch_grid(pose.shape[1:4], cfg.patch)
        tokens = self.pose(patchify_3d(pose.astype(cfg.dtype), cfg.patch))
        tokens = jnp.pad(tokens, ((0, 0), (rows * columns, 0), (0, 0)))
        return shard(tokens, "batch", "seq", "width", rules=cfg.rules)

    def embed_face(self, pixels: Float[Array, "B F S S 3"]) -> Face:
        """Keys and values of every adapter for a face video in [-1, 1]: F frames make T = 1 + ceil(F / 4) latent ones.

        Raises:
            ValueError: frames of another size than the motion encoder's.
        """
        size = self.cfg.face_size
        if pixels.ndim != 5 or pixels.shape[2:] != (size, size, 3) or not pixels.shape[1]:
            raise ValueError(f"a face of shape {pixels.shape}; it must be (batch, frames, {size}, {size}, 3)")
        tokens = self.face(self.motion.frames(pixels))
        tokens = jnp.pad(tokens, ((0, 0), (1, 0), (0, 0), (0, 0)))
        return jax.lax.map(lambda adapter: adapter.keys(tokens), self.adapters)

    def velocity(
        self,
        x: Float[Array, "B T Y X C"],
        modulation: Modulation,
        context: Context,
        pose: Float[Array, "B N D"],
        face: Face,
    ) -> Float[Array, "B T Y X C"]:
        """One evaluation, given `modulation` at this step and what the prompt, the pose and the face were made into.

        Raises:
            ValueError: latents that do not divide into patches, or of more patches a side than there are positions; a
                pose of another number of tokens; a face of another number of latent frames.
        """
        cfg = self.cfg
        grid = patch_grid(x.shape[1:4], cfg.patch)
        h, tokens, frames = self.embed(x, modulation), math.prod(grid), face[0].shape[2]
        rope = self.rope(grid).padded(h.shape[1])
        if pose.shape[1] != tokens:
            raise ValueError(f"a pose of {pose.shape[1]} tokens; the latents of {x.shape[1:4]} have {tokens}")
        pose = padded(pose, h.shape[1])
        if frames != x.shape[1] or tokens % frames:
            raise ValueError(f"a face of {frames} latent frames (1 + a quarter of its own); latents of {x.shape[1:4]}")
        block = lambda block, h, c: block(h, modulation.block, rope, c, tokens)
        at = lambda part, tree: jax.tree.map(lambda a: a[part], tree)

        def group(parts, h, given):
            (blocks, adapter), (context, face) = parts, given
            h = block(at(0, blocks), h, at(0, context))
            with jax.named_scope("face_adapter"):
                h = h + adapter(h, face, tokens)
            rest = slice(1, None)
            return layers.scan_blocks(at(rest, blocks), h, at(rest, context), call=block)

        # a group's inner scan works on a copy of its layers: temporaries grow by group - 1 of them (XLA on CPU)
        blocks, context = layers.groups((self.blocks, context), cfg.group)
        h = layers.scan_blocks((blocks, self.adapters), h + pose, (context, face), call=group)
        return self.head(h, modulation.final, grid)

    def __call__(self, x, t, text, image, pose, face):
        """Velocity for latents x (B, T, Y, X, 2 C + 4) at timestep t (scalar, (B,), or one a token or a frame, (B, M)),
        text states (B, L, J), image tokens (B, I, E) or None, pose latents (B, T - 1, Y, X, C) and face pixels
        (B, F, S, S, 3) in [-1, 1]; see `modulation`, `embed_context`, `embed_pose` and `embed_face`.

        Raises:
            ValueError: as `velocity` does, and for a pose of other frames, rows or columns.
        """
        if pose.shape[1:4] != (x.shape[1] - 1, *x.shape[2:4]):
            raise ValueError(f"a pose of {pose.shape[1:4]} frames, rows and columns for latents of {x.shape[1:4]}, "
                             "whose first frame has none")  # fmt: skip
        conditions = self.embed_context(text, image), self.embed_pose(pose), self.embed_face(face)
        return self.velocity(x, self.modulation(t), *conditions)
