"""A small model with what tables are about: a stacked leaf, a fused one, a transposed one, a scalar. And its files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convert import ops
from convert.table import ALL, Rule
from jdit.nn.layers import LayerNorm, fused_linear, linear, stack
from jdit.sharding import abstract

DEPTH, IN, D, F = 3, 6, 8, 16


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype):
        self.qkv = fused_linear(D, 3, D, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.up = linear(D, F, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(D, eps=1e-6, dtype=dtype)


class Toy(nnx.Module):
    def __init__(self, dtype=jnp.float32, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(IN, D, (2, 3), dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda r: Block(r, dtype), DEPTH, rngs)
        self.gain = nnx.Param(jnp.ones((), dtype))


def make(dtype=jnp.float32):
    return lambda: Toy(dtype, rngs=nnx.Rngs(0))


def targets(dtype=jnp.float32, mesh=None):
    return abstract(make(dtype), mesh)[1]


LAYERS = range(DEPTH)
RULES = [
    Rule("stem.weight", "stem.kernel", ops.conv),
    Rule("stem.bias", "stem.bias"),
    *(
        rule
        for n, name in enumerate(("q", "k", "v"))
        for rule in (
            Rule(f"layers.{{i}}.{name}.weight", "blocks.qkv.kernel", ops.linear, at=(ALL, n), layers=LAYERS),
            Rule(f"layers.{{i}}.{name}.bias", "blocks.qkv.bias", at=(n,), layers=LAYERS),
        )
    ),
    Rule("layers.{i}.up.weight", "blocks.up.kernel", ops.linear, layers=LAYERS),
    Rule("layers.{i}.up.bias", "blocks.up.bias", layers=LAYERS),
    Rule("layers.{i}.norm.weight", "blocks.norm.scale", layers=LAYERS),
    Rule("layers.{i}.norm.bias", "blocks.norm.bias", layers=LAYERS),
    Rule("gain", "gain"),
    Rule("position_ids", None),
]


def state(dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """The upstream state dict, every value random."""
    rng = np.random.default_rng(seed)
    shapes = {"stem.weight": (D, IN, 2, 3), "stem.bias": (D,), "gain": ()}
    for i in range(DEPTH):
        for name in "qkv":
            shapes |= {f"layers.{i}.{name}.weight": (D, D), f"layers.{i}.{name}.bias": (D,)}
        shapes |= {f"layers.{i}.up.weight": (F, D), f"layers.{i}.up.bias": (F,)}
        shapes |= {f"layers.{i}.norm.weight": (D,), f"layers.{i}.norm.bias": (D,)}
    return {k: np.asarray(rng.standard_normal(s)).astype(dtype) for k, s in shapes.items()}


def write(folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, {"format": "pt"})
    return folder / name


def expected(tensors: dict[str, np.ndarray]) -> dict[tuple, np.ndarray]:
    """The leaves, put together by hand."""
    per = lambda name, f=lambda w: w: np.stack([f(tensors[f"layers.{i}.{name}"]) for i in range(DEPTH)])
    stacked = lambda kind, f=lambda w: w: np.stack([per(f"{n}.{kind}", f) for n in "qkv"])
    return {
        ("stem", "kernel"): tensors["stem.weight"].transpose(2, 3, 1, 0),
        ("stem", "bias"): tensors["stem.bias"],
        ("blocks", "qkv", "kernel"): stacked("weight", np.transpose).transpose(1, 2, 0, 3),
        ("blocks", "qkv", "bias"): stacked("bias").transpose(1, 0, 2),
        ("blocks", "up", "kernel"): per("up.weight", np.transpose),
        ("blocks", "up", "bias"): per("up.bias"),
        ("blocks", "norm", "scale"): per("norm.weight"),
        ("blocks", "norm", "bias"): per("norm.bias"),
        ("gain",): tensors["gain"],
    }


def same(a: np.ndarray | jax.Array, b: np.ndarray | jax.Array) -> bool:
    """Equal dtype, shape and bits."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
