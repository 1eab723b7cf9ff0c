"""Runs a list of stages: pure functions of weights and values, compiled, timed, and replayed a segment where marked."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a pipeline, as data.

    Attributes:
        name: what timings and progress call it.
        fn: (*modules, *values) -> a tuple of the written values (the value itself where there is one).
        weights: names of the components it needs. reads, writes: names of values.
        static: those of `reads` that are hashable settings and part of the jit key.
        repeats: the name of a list of values; the stage is replayed for each, together with its neighbours that repeat
            the same list, `repeats` then naming the item. What they write is kept from one replay to the next, and the
            last stage's writes are collected into lists.
    """

    name: str
    fn: Callable
    weights: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    repeats: str | None = None


def compiler_options() -> dict[str, bool] | None:
    """On a GPU, scanned layers read their weights in place instead of copying each layer's slice first: in the products
    that XLA has made cuBLASLt calls without epilogue by then (benchmarks/NOTES.md has what that leaves)."""
    return {"xla_gpu_enable_dynamic_slice_fusion": True} if jax.default_backend() == "gpu" else None


@functools.cache
def compiled(fn: Callable, static: tuple[int, ...] = ()) -> Callable:
    """`fn` under jax.jit; the same function gives the same jit, so a second call does not compile again."""
    return jax.jit(fn, static_argnums=static, compiler_options=compiler_options())


def _static(stage: Stage) -> tuple[int, ...]:
    return tuple(len(stage.weights) + i for i, name in enumerate(stage.reads) if name in stage.static)


class Weights:
    """The components of a pipeline, on the device or waiting on the host.

    A waiting component is placed before the first stage of a run of stages that needs it and let go after the last.
    """

    def __init__(
        self, modules: Mapping[str, nnx.Module], waiting: Mapping[str, Callable[[], nnx.Module]] | None = None
    ):
        self.resident = dict(modules)
        self.waiting = dict(waiting or {})

    def __getitem__(self, name: str) -> nnx.Module:
        if name not in self.resident:
            self.resident[name] = self.waiting[name]()
        return self.resident[name]

    def release(self, keep: set[str]):
        for name in set(self.waiting) - keep:
            self.resident.pop(name, None)


def run(
    stages: Sequence[Stage],
    weights: Weights,
    values: dict[str, Any],
    *,
    on_stage: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the stages in order.

    Args:
        values: what the first stages read; not changed.
        on_stage: called with a stage's name before it starts.

    Returns:
        (all values, seconds a stage; a replayed stage has `name[i]` for each replay).
    """
    values, timings = dict(values), {}
    for n, block in _blocks(stages):
        items = values[block[0].repeats] if block[0].repeats else [None]
        collected: dict[str, list] = {}
        for i, item in enumerate(items):
            if block[0].repeats:
                values[block[0].repeats] = item
            for stage in block:
                label = f"{stage.name}[{i}]" if stage.repeats else stage.name
                if on_stage:
                    on_stage(label)
                start = time.perf_counter()
                values |= _call(stage, weights, values)
                timings[label] = time.perf_counter() - start
            for name in block[-1].writes if block[0].repeats else ():
                collected.setdefault(name, []).append(values[name])
        values |= collected
        weights.release({w for s in stages[n:] for w in s.weights})
    return values, timings


def _blocks(stages: Sequence[Stage]) -> list[tuple[int, list[Stage]]]:
    """Neighbouring stages that repeat one list stay together; each block with the number of stages up to its end."""
    out: list[tuple[int, list[Stage]]] = []
    for n, stage in enumerate(stages, 1):
        if out and stage.repeats and out[-1][1][-1].repeats == stage.repeats:
            out[-1] = (n, [*out[-1][1], stage])
        else:
            out.append((n, [stage]))
    return out


def _call(stage: Stage, weights: Weights, values: Mapping[str, Any]) -> dict[str, Any]:
    modules = [weights[name] for name in stage.weights]
    out = compiled(stage.fn, _static(stage))(*modules, *(values[name] for name in stage.reads))
    return _named(stage, jax.block_until_ready(out))


def _named(stage: Stage, out: Any) -> dict[str, Any]:
    return dict(zip(stage.writes, (out,) if len(stage.writes) == 1 else out, strict=True))


def check_wiring(stages: Sequence[Stage], modules: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Run the stages under `jax.eval_shape`: shapes of all values, without weights, at any size.

    Args:
        modules: abstract modules (`nnx.eval_shape`). values: arrays or ShapeDtypeStructs, statics as they are.
    """
    values = dict(values)
    for stage in stages:
        settings = {i: values[name] for i, name in enumerate(stage.reads) if name in stage.static}
        dynamic = [values[name] for name in stage.reads if name not in stage.static]

        def call(weights, dynamic, stage=stage, settings=settings):
            rest = iter(dynamic)
            return stage.fn(*weights, *(settings[i] if i in settings else next(rest) for i in range(len(stage.reads))))

        values |= _named(stage, jax.eval_shape(call, [modules[w] for w in stage.weights], dynamic))
    return values
