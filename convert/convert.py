"""Conversion of whole checkpoints: PyTorch layouts to jdit, and jdit (or PyTorch) to diffusers or original layout."""

import dataclasses
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import registry, stream, tokenizers, write
from convert.hub import resolve
from convert.layout import detect
from convert.source import Source, open_source
from convert.table import ConversionError, cast_dtype, summary
from jdit import checkpoint, zoo
from jdit.atomic import whole, write_file
from jdit.checkpoint import Leaf
from jdit.sharding import Rules, dotted

log = logging.getLogger("jdit")

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    only: Iterable[str] = (),
    check: bool = False,
    to: str = "jdit",
    overwrite: bool = False,
    parts: Mapping[str, str | Path] | None = None,
    progress: Progress | None = None,
) -> str:
    """Convert a checkpoint.

    Args:
        src: anything that `jdit.load` takes. dst: a folder that does not exist yet (a file for to="original").
        dtype: of floating-point tensors; None keeps each as it is stored.
        only: component names; none is all. check: read back and compare every tensor with its source.
        to: "jdit", "diffusers", or "original" (one safetensors file with the release's own names).

    Returns:
        One line that says what was written.

    Raises:
        ConversionError, CheckpointError: with file and tensor, before anything is written where possible.
    """
    path = place(src)
    is_jdit = path.is_dir() and detect(path).kind == "jdit"
    if to == "jdit":
        if is_jdit:
            raise ConversionError(f"{src} is a jdit checkpoint already; give --to diffusers or --to original")
        source = open_source(path, parts=parts, plan=zoo.BUNDLED.get(str(src)))
        return _to_jdit(_only(source, only), str(src), Path(dst), dtype, check, overwrite, progress)
    if not is_jdit:
        raise ConversionError(f"{src}: --to {to} takes a jdit checkpoint; convert to one first")
    if parts:
        raise ConversionError(f"{src}: parts go with PyTorch checkpoints; a jdit checkpoint has all of its own")
    return _back(path, Path(dst), to, dtype, set(only), overwrite, check, progress)


def place(src: str | Path) -> Path:
    if str(src) in zoo.BUNDLED and not Path(src).exists():
        return Path(zoo.__file__).parent / "assets" / str(src)
    return resolve(src)


def _only(source: Source, only: Iterable[str]) -> Source:
    wanted = set(only)
    if unknown := sorted(wanted - set(source.parts)):
        raise ConversionError(f"{source.path} has no component {', '.join(unknown)}; it has {', '.join(source.parts)}")
    if wanted:
        source.parts = {n: p for n, p in source.parts.items() if n in wanted}
        source.tokenizers = {n: t for n, t in source.tokenizers.items() if _encoder_of(n) in wanted}
    return source


def _encoder_of(tokenizer: str) -> str:
    return tokenizer.replace("tokenizer", "text_encoder")


@functools.cache
def targets(cfg: Any) -> stream.Targets:
    """The leaves of a config, without placement. Kept: it takes seconds to trace a module."""
    return registry.of_config(cfg).targets(cfg)


@functools.cache
def kept(cfg: Any) -> frozenset[str]:
    """Leaves that are float32 whatever the compute dtype (modulation tables, norms): no conversion narrows them."""
    half = targets(registry.placed(cfg, "bfloat16", Rules()))
    return frozenset(dotted(path) for path, leaf in half.items() if leaf.dtype == jnp.float32)


def _to_jdit(source: Source, name: str, dst: Path, dtype, check: bool, overwrite: bool, progress) -> str:
    digests = {n: stream.Digest() for n in source.parts}
    components: dict[str, list[Leaf]] = {}
    problems = source.misfits()
    for n, part in source.parts.items():
        if found := stream.problems(part.reader, part.rules, targets(part.cfg)):
            problems += found
        else:
            components[n] = stream.convert_component(
                part.reader, part.rules, targets(part.cfg), dtype, digests[n], kept(part.cfg)
            )
    if problems:
        raise ConversionError(summary(problems))
    meta = lambda: {
        **description(source),
        "source": {"name": Path(name).name if Path(name).exists() else name,
                   "tensors_sha256": {n: d.hexdigest() for n, d in digests.items()}},
    }  # fmt: skip
    tokens = {n: tokenizers.dumps(t) for n, t in source.tokenizers.items()}
    on_leaf = _leaf_progress(components, progress, "write")
    checkpoint.save(dst, meta, components, tokens, overwrite=overwrite, on_leaf=on_leaf)
    size = sum(_bytes(leaf) for leaves in components.values() for leaf in leaves)
    line = f"{dst}: {', '.join(components)}, {size / 1e9:.3g} GB"
    if check:
        wrong: list[str] = []
        seen = _leaf_progress(components, progress, "check")
        for n, part in source.parts.items():
            by = {leaf.path: leaf for leaf in components[n]}
            tell = (lambda p, n=n, by=by: seen(n, by[p])) if seen else None
            wrong += stream.check(
                checkpoint.stored(dst, n), part.reader, part.rules, targets(part.cfg), dtype, tell, kept(part.cfg)
            )
        if wrong:
            shutil.rmtree(dst)
            raise ConversionError(f"{summary(wrong)}; {dst} was removed")
        line += "; every tensor agrees with its source"
    source.close()
    return line


def description(source: Source) -> dict[str, Any]:
    """jdit.json's account of a source."""
    return {
        "family": source.family, "variant": source.variant,
        "configs": {n: registry.describe(p.cfg) for n, p in source.parts.items()},
        "scheduler": dict(source.scheduler), "plan": dataclasses.asdict(source.plan), "settings": source.settings,
    }  # fmt: skip


def _bytes(leaf: Leaf) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _leaf_progress(components: Mapping[str, Sequence[Leaf]], progress: Progress | None, what: str):
    if progress is None:
        return None
    total = sum(_bytes(leaf) for leaves in components.values() for leaf in leaves)
    done = 0

    def on_leaf(name: str, leaf: Leaf):
        nonlocal done
        progress(f"{what} {name}", done, total)
        done += _bytes(leaf)

    return on_leaf


def described(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """jdit.json of a checkpoint, and the configs in it.

    Raises:
        CheckpointError: an entry is missing, or not of the kind that it should be.
    """
    meta = checkpoint.read_meta(path)
    try:
        configs = {n: registry.from_description(c) for n, c in meta["configs"].items()}
        if meta["family"] not in registry.FAMILIES:
            raise ValueError(f"family {meta['family']!r} is not known; there are {sorted(registry.FAMILIES)}")
        meta["scheduler"]["_class_name"]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        what = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else str(e)
        raise checkpoint.CheckpointError(f"{path / checkpoint.META}: {what}") from None
    return meta, configs


def _back(path: Path, dst: Path, to: str, dtype, only: set[str], overwrite: bool, check: bool, progress) -> str:
    meta, configs = described(path)
    if unknown := sorted(only - set(configs)):
        raise ConversionError(f"{path} has no component {', '.join(unknown)}; it has {', '.join(configs)}")
    configs = {n: c for n, c in configs.items() if not only or n in only}
    stored = {n: checkpoint.stored(path, n) for n in configs}
    if wrong := [line for n, cfg in configs.items() for line in checkpoint.misfits(path, n, stored[n], targets(cfg))]:
        raise ConversionError(summary(wrong))
    if to == "original":
        return _to_original(meta, configs, stored, dst, dtype, overwrite, check, progress)
    family = registry.FAMILIES[meta["family"]]
    settings = dict(meta.get("settings", {}))
    processor = settings.pop("image_processor", None)
    pipeline = family.pipeline(configs) if family.pipeline else family.pipelines[0]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1", **settings}
    with whole(dst, overwrite=overwrite) as part:
        for n, upstream_class in family.components.items():
            if n not in configs:
                index[n] = [None, None]
                continue
            component, library = registry.of_config(configs[n]), registry.COMPONENTS[upstream_class].library
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            tell = (lambda key, n=n: progress(f"write {n}", 0, 1)) if progress else None
            config = component.upstream_config(configs[n])
            write.write_back(
                part / n, stored[n], component.rules(configs[n]), config, stem=stem, dtype=dtype,
                keep=kept(configs[n]), on_tensor=tell,
            )  # fmt: skip
            index[n] = [library, upstream_class]
        for n, upstream_class in family.tokenizers.items():
            if n in meta.get("tokenizers", ()) and _encoder_of(n) in configs:
                tokenizers.export(tokenizers.load(path / n), part / n)
                index[n] = ["transformers", upstream_class]
            else:
                index[n] = [None, None]
        if processor is not None:
            folder, upstream_class, tokenizer = family.processor
            (part / folder).mkdir()
            write_file(part / folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
            if tokenizer and tokenizer in meta.get("tokenizers", ()):
                tokenizers.export(tokenizers.load(path / tokenizer), part / folder)
            index[folder] = ["transformers", upstream_class]
        (part / "scheduler").mkdir()
        write_file(part / "scheduler" / "scheduler_config.json", json.dumps(meta["scheduler"], indent=2) + "\n")
        index["scheduler"] = ["diffusers", meta["scheduler"]["_class_name"]]
        write_file(part / "model_index.json", json.dumps(index, indent=2) + "\n")
    line = f"{dst}: {', '.join(configs)} in diffusers layout"
    if check:
        _check_back(open_source(dst), stored, dtype)
        line += "; every tensor agrees with its source"
    return line


class _Cast:
    """An array on disk as `write.outputs` casts it: floating-point ones only, read by index."""

    def __init__(self, stored: checkpoint.Stored, dtype: str, keep: bool):
        self.stored, self.shape = stored, stored.shape
        self.dtype = cast_dtype(np.dtype(stored.dtype), dtype, keep)

    def __getitem__(self, index) -> np.ndarray:
        return np.asarray(self.stored[index]).astype(self.dtype)


def _check_back(written: Source, stored: Mapping[str, Mapping[str, checkpoint.Stored]], dtype):
    """Read the PyTorch files that were written as a source, and compare with the checkpoint that they came from."""
    wrong: list[str] = []
    for n, part in written.parts.items():
        keep = kept(part.cfg)
        cast = {k: v if dtype is None else _Cast(v, dtype, k in keep) for k, v in stored[n].items()}
        wrong += stream.check(cast, part.reader, part.rules, targets(part.cfg), dtype, None, keep)
    written.close()
    if wrong:
        raise ConversionError(summary(wrong))


def _to_original(meta, configs, stored, dst: Path, dtype, overwrite: bool, check: bool, progress) -> str:
    originals = registry.FAMILIES[meta["family"]].originals
    if dst.suffix != ".safetensors":
        raise ConversionError(f"{dst}: --to original writes one file; its name must end in .safetensors")
    if dst.exists() and not overwrite:
        raise checkpoint.CheckpointError(f"{dst} exists already; ask to overwrite it, or choose another name")
    tensors = []
    for n, cfg in configs.items():
        prefix, own = originals[n].prefix, write.outputs(stored[n], originals[n].rules(cfg), dtype, kept(cfg))
        own += [write.empty(mark) for mark in originals[n].marks(cfg)] if originals[n].marks else []
        _warn_of_loss(n, cfg, originals[n].config, {t.key: t.shape for t in own})
        tensors += [t._replace(key=prefix + t.key) for t in own]
    write.write_tensors(dst, tensors, (lambda key: progress("write", 0, 1)) if progress else None)
    line = f"{dst}: {', '.join(configs)} in original layout"
    if check:
        _check_back(open_source(dst), stored, dtype)
        line += "; every tensor agrees with its source"
    return line


def _warn_of_loss(name: str, cfg: Any, read: Callable[[Any], Any], shapes: Mapping[str, Sequence[int]]):
    """Single files carry no config: what their shapes do not tell, a reader takes to be as in the published ones."""
    try:
        ours, theirs = registry.describe(cfg), registry.describe(read(shapes))
    except ValueError as e:
        raise ConversionError(f"{name} cannot be read back from the original layout: {e}") from None
    if lost := [f"{k}={theirs[k]!r} (it is {v!r})" for k, v in ours.items() if theirs[k] != v]:
        log.warning("original layout carries no config; readers will take %s to have %s", name, ", ".join(lost))
