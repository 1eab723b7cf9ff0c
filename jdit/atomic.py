"""Files and folders that are written whole or not at all: beside their place, fsynced, renamed."""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

MARKS = ("jdit.json", "model_index.json", "config.json")
"""A folder that may be overwritten has one of these."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the tensor."""


def _tag() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _dead(tag: str) -> bool:
    """Whether the process that made a temporary folder is gone (only this machine's processes can be asked)."""
    host, _, pid = tag.rpartition("-")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; a write still under way in a thread is waited for."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)


def _left(dst: Path, kind: str) -> list[Path]:
    """Temporary siblings of `dst` whose process is gone."""
    start = f".{dst.name}.{kind}-"
    return [p for p in dst.parent.iterdir() if p.name.startswith(start) and _dead(p.name.removeprefix(start))]


def _clean(dst: Path) -> None:
    """Remove what killed runs left beside `dst`; put back a folder that was being replaced."""
    for old in _left(dst, "replaced"):
        if dst.exists():
            _remove(old)
        else:
            os.rename(old, dst)
    for part in _left(dst, "partial"):
        _remove(part)


def _replace(part: Path, dst: Path) -> None:
    old = dst.with_name(f".{dst.name}.replaced-{_tag()}")
    if dst.exists():
        os.rename(dst, old)
    try:
        os.rename(part, dst)
    except BaseException:
        if old.exists():
            os.rename(old, dst)
        raise
    sync(dst.parent)
    _remove(old)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole(dst: str | os.PathLike, *, overwrite: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling of `dst` that becomes `dst` when the block ends, and vanishes if it raises (Ctrl-C too).

    What a killed process left is removed by the next call with the same `dst`. An existing `dst` is replaced only at
    the end, only with `overwrite`, and only if it holds a model.

    Args:
        need_bytes: refuse at once if the disk has less free.

    Raises:
        CheckpointError: `dst` exists, cannot be written, or the disk is too full.
    """
    dst = Path(os.path.abspath(dst))
    part = dst.with_name(f".{dst.name}.partial-{_tag()}")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        _clean(dst)
        if dst.exists() and not overwrite:
            raise CheckpointError(f"{dst} exists already; ask to overwrite it, or choose another name")
        if dst.is_dir() and any(dst.iterdir()) and not any((dst / mark).exists() for mark in MARKS):
            raise CheckpointError(f"{dst} is a folder without any of {', '.join(MARKS)}: no model, so not replaced")
        _remove(part)
        part.mkdir()
    except OSError as e:
        raise CheckpointError(f"{dst} cannot be written: {e.strerror or e}") from e
    try:
        if need_bytes > (free := shutil.disk_usage(part).free):
            raise CheckpointError(f"{dst} needs {need_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        yield part
        for folder, _, _ in os.walk(part):
            sync(Path(folder))
        _replace(part, dst)
    except OSError as e:
        raise CheckpointError(f"{dst} could not be written: {e.filename or ''} {e.strerror or e}") from e
    finally:
        _remove(part)


def write_file(path: Path, content: str | bytes) -> None:
    """Write beside its place, fsync, rename."""
    part = path.with_name(f".{path.name}.partial-{_tag()}")
    try:
        with open(part, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
