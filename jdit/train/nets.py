"""Networks as flat dicts of float32 master weights, computed with in another dtype; their folders on disk."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from convert.component import Component
from convert.convert import kept
from convert.readers import open_folder
from convert.registry import COMPONENTS
from convert.stream import load_leaves
from convert.write import write_back
from jdit.nn import attention
from jdit.sharding import abstract, assemble, described, dotted, leaves

Weights = dict[str, Array]
"""Dotted path -> array."""


def everywhere(tree: Any) -> Any:
    """A pytree of arrays on every device of the mesh that is set; on the default device if there is none."""
    mesh = jax.sharding.get_mesh()
    place = None if mesh.empty else NamedSharding(mesh, P())
    return jax.tree.map(lambda a: jnp.asarray(a) if place is None else jax.device_put(a, place), tree)


@contextlib.contextmanager
def preferring(backend: str) -> Iterator[None]:
    """Let attention try one backend first; "" leaves the order as it is.

    Raises:
        ValueError: an unknown backend.
    """
    before = dict(attention.BACKENDS)
    if backend and backend not in before:
        raise ValueError(f"run.attention = {backend!r}; there are {', '.join(before)}")
    first = {backend: before[backend]} if backend else {}
    attention.BACKENDS.clear()
    attention.BACKENDS.update(first | before)
    try:
        yield
    finally:
        attention.BACKENDS.clear()
        attention.BACKENDS.update(before)


class Net:
    """One network: its config, and the way between weights and module.

    Args:
        upstream_class: name in `convert.registry.COMPONENTS`. cfg: architecture. dtype: of computation.
    """

    def __init__(self, upstream_class: str, cfg: Any, dtype: str):
        self.component: Component = COMPONENTS[upstream_class]
        self.cfg = dataclasses.replace(cfg, dtype=dtype)
        self._make = self.component.make(self.cfg)
        self._master = dataclasses.replace(cfg, dtype="float32")
        state = nnx.state(described(self._make))
        flat = nnx.to_flat_state(state)
        self.paths = {dotted(p): p for p, _ in flat}
        self.dtypes = {dotted(p): var.get_value().dtype for p, var in flat}
        fixed = {dotted(p) for p, var in flat if var.get_metadata().get("fixed")}

        def tables():  # and nothing else, so that random weights are not even compiled
            module = self.component.make(self._master)()
            return {name: a for p, a in leaves(module).items() if (name := dotted(p)) in fixed}

        self.fixed = {k: np.asarray(a) for k, a in jax.jit(tables)().items()} if fixed else {}

    def init(self, seed: int) -> Weights:
        """Random float32 weights, tables left out. The hardware's generator: the usual one compiles four times as long,
        half a minute for an autoencoder."""

        def make(key):
            module = self.component.module(self._master, rngs=nnx.Rngs(key))
            return {dotted(p): a for p, a in leaves(module).items()}

        weights = jax.jit(make)(jax.random.key(seed, impl="rbg"))
        return {k: v for k, v in weights.items() if k not in self.fixed}

    def build(self, weights: Mapping[str, Array]) -> Any:
        """The module, its leaves cast to what they have where the network computes in its dtype."""
        full = {**weights, **{k: jnp.asarray(v) for k, v in self.fixed.items()}}
        cast = {self.paths[k]: v.astype(self.dtypes[k]) for k, v in full.items()}
        return assemble(self._make, cast)

    def read(self, folder: str | Path) -> Weights:
        """Weights of this architecture from a component folder in diffusers layout.

        Raises:
            ConversionError: they do not fit.
        """
        targets = abstract(self.component.make(self._master))[1]
        with open_folder(folder) as reader:
            found = load_leaves(reader, self.component.rules(self._master), targets, dtype="float32")
        return everywhere({dotted(p): np.asarray(a) for p, a in found.items() if dotted(p) not in self.fixed})

    def write(self, folder: str | Path, weights: Mapping[str, Array], dtype: str = "bfloat16") -> None:
        """A component folder in diffusers layout."""
        host: dict[str, Any] = {k: np.asarray(v) for k, v in {**weights, **self.fixed}.items()}
        stem = "model" if self.component.library == "transformers" else "diffusion_pytorch_model"
        cfg = self._master
        upstream, keep = self.component.upstream_config(cfg), kept(cfg)
        write_back(folder, host, self.component.rules(cfg), upstream, stem=stem, dtype=dtype, keep=keep)

    def describe(self, weights: Mapping[str, Array]) -> str:
        millions = sum(v.size for v in weights.values()) / 1e6
        return f"{self.component.upstream_class}: {millions:.3f} M parameters"


def open_net(folder: str | Path, upstream_class: str, dtype: str) -> tuple[Net, Weights]:
    """A network and its weights from a component folder.

    Raises:
        ValueError: no such folder, or a component of another kind.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no component in diffusers layout there (config.json is missing)")
    net = Net(upstream_class, COMPONENTS[upstream_class].config(json.loads(path.read_text())), dtype)
    return net, net.read(folder)
