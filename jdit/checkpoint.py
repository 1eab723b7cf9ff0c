"""The jdit layout on disk: a folder written whole or not at all.

    jdit.json                  what it is: family, variant, configs, scheduler, source and its digests (written last)
    <component>/               one Orbax checkpoint per component, readable by Orbax alone
    <tokenizer>/tokenizer.json

Leaves are saved one block of rows at a time, so that the host never holds more than a few blocks of a stacked leaf.
Arrays are uncompressed Zarr v2 (weights do not compress), a file a block: a missing or cut file is seen from its size.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array

from jdit.atomic import CheckpointError, whole, write_file
from jdit.blocks import Leaf, Stored, Writer, leaf_of
from jdit.sharding import Path as ParamPath
from jdit.sharding import box, dotted, of_box

log = logging.getLogger("jdit")

META = "jdit.json"
FORMAT = 1


# --- saving


def _handler(**options):
    """Orbax's pytree handler in our storage form, with a leaf type of our own that is written as it is computed."""
    import orbax.checkpoint as ocp

    class LeafHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos, args=None):
            with Writer() as writer:
                for value, info in zip(values, infos, strict=True):
                    writer.write(value.leaf, Path(info.parent_dir) / info.name)
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (_Node, LeafHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=registry, **options
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns at each save that there are no OCDBT files to merge; we write none."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Node:
    """A leaf as one opaque pytree node (a NamedTuple would be a tree)."""

    def __init__(self, leaf: Leaf):
        self.leaf, self.shape, self.dtype = leaf, leaf.shape, leaf.dtype


def _nest(flat: Mapping[ParamPath, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = value
    return tree


def _pick(tree: Any, path: ParamPath) -> Any:
    for part in path:
        tree = tree[str(part)]
    return tree


Leaves = Iterable[Leaf] | Mapping[ParamPath, Array | np.ndarray]


def save(
    dst: str | os.PathLike,
    meta: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    components: Mapping[str, Leaves],
    tokenizers: Mapping[str, str | bytes | Path] | None = None,
    *,
    overwrite: bool = False,
    on_leaf: Callable[[str, Leaf], None] | None = None,
) -> None:
    """Write a jdit checkpoint, whole or not at all.

    Args:
        meta: content of jdit.json, or a function called when all leaves are written (digests are known only then).
        components: name -> leaves (streamed), or path -> array.
        tokenizers: name -> content of its tokenizer.json, or the file to copy.
        on_leaf: called with (component, leaf) before each leaf is written, for progress.

    Raises:
        CheckpointError: `dst` exists (without overwrite), cannot be written, or the disk is too full.
    """
    import orbax.checkpoint as ocp

    todo = {
        name: [leaf_of(p, a) for p, a in cast(Mapping[ParamPath, Any], leaves).items()]
        if isinstance(leaves, Mapping)
        else list(leaves)
        for name, leaves in components.items()
    }
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaves in todo.values() for leaf in leaves)
    with whole(dst, overwrite=overwrite, need_bytes=size) as part:
        for name, leaves in todo.items():
            if on_leaf is not None:
                leaves = [leaf._replace(blocks=_announced(leaf, name, on_leaf)) for leaf in leaves]
            with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
                checkpointer.save(part / name, _nest({leaf.path: _Node(leaf) for leaf in leaves}))
        for name, content in (tokenizers or {}).items():
            (part / name).mkdir()
            write_file(part / name / "tokenizer.json", content.read_bytes() if isinstance(content, Path) else content)
        described = {"format": FORMAT, **(meta() if callable(meta) else meta), "components": list(todo)}
        if tokenizers:
            described["tokenizers"] = list(tokenizers)
        write_file(part / META, json.dumps(described, indent=2) + "\n")
    log.info("%s: %.2f GB written", dst, size / 1e9)


def _announced(leaf: Leaf, name: str, on_leaf: Callable[[str, Leaf], None]):
    def blocks(rows: int) -> Iterable[np.ndarray]:
        on_leaf(name, leaf)
        return leaf.blocks(rows)

    return blocks


# --- reading


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """Content of jdit.json.

    Raises:
        CheckpointError: not a jdit checkpoint, a broken one, or one of a newer format.
    """
    path = Path(folder) / META
    try:
        meta = json.loads(path.read_text())
    except OSError as e:
        raise CheckpointError(f"{folder} is not a jdit checkpoint: {META}: {e.strerror}") from e
    except ValueError as e:
        raise CheckpointError(f"{path} is corrupt: {e}") from e
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
        raise CheckpointError(f"{path} has no format number")
    if meta["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {meta['format']}; this jdit reads up to {FORMAT}")
    return meta


def stored(folder: str | os.PathLike, component: str) -> dict[str, Stored]:
    """Dotted path -> array on disk, for one component of a jdit checkpoint.

    Raises:
        CheckpointError: no such component, or arrays whose files are missing or cut (all of them in one message).
    """
    root = Path(folder) / component
    if not (root / "_METADATA").is_file():
        have = read_meta(folder).get("components", [])
        raise CheckpointError(f"{folder} has no component {component!r}; it has {have}")
    names = sorted(p.name for p in root.iterdir() if (p / ".zarray").is_file())
    arrays = {name: Stored(root / name) for name in names}
    _raise([line for array in arrays.values() for line in array.problems()], root)
    return arrays


def misfits(
    folder: str | os.PathLike,
    component: str,
    arrays: Mapping[str, Stored],
    targets: Mapping[ParamPath, jax.ShapeDtypeStruct],
    *,
    partly: bool = False,
) -> list[str]:
    """Leaves of a model that a component on disk lacks, has too many of (unless it is read `partly`), or has in another
    shape: a line each."""
    root = Path(folder) / component
    want = {dotted(path): leaf for path, leaf in targets.items()}
    return [
        *(f"{root / p}: missing" for p in want if p not in arrays),
        *(f"{root / p}: the model has no such parameter" for p in arrays if p not in want and not partly),
        *(
            f"{root / p}: shape {arrays[p].shape}, the model wants {tuple(leaf.shape)}"
            for p, leaf in want.items()
            if p in arrays and arrays[p].shape != tuple(leaf.shape)
        ),
    ]


def _raise(problems: list[str], where: Path) -> None:
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        more = [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise CheckpointError(f"{where}: {len(problems)} problems:\n  " + "\n  ".join([*problems[:20], *more]))


def restore(
    folder: str | os.PathLike,
    component: str,
    targets: Mapping[ParamPath, jax.ShapeDtypeStruct],
    only: Collection[ParamPath] | None = None,
    *,
    partly: bool = False,
) -> dict[ParamPath, Array]:
    """Read one component straight into the shardings and dtypes of `targets` (see `sharding.abstract`), or `only` some.

    Each device reads its own part, each of several processes what its devices hold. A target without a sharding goes to
    the default device. What is read `partly` may have further leaves.

    Raises:
        CheckpointError: leaves missing, unknown or of another shape, files missing or cut: all at once.
    """
    import orbax.checkpoint as ocp

    root = Path(os.path.abspath(folder)) / component
    arrays = stored(folder, component)
    _raise(misfits(folder, component, arrays, targets, partly=partly), root)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = [path for path in targets if only is None or path in only]
    if jax.process_count() > 1:  # TensorStore reads whole blocks
        cut = lambda path: arrays[dotted(path)].block(box(targets[path]))
        return {path: of_box(targets[path], cut(path).astype(targets[path].dtype, copy=False)) for path in wanted}
    further = [tuple(name.split(".")) for name in arrays.keys() - {dotted(path) for path in targets}]
    item = dict.fromkeys([*targets, *further], ocp.PLACEHOLDER) | {path: targets[path] for path in wanted}
    args = {path: ocp.RestoreArgs() for path in further} | {
        path: ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=leaf.dtype, sharding=leaf.sharding or here, global_shape=tuple(leaf.shape)
        )
        for path, leaf in targets.items()
    }
    largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in targets.values())
    handler = _handler(restore_concurrent_gb=max(4, 2 * math.ceil(largest / 1e9)))
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            tree = checkpointer.restore(root, item=_nest(item), restore_args=_nest(args))
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{root} cannot be read: {str(e).splitlines()[0]}") from e
    return {path: _pick(tree, path) for path in wanted}
