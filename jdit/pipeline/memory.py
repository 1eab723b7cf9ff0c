"""The memory plan: which weights and modulation tables are on a device in each stage, and what waits for its stages."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax

from jdit.nn import parts
from jdit.pipeline.executor import Stage, blocks


class Resident(NamedTuple):
    """Weights (components, or their parts) and tables that are on a device while a stage runs, in bytes a device."""

    stage: str
    components: tuple[str, ...]
    bytes: int


class MemoryPlan(NamedTuple):
    """How a pipeline's weights come and go.

    Attributes:
        waiting: components, or parts, that are read for their stages and let go after the last of them.
        resident: components, or parts where the other part waits, that are read at once and stay.
        room: bytes a device has for weights; None where it does not tell.
        least: the peak if every component waited.
        in_step: tables that are not made, with their bytes: they would be larger than the weights that they are made
            from, which the loop therefore keeps.
        activations: bytes a device beside the weights, about; 0 where unknown.
    """

    stages: tuple[Resident, ...]
    waiting: tuple[str, ...]
    resident: tuple[str, ...]
    room: int | None
    least: int
    in_step: tuple[tuple[str, int], ...] = ()
    activations: int = 0

    @property
    def peak(self) -> int:
        return _peak(self.stages)

    @property
    def fits(self) -> bool:
        return self.room is None or self.peak <= self.room

    def describe(self) -> dict:
        """As JSON has it."""
        stages = [{"stage": s.stage, "resident": list(s.components), "bytes": s.bytes} for s in self.stages]
        return {"stages": stages, "waiting": list(self.waiting), "peak": self.peak, "least": self.least,
                "activations": self.activations, "room": self.room, "in_step": dict(self.in_step)}  # fmt: skip


def plan(
    stages: Sequence[Stage], sizes: Mapping[str, int], room: float | None, tables: Mapping[str, int] | None = None
) -> MemoryPlan:
    """Let that wait whose reading again costs least, so that every stage fits; all, where nothing does.

    Args:
        stages: of a usual call.
        sizes: component, or part of one, -> bytes a device; see `entries`.
        room: bytes for weights and tables; None has all weights resident.
        tables: value -> bytes, of tables that stages make, and of those that were too large to make.
    """
    tables, made = tables or {}, {w for stage in stages for w in stage.writes}
    in_step = tuple((name, size) for name, size in tables.items() if name not in made)
    choices = [c for n in range(len(sizes) + 1) for c in itertools.combinations(sizes, n)]
    choices.sort(key=lambda names: sum(sizes[name] for name in names))
    least, limit = _peak(follow(stages, sizes, tuple(sizes), tables)), None if room is None else int(room)
    kept = lambda names: _merged([name for name in sizes if name not in names], sizes)
    of = lambda names: MemoryPlan(follow(stages, sizes, names, tables), names, kept(names), limit, least, in_step)
    return next((p for p in map(of, choices) if p.fits), of(tuple(sizes)))


def entries(stages: Sequence[Stage], component: str) -> list[str]:
    """What of a component comes and goes by itself: its parts where stages name them, else the whole."""
    named = {name for stage in stages for name in stage.weights if name.startswith(parts.name(component, ""))}
    return [parts.name(component, p) for p in (parts.MODULATION, parts.LOOP)] if named else [component]


def follow(
    stages: Sequence[Stage], sizes: Mapping[str, int], waiting: Collection[str],
    tables: Mapping[str, int] | None = None,
) -> tuple[Resident, ...]:  # fmt: skip
    """What is resident in each stage as the executor runs them: see `executor.Weights`, `executor.Stage`."""
    needed = lambda some: {n for n in sizes if any(parts.overlap(n, w) for s in some for w in s.weights)}
    bytes_of = {**sizes, **(tables or {})}
    here, out = set(sizes) - set(waiting), []
    for n, block in blocks(stages):
        here |= needed(block) | {w for stage in block for w in stage.writes if w in (tables or {})}
        held = tuple(name for name in bytes_of if name in here)
        size = sum(bytes_of[name] for name in held)
        out += [Resident(stage.name, _merged(held, sizes), size) for stage in block]
        here -= set(waiting) - needed(stages[n:])
        here -= {name for name in tables or {} if not any(name in later.reads for later in stages[n:])}
    return tuple(out)


def _merged(names: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    """The names, with the component's in the place of its parts where none that is known is missing."""
    of = lambda name: parts.parse(name)[0]
    torn = {of(name) for name in set(known) - set(names)}
    return tuple(dict.fromkeys(name if of(name) in torn else of(name) for name in names))


def _peak(stages: Sequence[Resident]) -> int:
    return max((s.bytes for s in stages), default=0)


def room(activations: float = 0, limit: float | None = None) -> float | None:
    """Bytes that a device has for weights: what activations need is left to them, a tenth and 4 GB at least.

    Args:
        limit: bytes of its memory; None asks the device.
    """
    if limit is None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit - max(4e9, 0.1 * limit, activations)
