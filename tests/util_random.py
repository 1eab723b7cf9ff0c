"""Modules whose every leaf is random, norms and biases too; what they are given, and how results are compared."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdit import sharding


def values(make: Callable[[], nnx.Module]) -> dict[sharding.Path, jax.Array]:
    """A value for each leaf; matrices are scaled so that states keep their size."""
    rng, out = np.random.default_rng(0), {}
    for path, leaf in sharding.abstract(make)[1].items():
        gain = 0.3 if path[-1] in ("scale", "bias") else np.prod(leaf.shape[:-1]) ** -0.5
        out[path] = jnp.asarray((path[-1] == "scale") + gain * rng.normal(size=leaf.shape), leaf.dtype)
    return out


def randomised(make: Callable[[], nnx.Module]):
    return sharding.assemble(make, values(make))


def noise(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def error(got, want) -> float:
    """||got - want|| / ||want||."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
