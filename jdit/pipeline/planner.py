"""Which mesh and which rules for a model, a size and devices: a proposal, and why. Numbers in, numbers out."""

import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jdit.nn.exchange import choose
from jdit.pipeline.memory import MemoryPlan

FEW = 512
"""Tokens a device below which its products are too small to be worth what it is told and tells."""


class Why(enum.Enum):
    """What a proposal can be for."""

    ONE = "one"  # device
    GUIDANCE = "guidance"  # its halves on two devices
    NO_GUIDANCE = "no guidance"  # nothing for a data axis
    SEQUENCE = "sequence"  # tokens are spread
    FEW = "few tokens"  # to spread
    HEADS = "heads"  # do not divide
    IDLE = "idle"  # devices that nothing is found for
    FITS = "fits"  # weights, as they are
    FSDP = "fsdp"  # weights that would not fit otherwise
    WAITS = "waits"  # what is read for its stage
    NO_ROOM = "no room"  # whatever is tried
    UNKNOWN = "unknown"  # memory of a device


class Reason(NamedTuple):
    why: Why
    text: str


class Work(NamedTuple):
    """What a usual call asks of the transformer.

    Attributes:
        tokens: of a picture or video. heads: of its attention.
        guided: whether a step has two halves, conditional and unconditional, in one batch.
    """

    tokens: int
    heads: int
    guided: bool


class Proposal(NamedTuple):
    """Axes of a mesh, the preset of `Rules` on it, why, and what is then on a device."""

    sizes: dict[str, int]
    rules: str
    reasons: tuple[Reason, ...]
    memory: MemoryPlan

    @property
    def mesh(self) -> str:
        return ",".join(f"{axis}={n}" for axis, n in self.sizes.items()) or "none"

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        reasons = [{"why": r.why.value, "text": r.text} for r in self.reasons]
        return {"mesh": self.mesh, "rules": self.rules, "reasons": reasons}


Memory = Callable[[Mapping[str, int], str], MemoryPlan]  # (axes of a mesh, preset of rules) -> what is on a device


def propose(work: Work, devices: int, memory: Memory) -> Proposal:
    """The mesh that uses most of the devices, guidance first, then tokens; and the rules under which the weights fit
    with the least to gather.

    Raises:
        ValueError: no devices.
    """
    if devices < 1:
        raise ValueError(f"{devices} devices; there must be 1 at least")
    sizes, reasons = _mesh(work, devices)
    rules, plan, more = _rules(sizes, memory)
    return Proposal(sizes, rules, tuple(reasons + more), plan)


def _mesh(work: Work, devices: int) -> tuple[dict[str, int], list[Reason]]:
    if devices == 1:
        return {}, [Reason(Why.ONE, "one device: nothing to spread over")]
    enough = max(1, work.tokens // FEW)
    meshes = [(data, min(devices // data, enough)) for data in ((1, 2) if work.guided else (1,))]
    data, sequence = max(meshes, key=lambda mesh: (mesh[0] * mesh[1], mesh[0]))
    out = []
    if data == 2:
        out.append(Reason(Why.GUIDANCE, "data=2: the conditional and the unconditional half of a step on two devices"))
    elif not work.guided:
        out.append(Reason(Why.NO_GUIDANCE, "no data axis: guidance is off, only several prompts would fill one"))
    if sequence > 1:
        each = -(-work.tokens // sequence)
        out.append(Reason(Why.SEQUENCE, f"sequence={sequence}: {work.tokens:,} tokens, {each:,} a device"))
    if work.heads % sequence:
        form = choose(work.heads, work.tokens, sequence, "auto")
        out.append(Reason(Why.HEADS, f"{work.heads} heads do not divide by {sequence}: attention by {form}"))
    if 1 < devices // data > enough:
        out.append(Reason(Why.FEW, f"{work.tokens:,} tokens: on more devices each would have fewer than {FEW}"))
    if idle := devices - data * sequence:
        text = f"{idle} of {devices} devices are left over: more prompts, or another size, would use them"
        out.append(Reason(Why.IDLE, text))
    axes = {"data": data, "sequence": sequence}
    return {axis: n for axis, n in axes.items() if n > 1}, out


def _rules(sizes: Mapping[str, int], memory: Memory) -> tuple[str, MemoryPlan, list[Reason]]:
    plain = "replicated"  # no tensor axis is proposed: its layers send the activations of all tokens
    first = memory(sizes, plain)
    if first.room is None:
        return plain, first, [Reason(Why.UNKNOWN, f"{plain}: memory of a device is unknown; {_peak(first)} are wanted")]
    room = f"{first.room / 1e9:.1f} GB"
    if first.fits and not first.waiting:
        return plain, first, [Reason(Why.FITS, f"{plain}: {_peak(first)} on a device, room for {room}")]
    rules, plan, out = plain, first, []
    if sizes:
        rules, plan = "fsdp", memory(sizes, "fsdp")
        out.append(
            Reason(Why.FSDP, f"fsdp: as {plain}, not all weights fit into the {room} that a device has for them")
        )
    if not plan.fits:
        out.append(Reason(Why.NO_ROOM, f"{_peak(plan)} on a device at least, room for {room}: take more of them"))
    elif plan.waiting:
        out.append(Reason(Why.WAITS, f"read for their stages and freed after: {', '.join(plan.waiting)}"))
    else:
        out.append(Reason(Why.FITS, f"{rules}: {_peak(plan)} a device, room for {room}"))
    return rules, plan, out


def _peak(plan: MemoryPlan) -> str:
    return f"{plan.peak / 1e9:.1f} GB"
