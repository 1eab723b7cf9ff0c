"""The jdit layout on disk: a folder written whole or not at all.

    jdit.json                  what it is: family, variant, configs, scheduler, source and its digests (written last)
    <component>/               one Orbax checkpoint per component, readable by Orbax alone
    <tokenizer>/tokenizer.json

Leaves are saved one block of rows at a time, so that the host never holds more than a few blocks of a stacked leaf.
Arrays are uncompressed Zarr v2 (weights do not compress), a file a block: a missing or cut file is seen from its size.
"""

import contextlib
import itertools
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdit.atomic import CheckpointError, whole, write_file
from jdit.sharding import Path as ParamPath
from jdit.sharding import dotted

log = logging.getLogger("jdit")

META = "jdit.json"
FORMAT = 1
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


# --- saving


async def _done(write, folder: Path) -> None:
    try:
        await write
    except ValueError as e:  # what TensorStore makes of a full disk and its like
        raise CheckpointError(f"{folder} cannot be written: {str(e).splitlines()[0]}") from e


async def _write(leaf: Leaf, folder: Path) -> None:
    """One array as uncompressed Zarr v2, what Orbax reads; at most two blocks are in memory."""
    import tensorstore as ts

    rows = block_rows(leaf.shape, leaf.dtype)
    store = await ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "shape": leaf.shape,
                "chunks": (rows, *leaf.shape[1:]) if leaf.shape else (),
                "compressor": None,
            },
            "dtype": jnp.dtype(leaf.dtype).name,
            "store_data_equal_to_fill_value": True,
        },
        create=True,
        open=False,
    )
    pending: deque = deque()
    done = 0
    for block in leaf.blocks(rows):
        if block.dtype != leaf.dtype or block.shape[1:] != leaf.shape[1:]:
            got, due = f"{block.dtype}{block.shape}", f"{leaf.dtype}{leaf.shape}"
            raise CheckpointError(f"{dotted(leaf.path)}: a block {got} for {due}")
        place = store[done : done + block.shape[0]] if leaf.shape else store
        write = place.write(block, can_reference_source_data_indefinitely=True)
        write.commit.force()
        pending.append(write)
        done += block.shape[0] if leaf.shape else 1
        if len(pending) > 1:
            await _done(pending.popleft(), folder)
    for write in pending:
        await _done(write, folder)
    if done != (leaf.shape[0] if leaf.shape else 1):
        raise CheckpointError(f"{dotted(leaf.path)}: {done} rows were produced, {leaf.shape} are needed")


def _handler(**options):
    """Orbax's pytree handler in our storage form, with a leaf type of our own that is written as it is computed."""
    import orbax.checkpoint as ocp

    class LeafHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Sequence[Any], infos, args=None):
            for value, info in zip(values, infos, strict=True):
                await _write(value.leaf, Path(info.parent_dir) / info.name)
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


class Stored:
    """An array of a checkpoint on disk; `stored[index]` reads only the blocks that the index touches."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            meta = json.loads((folder / ".zarray").read_text())
            self.shape, self.chunks = tuple(meta["shape"]), tuple(meta["chunks"])
            self.dtype = jnp.dtype(meta["dtype"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{folder / '.zarray'}: no readable array: {e}") from e

    def problems(self) -> list[str]:
        """Block files that are missing or of a wrong size."""
        out = []
        want = math.prod(self.chunks) * self.dtype.itemsize
        for index in itertools.product(*(range(-(-d // c)) for d, c in zip(self.shape, self.chunks))):
            file = self.folder / (".".join(map(str, index)) or "0")
            if not file.is_file():
                out.append(f"{file}: missing")
            elif (got := file.stat().st_size) != want:
                out.append(f"{file}: {got} bytes, {want} are due (truncated or corrupt)")
        return out

    def __getitem__(self, index) -> np.ndarray:
        import tensorstore as ts

        store = ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{self.folder}/"},
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
        ).result()
        try:
            return store[index].read().result()
        except ValueError as e:
            raise CheckpointError(f"{self.folder}: {str(e).splitlines()[0]}") from e


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


def _raise(problems: list[str], where: Path) -> None:
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        more = [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise CheckpointError(f"{where}: {len(problems)} problems:\n  " + "\n  ".join([*problems[:20], *more]))


def restore(
    folder: str | os.PathLike, component: str, targets: Mapping[ParamPath, jax.ShapeDtypeStruct]
) -> dict[ParamPath, Array]:
    """Read one component straight into the shardings and dtypes of `targets` (see `sharding.abstract`).

    Each device reads its own part. A target without a sharding goes to the default device.

    Raises:
        CheckpointError: leaves missing, unknown or of another shape, files missing or cut: all at once.
    """
    import orbax.checkpoint as ocp

    root = Path(os.path.abspath(folder)) / component
    have = stored(folder, component)
    want = {dotted(path): leaf for path, leaf in targets.items()}
    problems = [f"{root / p}: missing" for p in want if p not in have]
    problems += [f"{root / p}: the model has no such parameter" for p in have if p not in want]
    problems += [
        f"{root / p}: shape {have[p].shape}, the model wants {tuple(leaf.shape)}"
        for p, leaf in want.items()
        if p in have and have[p].shape != tuple(leaf.shape)
    ]
    _raise(problems, root)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    args = {
        path: ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=leaf.dtype, sharding=leaf.sharding or here, global_shape=tuple(leaf.shape)
        )
        for path, leaf in targets.items()
    }
    largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in targets.values())
    handler = _handler(restore_concurrent_gb=max(4, 2 * math.ceil(largest / 1e9)))
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            tree = checkpointer.restore(root, item=_nest(targets), restore_args=_nest(args))
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{root} cannot be read: {str(e).splitlines()[0]}") from e
    return {path: _pick(tree, path) for path in targets}
