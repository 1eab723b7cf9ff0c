"""Long videos a segment at a time: the arithmetic of segments, and the two ways to run them (upstream
pipeline_wan_animate.py; arXiv 2509.14055, section 4).

A segment starts with the last frames of the one before it (its overlap). One function makes a segment, (carry, item) ->
(carry, result); `scan` runs it inside one program, `stream` from a loop on the host.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

Segment = Callable[[Any, Any], tuple[Any, Any]]


class SegmentPlan(NamedTuple):
    """Which frames each segment makes.

    Attributes:
        frames: of the result. length: of a segment, overlap included. overlap: frames that a segment takes over from
            the one before it.
    """

    frames: int
    length: int
    overlap: int

    @property
    def stride(self) -> int:
        """Frames from the start of a segment to that of the next."""
        return self.length - self.overlap

    @property
    def count(self) -> int:
        """Segments: as many as it takes to cover the frames, one at least."""
        return max(1, -(-(self.frames - self.overlap) // self.stride))

    @property
    def padded(self) -> int:
        """Frames up to the end of the last segment, to which driving videos are padded."""
        return self.overlap + self.count * self.stride

    def span(self, index: int) -> tuple[int, int]:
        """First frame of a segment, its overlap included, and the frame after its last."""
        return index * self.stride, index * self.stride + self.length

    def kept(self, index: int) -> slice:
        """The frames of a segment that belong to the result: without those that the one before it has made, and without
        what lies beyond the end."""
        start, stop = self.span(index)
        return slice(self.overlap if index else 0, max(0, min(stop, self.frames) - start))


def plan(
    frames: int, length: int, overlap: int, *, factor: int = 4, overlaps: Iterable[int] | None = (1, 5)
) -> SegmentPlan:
    """The segments of a video of `frames` frames.

    Args:
        factor: frames of a latent frame but the first. overlaps: those that the model knows; None is any 1 + factor n.

    Raises:
        ValueError: a length or an overlap that does not fit, with the nearest that do.
    """
    if frames < 1:
        raise ValueError(f"a video of {frames} frames; at least 1 is needed")
    if overlaps is not None and overlap not in overlaps:
        raise ValueError(f"overlap_frames={overlap}; it may be {' or '.join(map(str, overlaps))}")
    if overlap < 1 or (overlap - 1) % factor:
        raise ValueError(f"overlap_frames={overlap}; it must be 1 + {factor} n")
    if (length - 1) % factor or length <= overlap:
        least = overlap + factor
        below = max(least, (length - 1) // factor * factor + 1)
        near = " or ".join(map(str, sorted({below, max(least, below + factor * (length > least))})))
        raise ValueError(
            f"segment_frames={length} does not work, {near} would (1 + {factor} n, above overlap_frames={overlap})"
        )
    return SegmentPlan(frames, length, overlap)


def reflected(have: int, start: int, stop: int) -> Int[np.ndarray, "n"]:
    """Which of `have` frames stand for the frames start to stop of an endless video: to the last one, back to the
    first, and so on (1 2 3 2 1 2 ..., as upstream pads its driving videos)."""
    period = max(1, 2 * (have - 1))
    at = np.arange(start, stop) % period
    return np.minimum(at, period - at) if have > 1 else at * 0


def noise(keys: Iterable[Array], index: int | Array, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Standard normal noise of a segment, a row an output: each from its own key and the segment's number, so that it
    depends neither on the batch nor on how many segments there are."""
    return jnp.stack([jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32) for key in keys])


def scan(segment: Segment, carry: Any, items: Any) -> tuple[Any, Any]:
    """All segments in one `lax.scan`: items and results have a leading axis of segments."""
    return lax.scan(segment, carry, items)


def stream(segment: Segment, carry: Any, items: Iterable[Any]) -> Iterator[Any]:
    """The same from a loop on the host: yields (carry, result) after each segment, and asks for an item when it is
    due, so that no more than one is there."""
    for item in items:
        carry, result = segment(carry, item)
        yield carry, result
