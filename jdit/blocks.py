"""Arrays on disk as blocks of rows: uncompressed Zarr v2, a file a block, cut along the first axis only.

The files are written and read plainly: TensorStore, which copies each block into memory of its own, takes four times
the processor time. What is written here any reader of Zarr reads, Orbax included.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdit import spans
from jdit.atomic import CheckpointError
from jdit.sharding import Path as ParamPath
from jdit.sharding import dotted

BLOCK_BYTES = 1 << 26
"""Target size of a block (one file of an array)."""


class Leaf(NamedTuple):
    """One array to be saved.

    Attributes:
        path: its place in the module.
        shape, dtype: of the whole array.
        blocks: rows -> consecutive blocks of that many rows of the first axis (the last may have fewer; a scalar is one
            block). Called once; nothing is computed before.
    """

    path: ParamPath
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[int], Iterable[np.ndarray]]


def leaf_of(path: ParamPath, array: Array | np.ndarray) -> Leaf:
    """A leaf that is in memory already."""

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for i in range(0, array.shape[0], rows) if array.ndim else ():
            yield np.asarray(array[i : i + rows])
        if not array.ndim:
            yield np.asarray(array)

    return Leaf(path, tuple(array.shape), np.dtype(array.dtype), blocks)


def block_rows(shape: Sequence[int], dtype: np.dtype) -> int:
    """Rows of the first axis in a block."""
    row = max(1, math.prod(shape[1:]) * np.dtype(dtype).itemsize)
    return max(1, min(shape[0], BLOCK_BYTES // row)) if shape else 1


def _write(file: Path, content: bytes | np.ndarray, size: int = 0) -> None:
    """Write and fsync; zeros up to `size` follow, as Zarr fills the last block up."""
    raw = content if isinstance(content, bytes) else np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
    with open(file, "wb", buffering=0) as f:
        rest = memoryview(raw)
        while rest:
            rest = rest[f.write(rest) :]
        f.truncate(max(size, len(raw)))
        os.fsync(f.fileno())


class Writer:
    """Writes arrays in the background, at most two files at a time, while the next block is computed."""

    def __enter__(self) -> "Writer":
        self._pool = ThreadPoolExecutor(2)
        self._pending: deque[Future] = deque()
        return self

    def __exit__(self, kind, *_) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        while self._pending and kind is None:
            self._pending.popleft().result()

    def _submit(self, *args) -> None:
        if len(self._pending) > 1:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(_write, *args))

    def write(self, leaf: Leaf, folder: Path) -> None:
        """One array as a folder of files.

        Raises:
            CheckpointError: blocks that do not make up the leaf.
        """
        rows = block_rows(leaf.shape, leaf.dtype)
        chunks = (rows, *leaf.shape[1:]) if leaf.shape else ()
        folder.mkdir(parents=True)
        described = {
            "zarr_format": 2, "shape": leaf.shape, "chunks": chunks, "dimension_separator": ".", "order": "C",
            "dtype": leaf.dtype.name if leaf.dtype.kind == "V" else leaf.dtype.str, "compressor": None, "filters": None,
            "fill_value": None,
        }  # fmt: skip
        self._submit(folder / ".zarray", json.dumps(described).encode())
        done, total = 0, leaf.shape[0] if leaf.shape else 1
        for number, block in enumerate(leaf.blocks(rows)):
            due = (min(rows, total - done), *leaf.shape[1:]) if leaf.shape else ()
            if block.dtype != leaf.dtype or block.shape != due:
                raise CheckpointError(f"{dotted(leaf.path)}: a block {block.dtype}{block.shape} for {leaf.dtype}{due}")
            self._submit(folder / _block_name(number, len(chunks)), block, math.prod(chunks) * leaf.dtype.itemsize)
            done += len(block) if leaf.shape else 1
        if done != total:
            raise CheckpointError(f"{dotted(leaf.path)}: {done} rows were produced, {leaf.shape} are needed")


def _block_name(number: int, rank: int) -> str:
    """Zarr's name of the block with this number along the first axis, the only one that is cut."""
    return ".".join([str(number), *["0"] * (rank - 1)])


class Stored:
    """An array of a checkpoint on disk; `stored[index]` reads only the rows that the index touches."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            meta = json.loads((folder / ".zarray").read_text())
            self.shape, self.chunks = tuple(meta["shape"]), tuple(meta["chunks"])
            self.dtype = jnp.dtype(meta["dtype"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{folder / '.zarray'}: no readable array: {e}") from e
        if meta.get("compressor") or self.chunks[1:] != self.shape[1:] or 0 in self.chunks:
            raise CheckpointError(f"{folder / '.zarray'}: compressed, or cut along other axes: not written by jdit")

    def _file(self, number: int) -> Path:
        return self.folder / _block_name(number, len(self.shape))

    def problems(self) -> list[str]:
        """Block files that are missing or of a wrong size."""
        out = []
        want = math.prod(self.chunks) * self.dtype.itemsize
        for number in range(-(-self.shape[0] // self.chunks[0]) if self.shape else 1):
            file = self._file(number)
            if not file.is_file():
                out.append(f"{file}: missing")
            elif (got := file.stat().st_size) != want:
                out.append(f"{file}: {got} bytes, {want} are due (truncated or corrupt)")
        return out

    def block(self, box: Sequence[slice]) -> np.ndarray:
        """A block (start and stop on each axis); hardly more is read."""
        if not self.shape:
            return self._part(0, lambda whole: whole)
        rows, *rest = box
        out, step = np.empty([s.stop - s.start for s in box], self.dtype), self.chunks[0]
        for number in range(rows.start // step, -(-rows.stop // step)):
            first, last = max(rows.start, number * step), min(rows.stop, (number + 1) * step)
            inside = (slice(first - number * step, last - number * step), *rest)
            out[first - rows.start : last - rows.start] = self._part(number, lambda chunk, at=inside: chunk[at])
        return out

    def _part(self, number: int, view: spans.View) -> np.ndarray:
        """What a view takes of one file."""
        file = self._file(number)
        try:
            return spans.part(file, self.chunks, self.dtype, 0, view)
        except EOFError as e:
            raise CheckpointError(f"{file}: {e}") from None
        except OSError as e:
            raise CheckpointError(f"{file}: {e.strerror}") from e

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        every = tuple(slice(0, n) for n in self.shape)
        if not self.shape or index[0] is ...:
            return self.block(every)[index]
        first, *rest = index
        rows = range(self.shape[0])[first]
        if isinstance(rows, int):
            return self.block((slice(rows, rows + 1), *every[1:]))[(0, *rest)]
        return self.block((slice(rows.start, max(rows.start, rows.stop)), *every[1:]))[
            (slice(None, None, rows.step), *rest)
        ]
