"""The table engine: a family's RULES against the keys of a checkpoint and the leaves of an abstract module.

A rule's source is a key template, matched whole: `blocks.{i}.attn.to_q.weight`. A placeholder that also stands in the
target becomes part of the path; `{i}` that does not is the index into a stacked leaf. Rules run in both directions.
Nothing is skipped: each key has exactly one rule and each element of each leaf exactly one source, or `plan` raises
with all problems at once.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from convert import ops
from convert.ops import Op

Index = tuple[int | slice, ...]
ALL = slice(None)


class ConversionError(ValueError):
    """A checkpoint that does not fit the model; the message lists every problem."""


def need(shapes: Mapping[str, Sequence[int]], key: str, what: str) -> Sequence[int]:
    """The shape of a tensor without which a file is not `what` it was taken for.

    Raises:
        ConversionError: it is missing.
    """
    if key not in shapes:
        raise ConversionError(f"not a {what}: tensor {key} is missing")
    return shapes[key]


class Rule(NamedTuple):
    """One line of a family's table.

    Attributes:
        source: key template with placeholders {i}, {j}, {k} for numbers.
        target: dotted path of the leaf, or None for a key that carries no weight of ours.
        op: PyTorch array -> our array.
        at: where in the (unstacked) leaf the array goes, for fused leaves: (ALL, 0) is q of a (D, 3, E) kernel.
        layers: for a stacked leaf, the upstream layer numbers that it holds, in order.
        alias: a second name of a leaf (tied weights): used only where the first is absent, never written back.
    """

    source: str
    target: str | None
    op: Op = ops.same
    at: Index = ()
    layers: Sequence[int] | None = None
    alias: bool = False


class Source(NamedTuple):
    key: str
    op: Op
    index: Index


class Fill(NamedTuple):
    """How one leaf is made: its dotted path, shape, dtype (of the target) and sources."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sources: list[Source]


@functools.cache
def _regex(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _match(rule: Rule, key: str) -> tuple[str | None, Index] | None:
    """(path, index into the leaf) if the rule takes this key."""
    m = _regex(rule.source).fullmatch(key)
    if m is None:
        return None
    numbers = {k: int(v) for k, v in m.groupdict().items()}
    if rule.layers is None:
        return rule.target and rule.target.format(**numbers), rule.at
    if numbers["i"] not in rule.layers:
        return None
    return rule.target and rule.target.format(**numbers), (rule.layers.index(numbers["i"]), *rule.at)


def _shape(op: Op, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape after `op`, without data; raises what the op raises on a shape it cannot take."""
    return op.forward(np.broadcast_to(np.zeros((), np.int8), tuple(shape))).shape


def _slot(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    return np.broadcast_to(np.zeros((), np.int8), shape)[index].shape


def plan(
    keys: Mapping[str, Sequence[int]],
    rules: Sequence[Rule],
    targets: Mapping[str, Any],
    where: Callable[[str], str] | None = None,
) -> list[Fill]:
    """Match keys (name -> shape) with rules and leaves (dotted path -> shape and dtype).

    Args:
        where: key -> the file that holds it, for messages.

    Raises:
        ConversionError: unknown keys, keys with several rules, leaves without a source or with two, wrong shapes.
    """
    fills, problems = match(keys, rules, targets, where)
    if problems:
        raise ConversionError(summary(problems))
    return fills


def summary(problems: Sequence[str], limit: int = 20) -> str:
    """All problems as one message: one or two on one line, more as a list that ends after `limit`."""
    if len(problems) <= 2:
        return "; ".join(problems)
    rest = [f"and {len(problems) - limit} more"] * (len(problems) > limit)
    return f"{len(problems)} problems:\n  " + "\n  ".join([*problems[:limit], *rest])


def match(
    keys: Mapping[str, Sequence[int]],
    rules: Sequence[Rule],
    targets: Mapping[str, Any],
    where: Callable[[str], str] | None = None,
) -> tuple[list[Fill], list[str]]:
    """`plan` with the problems as a list, nothing raised."""
    at = (lambda key: f"{where(key)}: {key}") if where else str
    sources: dict[str, list[Source]] = defaultdict(list)
    aliases: dict[str, list[Source]] = defaultdict(list)
    problems: list[str] = []
    for key in keys:
        hits = [(rule, hit) for rule in rules if (hit := _match(rule, key)) is not None]
        if len(hits) != 1:
            what = "no rule takes it" if not hits else f"{len(hits)} rules take it: {[r.source for r, _ in hits]}"
            problems.append(f"{at(key)}: {what}")
            continue
        rule, (path, index) = hits[0]
        if path is None:
            continue
        if path not in targets:
            problems.append(f"{at(key)}: the model has no parameter {path}")
            continue
        (aliases if rule.alias else sources)[path].append(Source(key, rule.op, index))
    for path, extra in aliases.items():
        filled = {str(source.index) for source in sources[path]}
        for source in extra:
            if str(source.index) not in filled:
                filled.add(str(source.index))
                sources[path].append(source)
    fills = []
    for path, leaf in targets.items():
        problems += _check_leaf(path, leaf, sources.get(path, []), keys, rules, at)
        fills.append(Fill(path, tuple(leaf.shape), np.dtype(leaf.dtype), sources.get(path, [])))
    return fills, problems


def _check_leaf(path: str, leaf, sources: list[Source], keys, rules: Sequence[Rule], at) -> list[str]:
    problems, covered = [], 0
    seen: dict[str, str] = {}
    for key, op, index in sources:
        have = tuple(keys[key])
        try:
            want = _slot(tuple(leaf.shape), index)
            covered += int(np.prod(want))
            if (got := _shape(op, have)) != want:
                problems.append(f"{at(key)}: shape {have} gives {got}, {path} wants {want} ({op.name})")
        except (ValueError, IndexError) as e:
            problems.append(f"{at(key)}: shape {have} cannot become {path} {tuple(leaf.shape)} ({op.name}: {e})")
        if (where := str(index)) in seen:
            problems.append(f"{at(key)}: {path}{list(index)} already comes from {seen[where]}")
        seen[where] = key
    if covered == int(np.prod(leaf.shape)):
        return problems
    missing = [k for r in rules if not r.alias for k, _, i in expand(r, {path: leaf}) if str(i) not in seen]
    if missing:
        more = f" (and {len(missing) - 1} more of its sources)" if len(missing) > 1 else ""
        problems.append(f"{at(missing[0])}: missing, {path} needs it{more}")
    elif not problems:
        problems.append(f"{path}: {'its sources overlap' if covered else 'no rule fills it'}")
    return problems


def expand(rule: Rule, targets: Mapping[str, object]) -> list[tuple[str, str, Index]]:
    """Every (key, path, index) that a rule can stand for, given the model's leaves."""
    if rule.target is None:
        return []
    if "{" not in rule.target:
        if rule.target not in targets:
            return []
        if rule.layers is None:
            return [(rule.source, rule.target, rule.at)]
        return [(rule.source.format(i=i), rule.target, (n, *rule.at)) for n, i in enumerate(rule.layers)]
    out = []
    for path in targets:
        if m := _regex(rule.target).fullmatch(path):
            numbers = m.groupdict()
            if rule.layers is None:
                out.append((rule.source.format(**numbers), path, rule.at))
            else:
                out += [(rule.source.format(i=i, **numbers), path, (n, *rule.at)) for n, i in enumerate(rule.layers)]
    return out


_NARROW = {np.dtype(d) for d in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The one dtype of `dtypes`; where they differ, the smallest of bfloat16, float32, float64 that holds them all."""
    kinds = {np.dtype(d) for d in dtypes}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds <= _NARROW:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)


def cast_dtype(own: np.dtype, asked: DTypeLike | None, keep: bool = False) -> np.dtype:
    """What an array of dtype `own` becomes where `asked` was asked for: only floating-point ones are cast, and those
    that are kept (float32 in every compute dtype) are not narrowed. None asks for nothing."""
    if asked is None or not jnp.issubdtype(own, jnp.floating):
        return np.dtype(own)
    wanted = np.dtype(jnp.dtype(asked))
    return np.dtype(own) if keep and wanted.itemsize < np.dtype(own).itemsize else wanted


TILE = 256


def _copy(out: np.ndarray, value: np.ndarray) -> None:
    """out[...] = value; a transposition goes in tiles that stay in the cache (4 times as fast on large matrices)."""
    if out.dtype == value.dtype and out.itemsize in (1, 2, 4, 8):  # NumPy moves bfloat16 element by element
        out, value = out.view(f"u{out.itemsize}"), value.view(f"u{out.itemsize}")
    if value.ndim < 2 or value.strides[-1] == value.itemsize:
        out[...] = value
        return
    for r in range(0, value.shape[-2], TILE):
        for c in range(0, value.shape[-1], TILE):
            out[..., r : r + TILE, c : c + TILE] = value[..., r : r + TILE, c : c + TILE]


def dense(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous array of this dtype; the same one if it is that already."""
    if value.flags.c_contiguous and value.dtype == dtype:
        return value
    out = np.empty(value.shape, dtype)
    _copy(out, value)
    return out


Read = Callable[..., np.ndarray]  # (key), or (key, function to the wanted part)


def fill(f: Fill, read: Read, dtype: np.dtype | None = None, box: tuple[slice, ...] | None = None) -> np.ndarray:
    """Build one leaf on the host, its sources read one after another. `dtype` None: what holds all of them exactly.

    Args:
        box: the block (start and stop on each axis) that is wanted of the leaf, with a dtype; None is all of it.
    """
    if box is not None and dtype is not None and any((s.start, s.stop) != (0, n) for s, n in zip(box, f.shape)):
        return _fill_box(f, read, dtype, box)
    out: np.ndarray | None = None
    for key, op, index in f.sources:
        value = op.forward(read(key))
        if out is None:
            whole = len(f.sources) == 1 and value.shape == f.shape
            if whole and value.flags.c_contiguous and value.dtype == (dtype or value.dtype):
                return value
            out = np.empty(f.shape, dtype or value.dtype)
        elif dtype is None and value.dtype != out.dtype:
            out = out.astype(common_dtype((out.dtype, value.dtype)), copy=False)
        _copy(out[(*index, ...)], value)
    assert out is not None  # plan() has checked that each leaf has a source
    return out


def _fill_box(f: Fill, read: Read, dtype: np.dtype, box: tuple[slice, ...]) -> np.ndarray:
    out = np.empty([s.stop - s.start for s in box], dtype)
    for key, op, index in f.sources:
        if (cut := _within(index, f.shape, box)) is not None:
            to, take = cut
            _copy(out[(*to, ...)], read(key, lambda w, op=op, take=take: op.forward(w)[take]))
    return out


def _within(index: Index, shape: tuple[int, ...], box: tuple[slice, ...]) -> tuple[Index, tuple[slice, ...]] | None:
    """Where in the box a source's values go, and which of them; None where there are none."""
    to: list[int | slice] = []
    take: list[slice] = []
    for at, n, wanted in zip((*index, *(ALL,) * (len(shape) - len(index))), shape, box):
        start, stop, _ = (slice(at, at + 1) if isinstance(at, int) else at).indices(n)
        low, high = max(start, wanted.start), min(stop, wanted.stop)
        if low >= high:
            return None
        to.append(low - wanted.start if isinstance(at, int) else slice(low - wanted.start, high - wanted.start))
        take += [] if isinstance(at, int) else [slice(low - start, high - start)]
    return tuple(to), tuple(take)


def back(rules: Sequence[Rule], leaves: Mapping[str, object]) -> list[tuple[str, str, Index, Op]]:
    """The other direction: (key, path, index, op) for every PyTorch tensor, to be read as op.inverse(leaf[index])."""
    return [(k, p, i, r.op) for r in rules if not r.alias for k, p, i in expand(r, leaves)]
