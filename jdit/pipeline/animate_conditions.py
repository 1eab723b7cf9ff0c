"""What Wan-Animate's transformer sees beside the noise: the reference, the segment before, poses, faces, background
(upstream pipeline_wan_animate.py).

B outputs, T frames of H x W pixels of a segment, S latent frames of h w rows and columns and C channels, r frames that
a latent frame stands for (but for the first, which is one frame), F pixels of a side of a face, O frames of overlap.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.pipeline.given import unit
from jdit.pipeline.wan_conditions import encode_video, flags


class Segment(NamedTuple):
    """What one segment is made from.

    Attributes:
        pose, face: driving frames. background, mask: of the video in which a figure is replaced, else None; the mask's
            255 is to be generated.
        noise: the first x: the reference's latent frame, then the segment's. keys: of a stochastic solver, or None.
    """

    pose: UInt8[Array, "T H W 3"]
    face: UInt8[Array, "T F F 3"]
    background: UInt8[Array, "T H W 3"] | None
    mask: UInt8[Array, "T H W"] | None
    noise: Float[Array, "B 1+S h w C"]
    keys: Array | None = None


class Tail(NamedTuple):
    """What a segment hands to the next: its last frames in [-1, 1], neither rounded nor clipped; `empty` before the
    first."""

    frames: Float[Array, "B O H W 3"]
    empty: Bool[Array, ""]


def encode_reference(vae: AutoencoderKLWan, reference: UInt8[Array, "1 H W 3"], tiling: bool):
    """The reference's flags (given) and latents: what stands beside the first latent frame, (1, 1, h, w, r + C)."""
    z = encode_video(vae, unit(reference)[:, None], tiling)
    return jnp.concatenate([jnp.ones((*z.shape[:4], vae.cfg.time_factor or 1), z.dtype), z], -1)


def encode_segment(
    vae: AutoencoderKLWan, reference: Float[Array, "1 1 h w r+C"], segment: Segment, tail: Tail, tiling: bool
) -> tuple[Float[Array, "B 1+S h w r+C"], Float[Array, "1 S h w C"]]:
    """What stands beside the noise of a segment, and the latents of its poses.

    The frames of the segment before it, where there is one, begin a video that is grey, or the background, elsewhere.
    """
    tail_frames, overlap, time = tail.frames, tail.frames.shape[1], segment.pose.shape[0]
    outputs = tail_frames.shape[0]
    if segment.background is None or segment.mask is None:
        rest = jnp.zeros((1, time, *tail_frames.shape[2:]))
        given = jnp.zeros((1, time, *segment.noise.shape[2:4]))
    else:
        rest = unit(segment.background)[None]
        step = [n // m for n, m in zip(segment.mask.shape[1:], segment.noise.shape[2:4])]
        given = 1 - segment.mask[None, :, :: step[0], :: step[1]].astype(jnp.float32) / 255
    begin = jnp.where(tail.empty, rest[:, :overlap], tail_frames)
    video = jnp.concatenate([begin, jnp.broadcast_to(rest[:, overlap:], (outputs, *rest[:, overlap:].shape[1:]))], 1)
    given = given.at[:, :overlap].set(jnp.where(tail.empty, given[:, :overlap], 1))
    z = encode_video(vae, video, tiling)
    marks = jnp.broadcast_to(flags(given, vae.cfg.time_factor or 1), (*z.shape[:4], vae.cfg.time_factor or 1))
    first = jnp.broadcast_to(reference, (outputs, *reference.shape[1:]))
    channels = jnp.concatenate([first, jnp.concatenate([marks, z], -1)], 1)
    return channels, encode_video(vae, unit(segment.pose)[None], tiling)
