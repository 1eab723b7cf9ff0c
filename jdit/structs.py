"""The pytrees that travel between stages, and what a call returns. B batch, L tokens, J joint width, P pooled width."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int


class Text(NamedTuple):
    """Encoded text.

    Attributes:
        states: per-token states that the transformer reads.
        pooled: one vector a prompt, None in families without.
        counts: token j stands for counts[j] equal tokens; None where each stands for itself.
        lengths: tokens of each prompt, the others being padding; None where all count.
    """

    states: Float[Array, "B L J"]
    pooled: Float[Array, "B P"] | None = None
    counts: Float[Array, "L"] | None = None
    lengths: Int[Array, "B"] | None = None


class Prompt(NamedTuple):
    """What `pipe.encode` returns and a call takes in the place of a string."""

    positive: Text
    negative: Text | None = None


class Tokens(NamedTuple):
    """Token ids, one array a text encoder of the family (None where that encoder is absent)."""

    ids: tuple[Int[np.ndarray, "B L"] | None, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a variant is run unless the call says otherwise (sizes in pixels; guidance 1 is off).

    Attributes:
        guidance_2: of a second expert. num_frames, fps: of videos.
        segment_frames, overlap_frames: of videos made a segment at a time.
    """

    steps: int = 28
    guidance: float = 7.0
    height: int | None = None
    width: int | None = None
    shift: float | None = None
    max_text_tokens: int = 256
    guidance_2: float | None = None
    num_frames: int | None = None
    fps: float | None = None
    segment_frames: int | None = None
    overlap_frames: int = 1


@dataclasses.dataclass
class Output:
    """The result of a call.

    Attributes:
        pixels: (B, H, W, 3) or (B, T, H, W, 3), or layers with their opacity (B, L, H, W, 4), the lowest first; uint8,
            or float32 in [0, 1]; None where only latents were asked for.
        latents: the last x, as the solver leaves it, float32, channels last.
        timings: seconds a stage. fps: frames a second of a video, None for pictures.
    """

    pixels: np.ndarray | None
    latents: jax.Array
    timings: dict[str, float]
    fps: float | None = None

    def save(self, path: str | Path, *, fps: float | None = None) -> list[Path]:
        """Write pictures (png, jpg, webp, gif by suffix), layers (png) or videos (mp4, mov, gif, webp). Several get a
        number each.

        Args:
            fps: another rate than the result's own; pictures have none.

        Raises:
            ValueError: an unknown suffix, no pixels, or a video without a rate. OSError: the target cannot be written.
        """
        from jdit import media, video  # files belong to the outermost layer; only this call needs them

        if self.pixels is None:
            raise ValueError("there are no pixels to save: the call was made with output='latents'")
        videos = self.pixels.ndim == 5 and self.pixels.shape[-1] == 3
        return (video if videos else media).save(self.pixels, path, fps=fps or self.fps)
