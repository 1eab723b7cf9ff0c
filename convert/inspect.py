"""What a checkpoint is, and what is wrong with it, from headers alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import registry, stream
from convert.convert import described, place, targets
from convert.layout import detect
from convert.source import open_source
from jdit import checkpoint, sharding, zoo


def inspect(src: str | Path, *, parts: Mapping[str, str | Path] | None = None) -> dict[str, Any]:
    """Family, variant, components with parameter counts, sizes and dtypes, scheduler, and every problem; of the name of
    a variant, what is known of it without weights.

    Raises:
        ConversionError, CheckpointError: where it cannot even be told what it is.
    """
    if str(src) in zoo.VARIANTS and not Path(src).exists():
        return _variant(str(src))
    path = place(src)
    layout = detect(path).kind
    out: dict[str, Any] = {"source": str(src), "layout": layout, "components": {}, "problems": []}
    if layout == "jdit":
        meta, configs = described(path)
        out |= {k: meta.get(k) for k in ("family", "variant", "scheduler", "plan")}
        out["tokenizers"] = meta.get("tokenizers", [])
        for name, cfg in configs.items():
            try:
                arrays = checkpoint.stored(path, name)
            except ValueError as e:
                out["problems"].append(str(e))
                continue
            out["problems"] += checkpoint.misfits(path, name, arrays, targets(cfg))
            out["components"][name] = _summary(cfg, [(a.shape, np.dtype(a.dtype)) for a in arrays.values()])
        return out
    source = open_source(path, parts=parts, plan=zoo.BUNDLED.get(str(src)))
    out |= {"family": source.family, "variant": str(src) if str(src) in zoo.BUNDLED else source.variant}
    out |= {"scheduler": source.scheduler, "tokenizers": sorted(source.tokenizers)}
    for name, part in source.parts.items():
        out["components"][name] = _summary(part.cfg, [(t.shape, t.dtype) for t in part.reader.tensors.values()])
        out["problems"] += stream.problems(part.reader, part.rules, targets(part.cfg))
    out["problems"] += source.misfits()
    source.close()
    return out


def _variant(name: str) -> dict[str, Any]:
    """What the zoo knows of a variant, in bfloat16."""
    known = zoo.VARIANTS[name]
    placed = lambda cfg: registry.placed(cfg, "bfloat16", sharding.Rules())
    tensors = lambda cfg: [(leaf.shape, np.dtype(leaf.dtype)) for leaf in targets(placed(cfg)).values()]
    return {
        "source": name, "layout": f"no weights, they are at {known.source}", "family": known.family, "variant": name,
        "components": {n: _summary(cfg, tensors(cfg)) for n, cfg in known.components.items()}, "problems": [],
        "scheduler": known.scheduler, "tokenizers": [],
    }  # fmt: skip


def _summary(cfg: Any, tensors: list[tuple[tuple[int, ...], np.dtype]]) -> dict[str, Any]:
    component = registry.of_config(cfg)
    return {
        "kind": component.module.__name__,
        "parameters": sharding.count(component.make(cfg)),
        "bytes": sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors),
        "dtypes": sorted({str(dtype) for _, dtype in tensors}),
    }
