"""A PyTorch checkpoint opened, whatever its layout: components with configs, tables and readers; no weights read."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import registry, tokenizers
from convert.family import Original
from convert.hub import resolve
from convert.layout import Layout, components, detect, fits, read_json, recognise
from convert.readers import Reader, Tensor, open_folder, open_sets, open_weights
from convert.table import ConversionError, Rule, summary
from jdit import zoo
from jdit.nn.text.tokenizer import Tokenizer
from jdit.pipeline.base import Parts
from jdit.pipeline.families import PIPELINES
from jdit.structs import Plan

log = logging.getLogger("jdit")


OTHERS = {"process_checkpoint", "relighting_lora"}
"""Folders of original releases that hold other models: those which prepare driving videos, additions."""


@dataclasses.dataclass
class Part:
    """One component: what it is and where its tensors are.

    Attributes:
        cfg: our config. rules: the table between `reader`'s keys and our leaves.
        from_shapes: whether the config was read off the tensors.
    """

    cfg: Any
    rules: Sequence[Rule]
    reader: Reader
    from_shapes: bool = False


@dataclasses.dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        parts: upstream's component name -> Part.
        scheduler: scheduler_config.json, the family's own where there is none.
        variant: a name of the zoo, or None.
        settings: what the family reads from model_index.json, and its image processor's config.
    """

    path: Path
    family: str
    variant: str | None
    parts: dict[str, Part]
    tokenizers: dict[str, Tokenizer]
    scheduler: dict[str, Any]
    plan: Plan
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def misfits(self) -> list[str]:
        """What keeps the components from working together, a line each; parts of a model are not judged."""
        configs = {n: p.cfg for n, p in self.parts.items()}
        if not {"transformer", "vae"} <= configs.keys():
            return []
        parts = Parts(self.family, self.variant, configs, self.tokenizers, self.scheduler, self.plan, self.settings)
        return [f"{self.path}: {line}" for line in PIPELINES[self.family].misfits(parts)]

    def close(self):
        for part in self.parts.values():
            part.reader.close()


def open_source(
    source: str | Path, *, parts: Mapping[str, str | Path] | None = None, plan: Plan | None = None
) -> Source:
    """Open a diffusers folder, a component folder, an original release (file or folder), or a hub id.

    Args:
        parts: component or tokenizer name -> file or folder to take it from instead.
        plan: how it is run; None is the recognised variant's.

    Raises:
        ConversionError: nothing there, an unknown layout or component, or files that cannot be read; all findings.
    """
    path = resolve(source)
    layout = detect(path)
    if layout.kind == "jdit":
        raise ConversionError(f"{path} is a jdit checkpoint already, not a PyTorch one")
    family, found, tokens, scheduler = _OPENERS[layout.kind](layout, set(parts or ()))
    names = registry.FAMILIES[family]
    for name, place in (parts or {}).items():
        if name in names.components:
            found[name] = _replacement(family, name, Path(place))
        elif name in names.tokenizers:
            tokens[name] = tokenizers.load(Path(place))
        else:
            raise ConversionError(f"{family} has no part {name!r}; it has {[*names.components, *names.tokenizers]}")
    if names.complete is not None:
        for name, cfg in names.complete({n: p.cfg for n, p in found.items()}).items():
            found[name].cfg = cfg if found[name].from_shapes else found[name].cfg
    configs = {n: p.cfg for n, p in found.items()}
    variant = zoo.recognise(configs, f"{source} {path.name}", family)
    known = zoo.VARIANTS[variant] if variant else None
    scheduler = scheduler or dict(known.scheduler if known else names.scheduler)
    plan = plan or (known.plan if known else zoo.PLANS.get(family, Plan()))
    if layout.kind == "pipeline":
        settings = {n: layout.config[n] for n in names.settings if layout.config.get(n) is not None}
    else:
        settings = (known.settings or {}) if known else names.guess(configs) if names.guess else {}
    if processor := _image_processor(path / names.processor.folder):
        settings = {**settings, "image_processor": processor}
    return Source(path, family, variant, found, tokens, scheduler, plan, dict(settings))


def _image_processor(folder: Path) -> dict[str, Any] | None:
    places = [folder / n for n in ("preprocessor_config.json", "processor_config.json")]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        return None
    config = read_json(found)
    return config.get("image_processor", config)


def _component(folder: Path, upstream_class: str) -> Part:
    component = registry.COMPONENTS[upstream_class]
    try:
        cfg = component.config(read_json(folder / "config.json"))
    except (ValueError, TypeError) as e:
        raise ConversionError(f"{folder / 'config.json'}: {e}") from None
    return Part(cfg, component.rules(cfg), open_folder(folder))


def _open_pipeline(layout: Layout, elsewhere: set[str]):
    pipeline = layout.config.get("_class_name")
    family = next((f for f, known in registry.FAMILIES.items() if pipeline in known.pipelines), None)
    if family is None:
        known = sorted(p for f in registry.FAMILIES.values() for p in f.pipelines)
        raise ConversionError(f"{layout.path / 'model_index.json'}: {pipeline!r} is not supported; supported: {known}")
    parts, tokens, scheduler, problems = {}, {}, {}, []
    names = registry.FAMILIES[family]
    for name, (_, upstream_class) in components(layout.config).items():
        folder = layout.path / name
        try:
            if name in elsewhere or name == names.processor.folder:
                continue
            if name not in (*names.components, *names.tokenizers, "scheduler"):
                log.warning("%s: %s (%s) is not used by %s", layout.path, name, upstream_class, family)
            elif name not in layout.parts:
                problems.append(f"{folder}: the folder that model_index.json names is missing")
            elif name == "scheduler":
                scheduler = read_json(folder / "scheduler_config.json")
            elif name in names.tokenizers:
                tokens[name] = tokenizers.load(folder)
            elif upstream_class in registry.COMPONENTS:
                parts[name] = _component(folder, upstream_class)
            else:
                known = sorted(registry.COMPONENTS)
                problems.append(f"{folder}: {upstream_class!r} is not supported; supported: {known}")
        except ValueError as e:
            problems.append(str(e))
    if problems:
        raise ConversionError(summary(problems))
    return family, parts, tokens, scheduler


def _open_component(layout: Layout, elsewhere: set[str]):
    name = layout.config.get("_class_name") or (layout.config.get("architectures") or [None])[0]
    for family, known in registry.FAMILIES.items():
        for part, upstream_class in known.components.items():
            if upstream_class == name:
                return family, {part: _component(layout.path, upstream_class)}, {}, {}
        for part, original in known.originals.items():
            if name and name == original.release:
                return family, {part: _original(family, part, open_folder(layout.path))}, {}, {}
    raise ConversionError(
        f"{layout.path / 'config.json'}: {name!r} is not supported; supported: {sorted(registry.COMPONENTS)}"
    )


def _release(original: Original, reader: Reader) -> dict[str, Any]:
    """What config.json beside the weights adds to their shapes, as keywords of `original.config`."""
    place = reader.files[0].parent / "config.json"
    if original.release is None or not place.is_file():
        return {}
    found = read_json(place)
    return {"release": found} if found.get("_class_name") == original.release else {}


def _original(family: str, name: str, reader: Reader) -> Part:
    original = registry.FAMILIES[family].originals[name]
    try:
        if original.implied is not None:
            shapes = reader.keys()
            extra = original.implied(original.config(shapes), shapes)
            tensors = {k: Tensor(v.shape, v.dtype, reader.name, lambda v=v: v) for k, v in extra.items()}
            reader = Reader(reader.name, {**reader.tensors, **tensors}, reader.files)
        cfg = original.config(reader.keys(), **_release(original, reader))
    except (ValueError, TypeError) as e:  # TypeError: a tensor with another number of axes than is read off it
        raise ConversionError(f"{reader.name}: {name}: {e}") from None
    return Part(cfg, original.rules(cfg), reader, from_shapes=True)


def _from_readers(readers: Sequence[Reader], path: Path):
    found: dict[str, Part] = {}
    family = _family(readers)
    for reader in readers:
        for name, (signature, part) in recognise(
            reader, registry.signatures(family), registry.IGNORED_PREFIXES
        ).items():
            family = signature.family
            folders = registry.FAMILIES[family].folders
            name = folders.get(reader.files[0].parent.name, name) if name == "transformer" else name
            if name in found:
                raise ConversionError(f"{reader.name}: a second {name}; {found[name].reader.name} has one")
            found[name] = _original(family, name, part)
    assert family is not None  # recognise raises where nothing is found
    return family, found


def _family(readers: Sequence[Reader]) -> str | None:
    """The family of the transformer, which decides whose the encoders beside it are; None where there is none."""
    known = [s for s in registry.signatures() if s.component == "transformer"]
    return next((s.family for s in known for reader in readers if fits(s, reader)), None)


def _open_file(layout: Layout, elsewhere: set[str]):
    family, found = _from_readers([open_weights(layout.path)], layout.path)
    tokens = _beside(layout.path.parent, family, found)
    return family, found, tokens, {}


def _beside(folder: Path, family: str, found: dict[str, Part]) -> dict[str, Tokenizer]:
    """Fill in what lies beside a single file: text_encoders/clip_l.safetensors and its kin, tokenizer folders."""
    known = registry.FAMILIES[family]
    for name, files in known.beside.items():
        for file in (folder / sub / f for f in files for sub in ("text_encoders", ".")):
            if name not in found and "transformer" in found and file.is_file():
                log.info("%s is taken from %s", name, file)
                found[name] = _original(family, name, open_weights(file))
    places = {n: (n, *known.tokenizers_beside.get(n, ())) for n in known.tokenizers}
    there = {n: next((folder / p for p in ps if (folder / p).is_dir()), None) for n, ps in places.items()}
    return {n: tokenizers.load(place) for n, place in there.items() if place}


def _open_original(layout: Layout, elsewhere: set[str]):
    folders = sorted({f.parent for f in layout.files if not OTHERS & set(f.relative_to(layout.path).parts)})
    family, found = _from_readers([r for folder in folders for r in open_sets(folder)], layout.path)
    return family, found, _beside(layout.path, family, found), {}


def _replacement(family: str, name: str, place: Path) -> Part:
    layout = detect(place.expanduser())
    if layout.kind == "component":
        return _component(layout.path, registry.FAMILIES[family].components[name])
    if layout.kind == "file":
        reader = open_weights(layout.path)
        split = recognise(reader, registry.signatures(family), registry.IGNORED_PREFIXES)
        known = registry.FAMILIES[family].originals
        like = [n for n in split if n == name or (n in known and known[n] is known.get(name))]
        if not like:
            raise ConversionError(f"{place}: holds {sorted(split)}, not {name}")
        return _original(family, name, split[like[0]][1])
    raise ConversionError(f"{place}: {name} must be a weight file or a folder with config.json")


_OPENERS: dict[str, Callable[[Layout, set[str]], tuple[str, dict[str, Part], dict[str, Tokenizer], dict[str, Any]]]] = {
    "pipeline": _open_pipeline, "component": _open_component, "file": _open_file, "original": _open_original,
}  # fmt: skip
