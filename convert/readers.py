"""PyTorch weights as one flat mapping from key to tensor: files, folders with or without an index, scaled float8."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.formats import PICKLED, SAFETENSORS, Tensor, tensors_of
from convert.table import ConversionError

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


class Reader:
    """Keys of one component.

    Attributes:
        name: where they come from, for messages.
        tensors: key -> Tensor.
        files: the weight files.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor], files: Iterable[Path]):
        self.name, self.tensors, self.files = name, dict(tensors), list(files)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Forget the tensors: memory that torch has mapped is released. No file is kept open."""
        self.tensors.clear()

    def keys(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape, what `table.plan` takes."""
        return {key: t.shape for key, t in self.tensors.items()}

    def read(self, key: str) -> np.ndarray:
        """One tensor as stored (bfloat16 and float8 by ml_dtypes); scaled float8 as float32."""
        return self.tensors[key].load()

    def sub(self, prefix: str, *others: str) -> "Reader":
        """The keys that begin with one of the prefixes, without it."""
        tensors: dict[str, Tensor] = {}
        for p in (prefix, *others):
            new = {key[len(p) :]: t for key, t in self.tensors.items() if key.startswith(p)}
            if double := next((key for key in new if key in tensors), None):
                raise ConversionError(f"{new[double].file}: {double}: under two of the prefixes {(prefix, *others)}")
            tensors |= new
        return Reader(f"{self.name} ({prefix}*)", tensors, self.files)

    def where(self, key: str) -> str:
        """The file that holds a key, for messages."""
        return self.tensors[key].file if key in self.tensors else self.name


# --- float8 with scales beside it


def _dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scaled float8 (`X.weight` with `X.scale_weight` or `X.weight_scale`) as what it stands for.

    Scales of activations and the markers of the format carry no weight and are left out.
    """
    out = dict(tensors)
    for key in tensors:
        base, _, last = key.rpartition(".")
        if last == "scaled_fp8":
            del out[key]
        elif last in ("scale_weight", "weight_scale") and (weight := f"{base}.weight") in tensors:
            if out[weight] is not tensors[weight]:
                raise ConversionError(f"{tensors[key].file}: {key}: a second scale of {weight}")
            out[weight] = _scaled(weight, tensors[weight], tensors[key])
            del out[key]
            for name in ("scale_input", "input_scale"):
                out.pop(f"{base}.{name}", None)
        elif last == "comfy_quant":
            form = bytes(tensors[key].load()).decode(errors="replace")
            if "float8" not in form:
                raise ConversionError(f"{tensors[key].file}: {key}: quantised as {form}; only float8 is supported")
            del out[key]
    return out


def _scaled(key: str, weight: Tensor, scale: Tensor) -> Tensor:
    """A float8 weight times its scale, of one number or one a row.

    Where dtypes are kept as stored it counts as bfloat16; its values come in float32, so that whatever dtype is asked
    for is the only rounding. They are looked up by their bytes, twice as fast as a cast.
    """
    if weight.dtype not in FLOAT8:
        raise ConversionError(f"{weight.file}: {key}: {weight.dtype} with a scale; only float8 weights may have one")
    size = math.prod(scale.shape)
    if size != 1 and not scale.shape[:1] == weight.shape[:1] == (size,):
        shapes = f"a scale of {list(scale.shape)} for a weight of {list(weight.shape)}"
        raise ConversionError(f"{scale.file}: {key}: {shapes}; one number and one a row are supported")

    def load() -> np.ndarray:
        values = np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)
        out = values[weight.load().view(np.uint8)]
        out *= scale.load().astype(np.float32).reshape(-1, *(1,) * (out.ndim - 1))
        return out

    return weight._replace(dtype=np.dtype(ml_dtypes.bfloat16), load=load)


# --- files and folders


def open_files(paths: Iterable[str | os.PathLike], name: str | None = None) -> Reader:
    """The union of several weight files.

    Raises:
        ConversionError: a file that cannot be read, or a key that is in two of them.
    """
    files = [Path(p) for p in paths]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            new = tensors_of(file)
        except OSError as e:
            raise ConversionError(f"{file}: {e.strerror}") from e
        if double := next((key for key in new if key in tensors), None):
            raise ConversionError(f"{file}: {double}: also in {tensors[double].file}")
        tensors |= new
    return Reader(name or ", ".join(map(str, files)), _dequantised(tensors), files)


def _index(path: Path) -> list[Path]:
    """The shards that an index names, after checking that each holds its keys."""
    try:
        weights = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(weights.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConversionError(f"{path}: corrupt index: {e}") from e
    if missing := [s for s in shards if not (path.parent / s).is_file()]:
        first = next(k for k, s in weights.items() if s == missing[0])
        raise ConversionError(
            f"{path.parent / missing[0]}: missing ({len(missing)} of {len(shards)} shards are); {first} is to be in it"
        )
    for shard in shards:
        have = tensors_of(path.parent / shard) if shard.endswith(SAFETENSORS) else None
        lost = [k for k, s in weights.items() if s == shard and have is not None and k not in have]
        if lost:
            raise ConversionError(f"{path.parent / shard}: {lost[0]}: missing, though {path.name} says it is here")
    return [path.parent / s for s in shards]


_SHARD = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})(?P<variant>\.[\w-]+)?(?P<suffix>\.\w+)")
_INDEX = re.compile(r"(?P<stem>.+?)(?P<suffix>\.safetensors|\.bin)\.index(?P<variant>\.[\w-]+)?\.json")


def weight_sets(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """Sets of weight files in a folder: name ("model", "model.fp16", ...) -> its index, its shards or its one file.

    Where the same set is there as safetensors and pickled, safetensors wins.
    """
    sets: dict[tuple[int, str], list[Path]] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if m := _INDEX.fullmatch(path.name):
            sets[m["suffix"] != ".safetensors", m["stem"] + (m["variant"] or "")] = [path]
        elif path.suffix in SAFETENSORS + PICKLED:
            m = _SHARD.fullmatch(path.name)
            key = (path.suffix not in SAFETENSORS, m["stem"] + (m["variant"] or "") if m else path.stem)
            if not any(p.suffix == ".json" for p in sets.get(key, [])):
                sets.setdefault(key, []).append(path)
    out: dict[str, list[Path]] = {}
    for (pickled, name), paths in sorted(sets.items()):
        index = [p for p in paths if p.suffix == ".json"]
        if not pickled or _safe_name(name) not in map(_safe_name, out):
            out[name] = index or paths
    return out


def _safe_name(name: str) -> str:
    return name.replace("pytorch_model", "model").replace("diffusion_model", "model")


def open_folder(folder: str | os.PathLike, variant: str | None = None) -> Reader:
    """The weights of one component's folder: one file, or shards with or without an index.

    Args:
        variant: "fp16" chooses `model.fp16.safetensors`; None the set without a variant, or the only one.

    Raises:
        ConversionError: no weights, several sets to choose from, a shard missing or not holding its keys.
    """
    folder = Path(folder)
    sets = weight_sets(folder)
    plain = {n: p for n, p in sets.items() if "." not in n}
    chosen = {n: p for n, p in sets.items() if n.endswith(f".{variant}")} if variant else plain or sets
    if not chosen:
        have = f"; there are {sorted(sets)}" if sets else ""
        raise ConversionError(f"{folder}: no weights{f' of variant {variant!r}' if variant else ''} in it{have}")
    if len(chosen) > 1:
        raise ConversionError(f"{folder}: several sets of weights, name one file: {sorted(chosen)}")
    (paths,) = chosen.values()
    return _open_set(folder, paths)


def open_sets(folder: str | os.PathLike) -> list[Reader]:
    """Every set of weights in a folder, a reader each; float8 copies beside what they were made from are passed over
    (`x_fp8` and its scales, `x_fp8_map`, beside `x`).

    Raises:
        ConversionError: a shard that is missing or does not hold its keys.
    """
    sets = weight_sets(folder)
    whole = lambda name: name.removesuffix("_map").removesuffix("_fp8")
    return [
        _open_set(Path(folder), paths) for name, paths in sets.items() if whole(name) == name or whole(name) not in sets
    ]


def _open_set(folder: Path, paths: list[Path]) -> Reader:
    if paths[0].suffix == ".json":
        return open_files(_index(paths[0]), str(folder))
    m = _SHARD.fullmatch(paths[0].name)
    if m and len(paths) != int(m["n"]):
        raise ConversionError(f"{folder}: {len(paths)} of {int(m['n'])} shards of {m['stem']}{m['suffix']} are here")
    return open_files(paths, str(folder) if len(paths) > 1 else None)


def open_weights(path: str | os.PathLike, variant: str | None = None) -> Reader:
    """A weight file or a component's folder."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path, variant)
    return open_files([path], str(path))
