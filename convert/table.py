"""The table engine: a family's RULES against the keys of a checkpoint and the leaves of an abstract module.

A rule's source is a key template, matched whole: `blocks.{i}.attn.to_q.weight`. A placeholder that also stands in the
target becomes part of the path; `{i}` that does not is the index into a stacked leaf. Rules run in both directions.
Nothing is skipped: each key has exactly one rule and each element of each leaf exactly one source, or `plan` raises with
all problems at once.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from convert import ops
from convert.ops import Op

Index = tuple[int | slice, ...]
ALL = slice(None)


class ConversionError(ValueError):
    """A checkpoint that does not fit the model; the message lists every problem."""


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


def plan(keys: Mapping[str, Sequence[int]], rules: Sequence[Rule], targets: Mapping[str, object]) -> list[Fill]:
    """Match keys (name -> shape) with rules and leaves (dotted path -> shape and dtype).

    Raises:
        ConversionError: unknown keys, keys with several rules, leaves without a source or with two, wrong shapes.
    """
    sources: dict[str, list[Source]] = defaultdict(list)
    aliases: dict[str, list[Source]] = defaultdict(list)
    problems: list[str] = []
    for key in keys:
        hits = [(rule, hit) for rule in rules if (hit := _match(rule, key)) is not None]
        if len(hits) != 1:
            what = "no rule takes it" if not hits else f"{len(hits)} rules take it: {[r.source for r, _ in hits]}"
            problems.append(f"{key}: {what}")
            continue
        rule, (path, index) = hits[0]
        if path is None:
            continue
        if path not in targets:
            problems.append(f"{key}: the model has no parameter {path}")
            continue
        (aliases if rule.alias else sources)[path].append(Source(key, rule.op, index))
    for path, extra in aliases.items():
        if path not in sources:
            sources[path] = extra[:1]
    fills = []
    for path, leaf in targets.items():
        problems += _check_leaf(path, leaf, sources.get(path, []), keys, rules)
        fills.append(Fill(path, tuple(leaf.shape), np.dtype(leaf.dtype), sources.get(path, [])))
    if problems:
        lines = problems if len(problems) <= 20 else [*problems[:20], f"and {len(problems) - 20} more"]
        raise ConversionError(f"{len(problems)} problem{'s' * (len(problems) > 1)}:\n  " + "\n  ".join(lines))
    return fills


def _check_leaf(path: str, leaf, sources: list[Source], keys, rules: Sequence[Rule]) -> list[str]:
    problems, covered = [], 0
    seen: dict[str, str] = {}
    for key, op, index in sources:
        try:
            got = _shape(op, keys[key])
            want = _slot(tuple(leaf.shape), index)
        except (ValueError, IndexError) as e:
            problems.append(f"{key}: shape {tuple(keys[key])} cannot become {path} {tuple(leaf.shape)} ({op.name}: {e})")
            continue
        if got != want:
            problems.append(f"{key}: shape {tuple(keys[key])} gives {got}, {path} wants {want} ({op.name})")
        if (where := str(index)) in seen:
            problems.append(f"{key}: {path}{list(index)} already comes from {seen[where]}")
        seen[where] = key
        covered += int(np.prod(want))
    if not problems and covered != int(np.prod(leaf.shape)):
        missing = [k for r in rules if not r.alias for k, p, i in expand(r, {path: leaf}) if str(i) not in seen]
        problems.append(f"{path}: missing {', '.join(missing[:4])}{' ...' * (len(missing) > 4)}" if missing
                        else f"{path}: no rule fills it")  # fmt: skip
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


def fill(f: Fill, read: Callable[[str], np.ndarray], dtype: np.dtype | None = None) -> np.ndarray:
    """Build one leaf on the host: reads its sources one after another. `dtype` None keeps the sources' own."""
    out: np.ndarray | None = None
    for key, op, index in f.sources:
        value = op.forward(read(key))
        if out is None:
            if len(f.sources) == 1 and value.shape == f.shape:
                return np.ascontiguousarray(value, dtype=dtype)
            out = np.empty(f.shape, dtype or value.dtype)
        out[index] = value
    assert out is not None  # plan() has checked that each leaf has a source
    return out


def back(rules: Sequence[Rule], leaves: Mapping[str, object]) -> list[tuple[str, str, Index, Op]]:
    """The other direction: (key, path, index, op) for every PyTorch tensor, to be read as op.inverse(leaf[index])."""
    return [(k, p, i, r.op) for r in rules if not r.alias for k, p, i in expand(r, leaves)]
