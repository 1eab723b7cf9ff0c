"""Hub ids to local folders: the local cache first, the network after."""

import logging
import os
import re
from pathlib import Path

from convert.formats import PICKLED
from convert.layout import components, detect, read_json
from convert.readers import weight_sets
from convert.table import ConversionError

log = logging.getLogger("jdit")

ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_CONFIGS = ["*.json", "*.txt", "*.model"]


def resolve(source: str | os.PathLike, *, offline: bool = False) -> Path:
    """A local path, or the folder of a hub id ("org/name" or "org/name@revision").

    Of a repository in diffusers layout only the components' folders are fetched, safetensors without a variant where
    there are any.

    Raises:
        ConversionError: no such path; an id that is not cached whole while the hub cannot be reached or is not wanted.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    m = ID.fullmatch(str(source))
    if m is None:
        raise ConversionError(f"{source}: no such file or folder (and not a hub id like org/name)")
    from huggingface_hub import snapshot_download

    repo, revision = m["repo"], m["revision"]
    cached, lacks = None, "it is not in the local cache"
    try:
        cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        lacks = missing(cached)
    except (OSError, ValueError) as e:  # LocalEntryNotFoundError is both
        log.debug("%s: %s", repo, e)
    if cached is not None and lacks is None:
        return cached
    if offline:
        raise ConversionError(f"{source}: no such path, and as a hub id {lacks}; the hub was not asked (offline)")
    try:
        wanted, unwanted = _patterns(repo, revision)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as e:  # the hub's client raises its own, httpx's and OS errors
        reason = (str(e).strip().splitlines() or [""])[0]
        why = f"{type(e).__name__}: {reason}"
        raise ConversionError(
            f"{source}: no such path; as a hub id {lacks}, and the hub could not be reached ({why})"
        ) from e


def missing(snapshot: Path) -> str | None:
    """What a cached snapshot lacks to be a model, or None."""
    try:
        layout = detect(snapshot)
    except ConversionError as e:
        return f"its cached copy is incomplete ({e})"
    for name in components(layout.config) if layout.kind == "pipeline" else ():
        folder = snapshot / name
        if not folder.is_dir() or not any(folder.iterdir()):
            return f"its cached copy lacks {name}/"
        if (folder / "config.json").is_file() and "safety_checker" not in name and not _whole(folder):
            return f"its cached copy lacks weights of {name}/"
    return None


def _whole(folder: Path) -> bool:
    sets = weight_sets(folder)
    for paths in sets.values():
        for index in (p for p in paths if p.suffix == ".json"):
            if not all((folder / f).is_file() for f in read_json(index).get("weight_map", {}).values()):
                return False
    return bool(sets)


def _patterns(repo: str, revision: str | None) -> tuple[list[str], list[str]]:
    """Patterns of the files to fetch, and of those to leave."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(repo, revision=revision)
    safe = any(f.endswith(".safetensors") for f in files)
    below = "*/" if "model_index.json" in files else ""
    weights = [f"{below}*.safetensors"] if safe else [f"{below}*{suffix}" for suffix in PICKLED]
    if not below:  # original releases mix the two
        weights += [f"*{suffix}" for suffix in PICKLED]
    return _CONFIGS + weights, ["*.fp16*", "*.non_ema*", "*onnx*", "*openvino*", "flax*"]
