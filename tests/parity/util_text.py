"""Helpers of the text encoders' parity tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import table
from convert.table import Rule
from jdit import sharding


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """Every parameter random, norm weights and biases too; matrices are scaled so that states keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + scale * noise if p.ndim == 1 else noise * 1.5 / p.shape[-1] ** 0.5
    return model.eval()


def load(source: Path | dict[str, np.ndarray], make: Callable, rules: Sequence[Rule], dtype=None) -> nnx.Module:
    """A module through the real rules, from a folder of save_pretrained or from tensors."""
    tensors = load_file(source / "model.safetensors") if isinstance(source, Path) else source
    _, abstract = sharding.abstract(make)
    targets = {sharding.dotted(path): leaf for path, leaf in abstract.items()}
    fills = table.plan({k: v.shape for k, v in tensors.items()}, rules, targets)
    leaves = {tuple(f.path.split(".")): jnp.asarray(table.fill(f, tensors.__getitem__, dtype)) for f in fills}
    return sharding.assemble(make, leaves)


def write_back(module: nnx.Module, rules: Sequence[Rule], file: Path) -> dict[str, np.ndarray]:
    leaves = {sharding.dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    out = {key: np.ascontiguousarray(op.inverse(leaves[p][i])) for key, p, i, op in table.back(rules, leaves)}
    save_file(out, file, metadata={"format": "pt"})
    return out


def names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "np") as f:
        return list(f.keys())


def error(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||."""
    a = np.asarray(jnp.asarray(ours, jnp.float32))
    b = theirs.detach().float().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs, np.float32)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@jax.jit
def run(module, *args):
    return module(*args)
