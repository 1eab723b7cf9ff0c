"""Calls that make a video a segment at a time: the plan before the stages that are replayed, the merge after them, and
the two ways to run them. B outputs, T frames of a segment.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jdit.pipeline import base, calls
from jdit.pipeline.executor import Stage, run, stream
from jdit.sampling import segments
from jdit.sampling.segments import SegmentPlan
from jdit.structs import Output

SEGMENT = "segment"
"""What the stages that make a segment repeat."""
TAKES = ("scan_segments", "on_segment")
"""Arguments of such calls: whether all segments are one program (otherwise each stage is one, run once a segment); what
is called with (segments made, of how many)."""


def plan_segments(plan: SegmentPlan, make: Callable[[int], Any]) -> Iterator[Any]:
    """What each segment is made from, made when it is its turn."""
    return map(make, range(plan.count))


def merge_latents(plan: SegmentPlan, latents: Sequence[Any]) -> np.ndarray:
    """The latents of all segments, one after another along time."""
    return np.concatenate([np.asarray(x) for x in latents], 1)


def merge(plan: SegmentPlan, latents: Sequence[Any], pixels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """`merge_latents`, and the frames of all segments as one video: overlaps once, cut to the length that was asked."""
    frames = [np.asarray(p)[:, plan.kept(i)] for i, p in enumerate(pixels)]
    return merge_latents(plan, latents), np.concatenate(frames, 1)


def planned(replayed: Sequence[Stage], *, pixels: bool) -> list[Stage]:
    """The stages of the segments between their plan and their merge."""
    made = ("latents", "pixels") if pixels else ("latents",)
    return [
        Stage("plan", plan_segments, (), ("plan", "make"), (SEGMENT,), host=True),
        *replayed,
        Stage("merge", merge if pixels else merge_latents, (), ("plan", *made), made, host=True),
    ]


def noise(a: Mapping[str, Any], plan: SegmentPlan, shape: tuple[int, ...]) -> Callable[[int], jax.Array]:
    """The first x (B, S, h, w, C) of each segment: its part of the caller's latents, or the seed's noise."""
    if a["latents"] is not None:
        rows, time, *rest = shape
        given = calls.given_latents(a["latents"], (rows, plan.count * time, *rest))
        return lambda index: given[:, index * time : (index + 1) * time]
    keys = calls.keys(calls.or_(a["seed"], 0), shape[0])
    return lambda index: segments.noise(keys, index, shape[1:])


def solver_keys(a: Mapping[str, Any], count: int, stochastic: bool) -> Callable[[int], jax.Array | None]:
    """Keys of a stochastic solver's noise in each segment, one an output."""
    keys = calls.solver_keys(a["seed"], count, stochastic)
    return lambda index: None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)


def whole(
    pipe: base.Pipeline, todo: Sequence[Stage], values: Mapping[str, Any], a: Mapping[str, Any],
    timings: dict[str, float], fps: float,
) -> Output:  # fmt: skip
    """The whole video; `todo` has the plan and the merge. To be called on the pipeline's mesh."""
    told, count = a.get("on_segment"), values["plan"].count
    last = next(s.name for s in reversed(todo) if s.repeats)
    ends = {f"{last}[{i}]": i + 1 for i in range(count)}
    on_stage = lambda name: told(ends[name], count) if told and name in ends else None
    with calls.reporting(a["on_step"], a.get("on_frame"), segments=count):
        scanned = bool(a.get("scan_segments"))
        made, spent = run(todo, pipe.weights, values, scanned=scanned, on_stage=on_stage)
    return calls.result(made, timings | spent, fps)


def pieces(
    pipe: base.Pipeline, todo: Sequence[Stage], values: Mapping[str, Any], a: Mapping[str, Any],
    timings: dict[str, float], fps: float,
) -> Iterator[Output]:  # fmt: skip
    """The frames of each segment as soon as they are there, without those that the one before it has made; neither the
    host nor the device holds more than a segment. `todo` as for `whole`."""
    if a.get("scan_segments"):
        raise ValueError("scan_segments makes all segments in one program: it goes with a call, not with stream")
    plan, wanted = values["plan"], todo[-1].writes
    replays = stream(todo[:-1], pipe.weights, values, wanted)
    try:
        for index in range(plan.count):
            with pipe.on_mesh(), calls.reporting(a["on_step"], a.get("on_frame"), segment=index, segments=plan.count):
                made, spent = next(replays)
            if "pixels" in made:
                made["pixels"] = np.asarray(made["pixels"])[:, plan.kept(index)]
            if a.get("on_segment"):
                a["on_segment"](index + 1, plan.count)
            yield calls.result(made, timings | spent, fps)
            timings = {}
    finally:
        replays.close()
