"""Parts of arrays in files: where the elements of a view lie, and plain reads of no more than that."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

SHORT = 4096
"""Bytes below which stretches of a file are read together with what lies between them: a page."""

View = Callable[[np.ndarray], np.ndarray]


def spans(view: np.ndarray, base: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where the elements of a view lie in its contiguous base: (begin, end) of stretches, in bytes."""
    if not view.size:
        return
    bounds = np.lib.array_utils.byte_bounds
    begin, size, outer = bounds(view)[0] - bounds(base)[0], view.itemsize, []
    for stride, n in sorted((abs(s), n) for s, n in zip(view.strides, view.shape) if n > 1):
        if outer or (stride > size and size >= SHORT):
            outer.append((stride, n))
        else:
            size += (n - 1) * stride
    for steps in itertools.product(*(range(0, stride * n, stride) for stride, n in reversed(outer))):
        yield begin + sum(steps), begin + sum(steps) + size


def read(path: Path, out: np.ndarray, offset: int, parts: Iterable[tuple[int, int]]):
    """Read parts (begin, end), in bytes, of a contiguous array that lies in a file from `offset` on.

    Raises:
        EOFError: the file ends before; the message says where. OSError: it cannot be read.
    """
    raw = out.reshape(-1).view(np.uint8).data
    with open(path, "rb", buffering=0) as f:
        for begin, end in parts:
            f.seek(offset + begin)
            while begin < end:
                n = f.readinto(raw[begin:end])
                if not n:
                    raise EOFError(f"truncated after {begin} of {len(raw)} bytes")
                begin += n


def part(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int, view: View) -> np.ndarray:
    """`view` of the array that lies in a file from `offset` on; hardly more is read, unless something in it copies."""
    out = np.empty(shape, dtype)  # where nothing is written, the system gives it no memory
    wanted = view(out)
    if not np.may_share_memory(wanted, out):
        read(path, out, offset, [(0, out.nbytes)])
        return view(out)
    read(path, out, offset, spans(wanted, out))
    return wanted
