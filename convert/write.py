"""jdit leaves back to PyTorch: safetensors files in diffusers layout, written one tensor at a time.

The header of a safetensors file comes first and needs every shape; the table gives the shapes without data.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.typing import DTypeLike

from convert import ops
from convert.formats import DTYPES
from convert.ops import Op
from convert.table import ConversionError, Index, Rule, back, cast_dtype, dense, summary
from jdit.atomic import sync, write_file

NAMES = {np.dtype(d): name for name, d in DTYPES.items()}


class LeafOnDisk(Protocol):
    """An array or `checkpoint.Stored`: shape, dtype, and data by index."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index) -> np.ndarray: ...


class Out(NamedTuple):
    key: str
    leaf: LeafOnDisk
    index: Index
    op: Op
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> np.ndarray:
        return dense(self.op.inverse(np.asarray(self.leaf[self.index or ...])), self.dtype)


def empty(key: str) -> Out:
    """A tensor without values."""
    nothing: Any = np.zeros(0, np.float32)
    return Out(key, nothing, (), ops.same, nothing.shape, nothing.dtype)


def outputs(
    leaves: Mapping[str, LeafOnDisk], rules: Sequence[Rule], dtype: DTypeLike | None = None, keep: Collection[str] = ()
) -> list[Out]:
    """Every PyTorch tensor that the leaves make. See `write_back` for dtype and keep.

    Raises:
        ConversionError: a leaf that the rules do not write back whole, or a key that is written twice.
    """
    out: dict[str, Out] = {}
    problems: list[str] = []
    written = dict.fromkeys(leaves, 0)
    for key, path, index, op in back(rules, leaves):
        leaf = leaves[path]
        try:
            slot = np.broadcast_to(np.zeros((), np.int8), leaf.shape)[index]
            shape = op.inverse(slot).shape
        except (ValueError, IndexError) as e:
            problems.append(f"{path}: {tuple(leaf.shape)} cannot become {key} ({op.name}: {e})")
            continue
        if key in out:
            problems.append(f"{key}: written twice, from {path} too")
        out[key] = Out(key, leaf, index, op, shape, cast_dtype(np.dtype(leaf.dtype), dtype, path in keep))
        written[path] += slot.size
    for path, leaf in leaves.items():
        if written[path] != math.prod(leaf.shape):
            problems.append(f"{path}: {written[path]} of {math.prod(leaf.shape)} values have a way back")
    if problems:
        raise ConversionError(summary(problems))
    return list(out.values())


def write_tensors(path: Path, tensors: Sequence[Out], on_tensor: Callable[[str], None] | None = None) -> None:
    """One safetensors file: widest dtypes first, then by name, as the safetensors library orders them."""
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in ordered:
        header[t.key] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(part, "wb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            for t in ordered:
                if on_tensor is not None:
                    on_tensor(t.key)
                f.write(t.load().reshape(-1).view(np.uint8).data)
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_back(
    folder: str | os.PathLike,
    leaves: Mapping[str, LeafOnDisk],
    rules: Sequence[Rule],
    config: dict | None = None,
    *,
    stem: str = "diffusion_pytorch_model",
    max_shard_bytes: int = 10_000_000_000,
    dtype: DTypeLike | None = None,
    keep: Collection[str] = (),
    on_tensor: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write one component as diffusers or transformers would: config.json and safetensors, sharded with an index.

    Args:
        leaves: dotted path -> array or `checkpoint.Stored`.
        stem: "diffusion_pytorch_model", or "model" for transformers.
        max_shard_bytes: upper size of a file (a larger single tensor has a file of its own).
        dtype: what floating-point tensors are cast to; None keeps each leaf's own.
        keep: dotted paths of leaves that are not narrowed to `dtype`.
        on_tensor: called with each key before it is written.

    Returns:
        The weight files.

    Raises:
        ConversionError: leaves that the rules do not write back whole, before anything is written.
    """
    folder = Path(folder)
    shards: list[list[Out]] = [[]]
    tensors = outputs(leaves, rules, dtype, keep)
    size = 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    n = len(shards)
    names = [f"{stem}.safetensors"] if n == 1 else [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for name, shard in zip(names, shards):
        write_tensors(folder / name, shard, on_tensor)
    if n > 1:
        weight_map = {t.key: name for name, shard in zip(names, shards) for t in shard}
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_file(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    if config is not None:
        write_file(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return [folder / name for name in names]
