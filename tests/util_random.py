"""Modules whose every leaf is random, norms and biases too."""

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
