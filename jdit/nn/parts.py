"""A transformer in two parts: the weights that make modulation, and those that the sampling loop reads.

Shifts, scales and gates depend on time (and pooled text) alone, so those of all steps are made before the loop. A
module says which parameters nothing else reads, by patterns of their dotted paths:

    modulation_weights = ("time.*", "blocks.*.mod.*", "final_mod.*")

A part of a module is the same module whose other parameters hold nothing: they are no leaves of it, hence no arguments
of a compiled program, and reading one is an error. "component/part" is what stages and memory plans call it.
"""

from fnmatch import fnmatchcase

from flax import nnx

from jdit.sharding import Path, dotted

MODULATION, LOOP = "modulation", "loop"


def name(component: str, part: str) -> str:
    return f"{component}/{part}"


def parse(name: str) -> tuple[str, str | None]:
    """The component and the part that a name stands for; None is all of it."""
    component, _, part = name.partition("/")
    return component, part or None


def overlap(name: str, other: str) -> bool:
    """Whether two names have parameters in common."""
    (one, part), (two, piece) = parse(name), parse(other)
    return one == two and (part == piece or part is None or piece is None)


def holds(module: type[nnx.Module], part: str | None, path: Path) -> bool:
    """Whether this part of a module has the parameter; None is all of it.

    Raises:
        ValueError: no such part.
    """
    if part is None:
        return True
    patterns = getattr(module, "modulation_weights", None)
    if part not in (MODULATION, LOOP) or patterns is None:
        have = "no parts: it declares no modulation_weights" if patterns is None else f"{MODULATION!r} and {LOOP!r}"
        raise ValueError(f"part {part!r} of {module.__name__}, which has {have}")
    return any(fnmatchcase(dotted(path), pattern) for pattern in patterns) == (part == MODULATION)


def take(module: nnx.Module, part: str) -> nnx.Module:
    """A part of a module; arrays are shared, not copied."""
    graphdef, state = nnx.split(module)
    kept = [(p, v if holds(type(module), part, p) else v.replace(None)) for p, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(kept))


def join(one: nnx.Module, other: nnx.Module) -> nnx.Module:
    """The module that two parts are of."""
    graphdef, state = nnx.split(one)
    rest = dict(nnx.to_flat_state(nnx.state(other)))
    both = [(p, rest[p] if v.get_value() is None else v) for p, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(both))
