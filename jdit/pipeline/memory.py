"""The memory plan: which weights are on a device in each stage, and which wait on the host for theirs."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax

from jdit.pipeline.executor import Stage, blocks


class Resident(NamedTuple):
    """The weights that are on a device while a stage runs, in bytes a device."""

    stage: str
    components: tuple[str, ...]
    bytes: int


class MemoryPlan(NamedTuple):
    """How a pipeline's weights come and go.

    Attributes:
        waiting: components that are read for their stages and let go after the last of them.
        room: bytes a device has for weights; None where it does not tell.
        least: the peak if every component waited.
        activations: bytes a device beside the weights, about; 0 where unknown.
    """

    stages: tuple[Resident, ...]
    waiting: tuple[str, ...]
    room: int | None
    least: int
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
                "activations": self.activations, "room": self.room}  # fmt: skip


def plan(stages: Sequence[Stage], sizes: Mapping[str, int], room: float | None) -> MemoryPlan:
    """Let those components wait whose reading again costs least, so that every stage fits; all, where none does.

    Args:
        stages: of a usual call. sizes: component -> bytes a device. room: bytes for weights; None has all resident.
    """
    choices = [c for n in range(len(sizes) + 1) for c in itertools.combinations(sizes, n)]
    choices.sort(key=lambda names: sum(sizes[name] for name in names))
    least, limit = _peak(follow(stages, sizes, tuple(sizes))), None if room is None else int(room)
    made = lambda names: MemoryPlan(follow(stages, sizes, names), names, limit, least)
    return next((p for p in map(made, choices) if p.fits), made(tuple(sizes)))


def follow(stages: Sequence[Stage], sizes: Mapping[str, int], waiting: Collection[str]) -> tuple[Resident, ...]:
    """What is resident in each stage as the executor runs them: see `executor.Weights`."""
    here = {name for name in sizes if name not in waiting}
    out = []
    for n, block in blocks(stages):
        here |= {w for stage in block for w in stage.weights} & set(sizes)
        held = tuple(c for c in sizes if c in here)
        out += [Resident(stage.name, held, sum(sizes[c] for c in here)) for stage in block]
        here -= set(waiting) - {w for later in stages[n:] for w in later.weights}
    return tuple(out)


def _peak(stages: Sequence[Resident]) -> int:
    return max((s.bytes for s in stages), default=0)


def room(activations: float = 0) -> float | None:
    """Bytes that a device has for weights: what activations need is left to them, a tenth and 4 GB at least."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit - max(4e9, 0.1 * limit, activations)
