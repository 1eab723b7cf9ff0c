"""Leaves made from the tensors of a checkpoint, one after another: into memory, into a jdit checkpoint; and the check.

Everything is planned from the headers first, so that all problems are known before any weight is read.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from convert.readers import Reader
from convert.table import ConversionError, Fill, Rule, Source, cast_dtype, common_dtype, fill, match, summary
from convert.write import LeafOnDisk
from jdit.blocks import Leaf, block_rows
from jdit.sharding import Path, box, dotted, of_box

Targets = Mapping[Path, jax.ShapeDtypeStruct]


class Digest:
    """SHA-256 over the tensors that were read, in whatever order: (key, dtype, shape, bytes) sorted by key.

    A thread of its own hashes one tensor while the caller goes on with it; it must not be changed.
    """

    def __init__(self):
        self._tensors: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(1)
        self._running: Future | None = None

    def add(self, key: str, array: np.ndarray) -> None:
        self._wait()
        self._running = self._pool.submit(self._hash, key, array)

    def _hash(self, key: str, array: np.ndarray) -> None:
        h = hashlib.sha256(f"{key} {array.dtype} {array.shape}".encode())
        h.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._tensors[key] = h.hexdigest()

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None

    def hexdigest(self) -> str:
        self._wait()
        return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(self._tensors.items())).encode()).hexdigest()


def _match(reader: Reader, rules: Sequence[Rule], targets: Targets) -> tuple[list[Fill], list[str]]:
    fills, found = match(reader.keys(), rules, {dotted(p): leaf for p, leaf in targets.items()}, reader.where)
    real = lambda dtype: jnp.issubdtype(dtype, jnp.floating)
    for key in (s.key for f in fills if real(f.dtype) for s in f.sources):
        if not real(own := reader.tensors[key].dtype):
            what = f"{own} for a floating-point parameter (quantised weights are read in float8 alone)"
            found.append(f"{reader.where(key)}: {key}: {what}")
    return fills, found


def _plan(reader: Reader, rules: Sequence[Rule], targets: Targets) -> list[tuple[Path, Fill]]:
    fills, found = _match(reader, rules, targets)
    if found:
        raise ConversionError(summary(found))
    return list(zip(targets, fills, strict=True))


def problems(reader: Reader, rules: Sequence[Rule], targets: Targets) -> list[str]:
    """Everything that keeps a checkpoint from filling a module, from the headers alone."""
    return _match(reader, rules, targets)[1]


def _stored_dtype(reader: Reader, f: Fill, dtype: DTypeLike | None, keep: Collection[str] = ()) -> np.dtype:
    own = common_dtype(reader.tensors[s.key].dtype for s in f.sources)
    return cast_dtype(own, dtype, f.path in keep)


def _split(f: Fill, rows: int) -> Iterator[Fill]:
    """A stacked leaf as fills of `rows` layers each; any other leaf as one."""
    layers = [(s.index[0], s) for s in f.sources if s.index and isinstance(s.index[0], int)]
    if not f.shape or len(layers) < len(f.sources):
        yield f
        return
    for start in range(0, f.shape[0], rows):
        n = min(rows, f.shape[0] - start)
        part = [Source(s.key, s.op, (i - start, *s.index[1:])) for i, s in layers if 0 <= i - start < n]
        yield Fill(f.path, (n, *f.shape[1:]), f.dtype, part)


def _blocks(f: Fill, read: Callable[[str], np.ndarray], dtype: np.dtype) -> Callable[[int], Iterator[np.ndarray]]:
    def blocks(rows: int) -> Iterator[np.ndarray]:
        for part in _split(f, rows):
            array = fill(part, read, dtype)
            if not array.ndim:
                yield array
            else:
                for i in range(0, array.shape[0], rows):
                    yield array[i : i + rows]

    return blocks


def convert_component(
    reader: Reader,
    rules: Sequence[Rule],
    targets: Targets,
    dtype: DTypeLike | None = None,
    digest: Digest | None = None,
    keep: Collection[str] = (),
) -> list[Leaf]:
    """The leaves of a component for `checkpoint.save`: planned now, read when they are written.

    Args:
        dtype: what floating-point leaves are cast to; None keeps each as it is stored (where the sources of one leaf
            differ, the smallest dtype that holds them all).
        digest: takes in every tensor as it is read.
        keep: dotted paths of leaves that are not narrowed to `dtype`.

    Raises:
        ConversionError: keys and leaves that do not fit, all of them.
    """

    def read(key: str) -> np.ndarray:
        array = reader.read(key)
        if digest is not None:
            digest.add(key, array)
        return array

    leaves = []
    for path, f in _plan(reader, rules, targets):
        own = _stored_dtype(reader, f, dtype, keep)
        leaves.append(Leaf(path, f.shape, own, _blocks(f, read, own)))
    return leaves


def load_leaves(
    reader: Reader,
    rules: Sequence[Rule],
    targets: Targets,
    *,
    dtype: DTypeLike | None = None,
    on_leaf: Callable[[Path], None] | None = None,
    only: Collection[Path] | None = None,
) -> dict[Path, Array]:
    """Read a component into memory, each leaf put to its target's sharding before the next is read. Of several
    processes each reads what its devices hold.

    Args:
        targets: path -> shape, dtype and (optional) sharding; see `sharding.abstract`.
        dtype: of all floating-point leaves; None is each target's own.
        on_leaf: called before each leaf, for progress.
        only: the targets to be read; None is all.

    Raises:
        ConversionError: keys and leaves that do not fit, all of them, before anything is read.
    """
    out = {}
    for path, f in _plan(reader, rules, targets):
        if only is not None and path not in only:
            continue
        if on_leaf is not None:
            on_leaf(path)
        own = _stored_dtype(reader, f, f.dtype if dtype is None else dtype)
        host = fill(f, reader.read, own, box(targets[path]))
        out[path] = jax.block_until_ready(of_box(targets[path], host))
    return out


def check(
    leaves: Mapping[str, LeafOnDisk],
    reader: Reader,
    rules: Sequence[Rule],
    targets: Targets,
    dtype: DTypeLike | None = None,
    on_leaf: Callable[[Path], None] | None = None,
    keep: Collection[str] = (),
) -> list[str]:
    """Compare what was written with every source tensor, bit by bit, after op and cast.

    Args:
        leaves: dotted path -> array; `checkpoint.stored(folder, component)`.
        dtype, keep: what the conversion was asked for.

    Returns:
        One line a mismatch, naming file, tensor and parameter; empty if all agree.
    """
    out = []
    for path, f in _plan(reader, rules, targets):
        if on_leaf is not None:
            on_leaf(path)
        got, own = leaves.get(f.path), _stored_dtype(reader, f, dtype, keep)
        if got is None or got.shape != f.shape or got.dtype != own:
            what = "missing" if got is None else f"{got.dtype}{list(got.shape)}"
            out.append(f"{f.path}: {what}, {own}{list(f.shape)} is due")
        elif _differs(got, f, reader, own):
            for key, op, index in f.sources:
                want = np.asarray(op.forward(reader.read(key)), own)
                if wrong := np.count_nonzero(_bits(want) != _bits(np.asarray(got[index or ...]))):
                    out.append(f"{reader.where(key)}: {key}: {wrong} of {want.size} values differ in {f.path}")
    return out


def _differs(got: LeafOnDisk, f: Fill, reader: Reader, dtype: np.dtype) -> bool:
    """Whether a leaf on disk is another than its sources make, block by block."""
    start = 0
    for want in _blocks(f, reader.read, dtype)(block_rows(f.shape, dtype)):
        end = start + len(want) if want.ndim else 0
        have = np.asarray(got[start:end] if want.ndim else got[...])
        if not np.array_equal(_bits(want), _bits(have)):
            return True
        start = end
    return False


def _bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")
