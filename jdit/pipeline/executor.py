"""Runs a list of stages: pure functions of weights and values, compiled, timed, and replayed a segment where marked."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdit import sharding
from jdit.nn import parts
from jdit.sampling import segments


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a pipeline, as data.

    Attributes:
        name: what timings and progress call it.
        fn: (*modules, *values) -> a tuple of the written values (the value itself where there is one).
        weights: names of the components it needs, or of their parts (`jdit.nn.parts`). reads, writes: names of values.
        static: those of `reads` that are hashable settings and part of the jit key.
        repeats: the name of an iterable of values; the stage is replayed for each, together with its neighbours that
            repeat the same, `repeats` then naming the item. What they read before they write it is handed from one
            replay to the next; what later stages read is collected on the host, an entry a replay.
        frees: those of `reads` that nobody needs afterwards; ignored where the stage repeats.
        host: not compiled: it is called with what is there, which may be NumPy arrays, lists or iterators.
    """

    name: str
    fn: Callable
    weights: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    repeats: str | None = None
    host: bool = False
    frees: tuple[str, ...] = ()


Options = tuple[tuple[str, bool | int | str], ...]


def compiler_options() -> dict[str, bool | int | str] | None:
    """What GPU programs are compiled with (benchmarks/NOTES.md has the figures).

    Scanned layers read their weights in place instead of copying each layer's slice first: in products that are
    cuBLASLt calls from the start, not candidates for Triton (and see `jdit.nn.layers.product`; one that makes its own
    GELU has them copied). Values, keys and queries may be under way together (`jdit.nn.exchange`), and what is sent
    begins as early as it can: XLA begins it right before the product that hides it, which then leaves NCCL no
    processors. What a ring sends between the GPUs of one process goes by copy engines, which need none. Slices of a
    layer's biases and scales are not copied on streams of their own: beside what is sent, no CUDA graph can hold those,
    and outside of graphs cuDNN clears its results first and kernels wait for one another's launch. A graph may hold one
    kernel: a ring's attention to its own keys, between sending and receiving. Where nothing but samples is spread
    (guidance), a device has few of them, and kernels of a graph that do not need one another run side by side: those of
    a text leave most processors idle.
    """
    if jax.default_backend() != "gpu":
        return None
    mesh = jax.sharding.get_abstract_mesh()
    return {
        **({"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"} if jax.process_count() == 1 else {}),
        **({"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"} if _samples_alone(mesh) else {}),
        "xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper",
        "xla_gpu_enable_dynamic_slice_fusion": True,
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
        "xla_gpu_experimental_collective_start_as_early_as_possible": True,
        "xla_gpu_graph_min_graph_size": 1,
    }


def _samples_alone(mesh: jax.sharding.AbstractMesh) -> bool:
    return not mesh.empty and 1 < mesh.size == mesh.shape.get("data", 1)


def compiled(fn: Callable, static: tuple[int, ...] = ()) -> Callable:
    """`fn` under jax.jit with the options of the mesh in use; the same function gives the same jit, so a second call
    does not compile again."""
    return _compiled(fn, static, _options())


@functools.cache
def _compiled(fn: Callable, static: tuple[int, ...], options: Options) -> Callable:
    return jax.jit(fn, static_argnums=static, compiler_options=dict(options))


def _options() -> Options:
    return tuple(sorted((compiler_options() or {}).items()))


def _static(stage: Stage) -> tuple[int, ...]:
    return tuple(len(stage.weights) + i for i, name in enumerate(stage.reads) if name in stage.static)


class Weights:
    """The components of a pipeline, or their parts, on the device or waiting on the host.

    What waits is placed before the first stage of a run of stages that needs it and let go after the last. A part of a
    component that is there as a whole shares its arrays, and a component is made whole again of its parts.
    """

    def __init__(
        self, modules: Mapping[str, nnx.Module], waiting: Mapping[str, Callable[[], nnx.Module]] | None = None
    ):
        self.resident = dict(modules)
        self.waiting = dict(waiting or {})

    def __getitem__(self, name: str) -> nnx.Module:
        if name not in self.resident and name in self.waiting:
            self.resident[name] = self.waiting[name]()
        if name in self.resident:
            return self.resident[name]
        have, (component, part) = {*self.resident, *self.waiting}, parts.parse(name)
        both = [parts.name(component, p) for p in (parts.MODULATION, parts.LOOP)]
        if part is not None and component in have:
            return parts.take(self[component], part)
        if part is None and have.issuperset(both):
            return parts.join(*(self[p] for p in both))
        raise KeyError(name)

    def release(self, keep: set[str]):
        """Let go of what waits, but for what these names are made of."""
        for name in self.waiting:
            if not any(parts.overlap(name, k) for k in keep):
                self.resident.pop(name, None)


Listener = Callable[[str], None]
Timings = dict[str, float]


def run(
    stages: Sequence[Stage],
    weights: Weights,
    values: Mapping[str, Any],
    *,
    on_stage: Listener | None = None,
    scanned: bool = False,
) -> tuple[dict[str, Any], Timings]:
    """Run the stages in order.

    Args:
        values: what the first stages read; not changed.
        on_stage: called with a stage's name when it is done.
        scanned: replay repeated stages inside one program, by `lax.scan` over the items; their results are then arrays
            with a leading axis in the place of lists.

    Returns:
        (all values, seconds a stage; a replayed stage has `name[i]` for each replay).
    """
    values, timings = dict(values), {}
    for n, block in blocks(stages):
        if block[0].repeats is None:
            values |= _timed(block[0], weights, values, timings, on_stage)
            for name in block[0].frees:
                del values[name]
        elif scanned:
            values |= _scan(block, weights, values, _results(block, stages[n:]), timings, on_stage)
        else:
            results = _results(block, stages[n:])
            kept: dict[str, list] = {name: [] for name in results}
            for carry, result, _ in _replays(block, weights, values, results, timings, on_stage):
                values |= carry
                for name in results:
                    kept[name].append(jax.device_get(sharding.whole(result[name])))
            values |= kept
        weights.release({w for s in stages[n:] for w in s.weights})
    return values, timings


def stream(
    stages: Sequence[Stage], weights: Weights, values: Mapping[str, Any], results: Sequence[str]
) -> Generator[tuple[dict[str, Any], Timings]]:
    """Run the stages, of which the last repeat, and yield after each replay.

    Yields:
        (the values named by `results`, seconds a stage since the replay before).
    """
    (n, block), values, timings = blocks(stages)[-1], dict(values), {}
    values, timings = run(stages[: n - len(block)], weights, values)
    try:
        for _, result, spent in _replays(block, weights, values, tuple(results), {}, None):
            yield sharding.whole(result), timings | spent
            timings = {}
    finally:
        weights.release(set())


def _replays(
    block: Sequence[Stage], weights: Weights, values: Mapping[str, Any], results: Sequence[str], timings: Timings,
    on_stage: Listener | None,
) -> Iterator[tuple[dict[str, Any], dict[str, Any], Timings]]:  # fmt: skip
    """(carry, results, seconds a stage) of each replay; `timings` gets them too."""
    spent: Timings = {}
    number = -1

    def play(stage: Stage, known: Mapping[str, Any]) -> dict[str, Any]:
        return _timed(stage, weights, known, spent, on_stage, f"[{number}]")

    def segment(carry: dict[str, Any], item: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        nonlocal number
        number += 1
        spent.clear()
        return _segment(block, values, results, play)(carry, item)

    first = _committed(_carried(block, values))
    for carry, result in segments.stream(segment, first, values[str(block[0].repeats)]):
        timings |= spent
        yield carry, result, dict(spent)


def _segment(block: Sequence[Stage], values: Mapping[str, Any], results: Sequence[str], play: Callable):
    """The stages of a block as one function (carry, item) -> (carry, results); `play(stage, values)` runs a stage."""

    def segment(carry: dict[str, Any], item: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        known = {**values, **carry, str(block[0].repeats): item}
        for stage in block:
            known |= play(stage, known)
        return {name: known[name] for name in carry}, {name: known[name] for name in results}

    return segment


def _carried(block: Sequence[Stage], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a replay hands to the next: that which its stages read before they write it."""
    written, before = {n for s in block for n in s.writes}, set()
    out: dict[str, Any] = {}
    for stage in block:
        out |= {n: values[n] for n in stage.reads if n in written - before}
        before |= set(stage.writes)
    return out


def _committed(carry: dict[str, Any]) -> dict[str, Any]:
    """The first carry bound to its device, as what a stage hands on is: else the second replay would compile again."""
    if not jax.sharding.get_abstract_mesh().empty:
        return carry
    return jax.tree.map(lambda a: jax.device_put(a, a.sharding) if isinstance(a, jax.Array) else a, carry)


def _results(block: Sequence[Stage], later: Sequence[Stage]) -> tuple[str, ...]:
    """What is collected of each replay: that which later stages read; where none does, what the last stage writes."""
    written, read = [n for s in block for n in s.writes], {n for s in later for n in s.reads}
    return tuple(n for n in dict.fromkeys(written) if n in read) or block[-1].writes


def _scan(
    block: Sequence[Stage], weights: Weights, values: Mapping[str, Any], results: tuple[str, ...], timings: Timings,
    on_stage: Listener | None,
) -> dict[str, Any]:  # fmt: skip
    """All replays of a block in one program."""
    item, carry = str(block[0].repeats), _carried(block, values)
    items = list(values[item])
    static = {n: values[n] for s in block for n in s.static}
    given = {n: values[n] for s in block for n in s.reads if n in values and n not in (item, *static, *carry)}
    modules = {name: weights[name] for s in block for name in s.weights}
    program = _scan_program(tuple(block), tuple(sorted(static.items())), results, _options())
    names = [f"{stage.name}[{i}]" for i in range(len(items)) for stage in block]
    with _marking(lambda i: on_stage(names[i]) if on_stage else None) as marks:
        begun = time.perf_counter()
        carry, out = program(modules, given, carry, jax.tree.map(lambda *a: jnp.stack(a), *items))
        jax.block_until_ready(out)
    timings |= {name: at - before for name, at, before in zip(names, marks, [begun, *marks])}
    return carry | out


@functools.cache
def _scan_program(
    block: tuple[Stage, ...], static: tuple[tuple[str, Any], ...], results: tuple[str, ...], options: Options
) -> Callable:
    def program(modules, given, carry, items):
        def play(stage: Stage, known: Mapping[str, Any]) -> dict[str, Any]:
            out = stage.fn(*(modules[n] for n in stage.weights), *(known[n] for n in stage.reads))
            last = jax.tree.leaves(out)[-1]
            jax.debug.callback(lambda _: _mark(), last[(0,) * last.ndim])  # after the stage, not before
            return _named(stage, out)

        return segments.scan(_segment(block, given | dict(static), results, play), carry, items)

    return jax.jit(program, compiler_options=dict(options))


_mark: Callable[[], None] = lambda: None


@contextlib.contextmanager
def _marking(tell: Callable[[int], None]) -> Iterator[list[float]]:
    """While inside, the times at which the stages of a scan end are noted, and their numbers told."""
    global _mark
    out: list[float] = []

    def mark():
        out.append(time.perf_counter())
        tell(len(out) - 1)

    before, _mark = _mark, mark
    try:
        yield out
        jax.effects_barrier()
    finally:
        _mark = before


def _timed(
    stage: Stage, weights: Weights, values: Mapping[str, Any], timings: Timings, on_stage: Listener | None,
    suffix: str = "",
) -> dict[str, Any]:  # fmt: skip
    label, start = stage.name + suffix, time.perf_counter()
    out = _call(stage, weights, values)
    timings[label] = time.perf_counter() - start
    if on_stage:
        on_stage(label)
    return out


def blocks(stages: Sequence[Stage]) -> list[tuple[int, list[Stage]]]:
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
    given = [values[name] for name in stage.reads]
    if stage.host:
        return _named(stage, stage.fn(*modules, *sharding.whole(given)))
    out = compiled(stage.fn, _static(stage))(*modules, *given)
    return _named(stage, jax.block_until_ready(out))


def _named(stage: Stage, out: Any) -> dict[str, Any]:
    return dict(zip(stage.writes, (out,) if len(stage.writes) == 1 else out, strict=True))


def check_wiring(stages: Sequence[Stage], modules: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Run the stages under `jax.eval_shape`: shapes of all values, without weights, at any size.

    Args:
        modules: abstract modules (`nnx.eval_shape`). values: arrays or ShapeDtypeStructs, statics as they are; of
            repeated stages one item; and what host stages write, which are left out.
    """
    values, weights = dict(values), Weights(modules)
    for stage in stages:
        if stage.host:
            continue
        settings = {i: values[name] for i, name in enumerate(stage.reads) if name in stage.static}
        dynamic = [values[name] for name in stage.reads if name not in stage.static]

        def call(modules, dynamic, stage=stage, settings=settings):
            rest = iter(dynamic)
            return stage.fn(*modules, *(settings[i] if i in settings else next(rest) for i in range(len(stage.reads))))

        values |= _named(stage, jax.eval_shape(call, [weights[w] for w in stage.weights], dynamic))
    return values
