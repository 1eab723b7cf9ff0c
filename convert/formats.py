"""Weight files: what is in them, and one tensor at a time.

Safetensors headers are parsed and checked here and tensors read with plain reads: mapped pages would count as memory of
the process. `.pth`, `.pt`, `.bin` and `.ckpt` go through torch.load(weights_only=True), if torch is there; nothing is
unpickled otherwise.
"""

import functools
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from convert.table import ConversionError
from jdit import spans

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pth", ".pt", ".bin", ".ckpt")
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
MAX_HEADER = 100_000_000
_ENTRY = re.compile(rb'"([^"\\]+)"\s*:\s*\{')


class Tensor(NamedTuple):
    """A tensor of a file: described from the header, its data read by `load`, or by `part` (None: whole or not at all),
    which takes a function to the part that is wanted, made of NumPy views, and reads hardly more than that."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    load: Callable[[], np.ndarray]
    part: Callable[[spans.View], np.ndarray] | None = None


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        ConversionError: no such file, a form that is not known, or a broken file.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    if path.suffix in SAFETENSORS:
        return _safetensors(path)
    if path.suffix in PICKLED:
        return _pickled(path)
    raise ConversionError(f"{path}: not a weight file; known suffixes are {', '.join(SAFETENSORS + PICKLED)}")


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Header of a safetensors file: 8 bytes of length, JSON, data (github.com/huggingface/safetensors, README)."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(8)
        if start.startswith(b"version "):
            raise ConversionError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        if len(start) < 8:
            raise ConversionError(f"{path}: {size} bytes is no safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise ConversionError(f"{path}: truncated or no safetensors file: header of {length} bytes in {size}")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("it is no object")
    except ValueError as e:
        raise ConversionError(f"{path}: {_near(raw, e)}: corrupt header: {e}") from e
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for key, entry in header.items():
        try:
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = np.dtype(DTYPES[entry["dtype"]])
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
                raise ValueError("negative or no numbers")
        except KeyError as e:
            raise ConversionError(f"{path}: {key}: {e} is missing or a dtype that is not supported") from e
        except (TypeError, ValueError) as e:
            raise ConversionError(f"{path}: {key}: corrupt header entry: {e}") from e
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ConversionError(f"{path}: {key}: {end - begin} bytes for {dtype}{list(shape)}")
        if end > size - 8 - length:
            raise ConversionError(f"{path}: {key}: truncated: ends at byte {8 + length + end}, the file has {size}")
        spans.append((begin, end, key))
        part = functools.partial(_read, path, key, shape, dtype, 8 + length + begin)
        entries[key] = Tensor(shape, dtype, str(path), functools.partial(part, lambda whole: whole), part)
    last = 0
    for begin, end, key in sorted(spans):
        if begin != last:
            raise ConversionError(f"{path}: {key}: begins at {begin}, the tensor before it ends at {last}")
        last = end
    if last != size - 8 - length:
        raise ConversionError(f"{path}: {size - 8 - length - last} bytes after the last tensor")
    return entries


def _near(raw: bytes, error: ValueError) -> str:
    """The tensor whose entry in a header cannot be parsed: the last one that begins before the place of the error."""
    place = getattr(error, "pos", getattr(error, "start", len(raw)))
    begun = [m for m in _ENTRY.finditer(raw) if m.start() <= place]
    return begun[-1][1].decode(errors="replace") if begun else "its first tensor"


def _read(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype, offset: int, view: spans.View) -> np.ndarray:
    try:
        return spans.part(path, shape, dtype, offset, view)
    except EOFError as e:
        raise ConversionError(f"{path}: {key}: {e}") from None
    except OSError as e:
        raise ConversionError(f"{path}: {key}: {e.strerror}") from e


def _reason(error: Exception) -> str:
    """Torch's, in a line: what it found where it says so, not its advice to load the file unsafely."""
    found = re.search(r"WeightsUnpickler error: (.*?)(?:\. |\.?$)", str(error), re.MULTILINE)
    return found[1] if found else ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as e:
        raise ConversionError(f"{path}: reading {path.suffix} files needs torch (pip install torch)") from e
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # torch raises pickle, zip, OS and runtime errors here
        raise ConversionError(f"{path}: not weights that torch reads safely: {_reason(e)}") from e
    while isinstance(state, Mapping) and not any(isinstance(v, torch.Tensor) for v in state.values()):
        inner = [v for v in state.values() if isinstance(v, Mapping)]
        if len(inner) != 1:
            raise ConversionError(f"{path}: no state dict in it, only {sorted(map(str, state))[:5]}")
        state = inner[0]
    if not isinstance(state, Mapping):
        raise ConversionError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return {
        key: Tensor(tuple(t.shape), _dtype(path, key, t), str(path), functools.partial(_from_torch, t))
        for key, t in state.items()
        if isinstance(t, torch.Tensor)
    }


def _dtype(path: Path, key: str, tensor) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)
    except TypeError as e:
        raise ConversionError(f"{path}: {key}: dtype {tensor.dtype} is not supported") from e


def _from_torch(tensor) -> np.ndarray:
    import torch

    t = tensor.detach().contiguous()
    name = str(t.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, name):
        return t.numpy()
    raw = t.view(torch.int16 if t.itemsize == 2 else torch.uint8)
    return raw.numpy().view(getattr(ml_dtypes, name))
