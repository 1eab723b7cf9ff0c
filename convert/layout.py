"""What lies at a path: which layout, which components, of which family."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from convert.formats import PICKLED, SAFETENSORS
from convert.readers import Reader, weight_sets
from convert.table import ConversionError, summary
from jdit.checkpoint import META, read_meta

Kind = Literal["jdit", "pipeline", "component", "file", "original"]


class Layout(NamedTuple):
    """What was found.

    Attributes:
        kind: "jdit" (jdit.json), "pipeline" (model_index.json), "component" (config.json and one set of weights),
            "file" (one weight file), "original" (a folder of weight files in a layout of its own).
        path: the folder or file.
        config: content of jdit.json, model_index.json or config.json; empty for the other kinds.
        parts: component name -> (library, upstream class, folder), for a pipeline; absent folders are left out.
        files: the weight files, for "file" and "original".
    """

    kind: Kind
    path: Path
    config: dict
    parts: dict[str, tuple[str, str, Path]]
    files: list[Path]


def read_json(path: Path) -> dict:
    """A JSON object of a checkpoint.

    Raises:
        ConversionError: not there, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as e:
        raise ConversionError(f"{path}: {e.strerror}") from e
    except ValueError as e:
        raise ConversionError(f"{path}: corrupt JSON: {e}") from e
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: a {type(value).__name__}, an object is needed")
    return value


def components(index: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """The components of a model_index.json, name -> (library, class); those that are null are left out."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }


def _weights(folder: Path) -> list[Path]:
    """All weight files below a folder, hidden ones left out."""
    found = (p for p in folder.rglob("*") if p.suffix in SAFETENSORS + PICKLED and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def detect(path: str | Path) -> Layout:
    """Tell the layout of a local path; no weights are read.

    Raises:
        ConversionError: nothing there, or nothing that looks like a model.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in SAFETENSORS + PICKLED:
            raise ConversionError(f"{path}: not a weight file; known suffixes are {', '.join(SAFETENSORS + PICKLED)}")
        return Layout("file", path, {}, {}, [path])
    if not path.is_dir():
        raise ConversionError(f"{path}: no such file or folder")
    if (path / META).is_file():
        return Layout("jdit", path, read_meta(path), {}, [])
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        entries = components(index)
        parts = {n: (lib, cls, path / n) for n, (lib, cls) in entries.items() if (path / n).is_dir()}
        if not parts:
            raise ConversionError(
                f"{path}: model_index.json names {sorted(entries)}, and none of these folders is here"
            )
        return Layout("pipeline", path, index, parts, [])
    files = _weights(path)
    if (path / "config.json").is_file() and files:
        config = read_json(path / "config.json")
        own = all(f.parent == path for f in files) and len({n.split(".")[0] for n in weight_sets(path)}) == 1
        if own and ("_class_name" in config or "architectures" in config or "model_type" in config):
            return Layout("component", path, config, {}, [])
    if not files:
        raise ConversionError(
            f"{path}: no model here: neither {META}, model_index.json, config.json with weights, nor weight files"
        )
    return Layout("original", path, {}, {}, files)


class Signature(NamedTuple):
    """How a component is told from its keys.

    Attributes:
        family: our family or config name, as the caller wants it back.
        component: name of the component in a pipeline ("transformer", "vae", ...).
        has: key templates, each must match some key below the prefix whole ({i} stands for a number).
        lacks: key templates of which none may match.
        prefix: of the component's keys in the file; "" for a file of its own.
        told: (file, prefix) -> whether it is that, by more than these keys; None is nothing more.
    """

    family: str
    component: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    prefix: str = ""
    told: Callable[[Reader, str], bool] | None = None


def _any(template: str, keys: Sequence[str]) -> bool:
    pattern = re.compile(re.sub(r"\\{\w\\}", r"\\d+", re.escape(template)))
    return any(pattern.fullmatch(key) for key in keys)


def fits(signature: Signature, reader: Reader) -> bool:
    """Whether a file holds what a signature tells of."""
    keys = [k[len(signature.prefix) :] for k in reader.tensors if k.startswith(signature.prefix)]
    if not all(_any(t, keys) for t in signature.has) or any(_any(t, keys) for t in signature.lacks):
        return False
    return signature.told is None or signature.told(reader, signature.prefix)


def recognise(
    reader: Reader, signatures: Sequence[Signature], ignore: Sequence[str] = ()
) -> dict[str, tuple[Signature, Reader]]:
    """Split a file into the components that its keys tell of.

    The first signature of a component that fits wins, so the special ones go first.

    Args:
        ignore: prefixes of keys that belong to no component and carry no weight of ours (EMA copies, schedules).

    Returns:
        component -> (signature, its keys without the prefix).

    Raises:
        ConversionError: nothing fits, or keys are left over.
    """
    found: dict[str, tuple[Signature, Reader]] = {}
    for signature in signatures:
        if signature.component in found:
            continue
        if fits(signature, reader):
            part = reader.sub(signature.prefix) if signature.prefix else reader
            found[signature.component] = (signature, part)
    if not found:
        raise ConversionError(f"{reader.name}: not a model that is known; its keys begin {_heads(reader.tensors)}")
    prefixes = tuple(s.prefix for s, _ in found.values()) + tuple(ignore)
    if rest := [k for k in reader.tensors if not k.startswith(prefixes)]:
        raise ConversionError(summary([f"{reader.where(k)}: {k}: belongs to no known component" for k in rest]))
    return found


def _heads(tensors: Mapping[str, object]) -> list[str]:
    return sorted({".".join(k.split(".")[:2]) for k in tensors})[:6]
