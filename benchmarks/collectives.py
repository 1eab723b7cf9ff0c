"""The collectives of a compiled program: which, how large, among how many devices, how often.

compiled = jax.jit(fn).lower(*args).compile()
for c in collectives(compiled.as_text()):
    print(c.kind, c.bytes, c.devices, c.times)
"""

import collections
import dataclasses
import math
import re

KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all",
         "collective-broadcast")  # fmt: skip
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
        kind: its opcode, without "-start".
        bytes: of its result on one device. shapes: of that result, as in "bf16[2,4,8]".
        devices: how many take part in one group; of a collective-permute 2. 0 is all.
        times: how often the program runs it. Of branches each counts; a loop of unknown length counts once.
    """

    kind: str
    bytes: int
    shapes: tuple[str, ...]
    devices: int
    times: int


def collectives(text: str) -> list[Collective]:
    """All collectives of a program, `compiled.as_text()`, in its order."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = bodies.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif " = " in line:
            lines.append(line)
    calls = {name: [c for line in body for c in _called(line)] for name, body in bodies.items()}
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, often: int):
        times[name] += often
        for callee, trips in calls.get(name, ()):
            visit(callee, often * trips)

    visit(entry, 1)
    found = ((name, _collective(line, times[name])) for name, body in bodies.items() for line in body if times[name])
    return [c for _, c in found if c is not None]


def counts(found: list[Collective]) -> dict[str, int]:
    """Instructions of each kind that there is."""
    return dict(collections.Counter(c.kind for c in found))


def _called(line: str) -> list[tuple[str, int]]:
    trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
    names = _CALLED.findall(line)
    if branches := _BRANCHES.search(line):
        names += [n.strip().lstrip("%") for n in branches[1].split(",")]
    return [(n, trips) for n in names]


def _collective(line: str, times: int) -> Collective | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    result, opcode = match.groups()
    kind, started = opcode.removesuffix("-start"), opcode.endswith("-start")
    if kind not in KINDS:
        return None
    arrays = _ARRAY.findall(result)
    if started and kind != "all-reduce":  # (operands, results, ...)
        arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
    size = sum(_itemsize(dtype) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)
    return Collective(kind, int(size), tuple(f"{t}[{dims}]" for t, dims in arrays), _devices(kind, line), times)


def _itemsize(dtype: str) -> float:
    if dtype in BYTES:
        return BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 0


def _devices(kind: str, line: str) -> int:
    if kind == "collective-permute":
        return 2
    if found := _MESH.search(line):
        sizes = dict(axis.split("=") for axis in found[1].replace("'", "").split(","))
        return math.prod(int(sizes[a.strip()]) for a in found[2].replace("'", "").split(","))
    if found := _GROUPS.search(line):
        return len(found[1].split(",")) if found[1] else 0
    return int(found[1]) if (found := _IOTA.search(line)) else 0
