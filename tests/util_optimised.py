"""Programs as users have them, where those of conftest.py are too coarse: they take a sum one number at a time."""

import os
from collections.abc import Callable

import jax

FUSIONS = "xla_cpu_use_fusion_emitters"
OPTIONS = {"xla_backend_optimization_level": 3} | ({FUSIONS: True} if FUSIONS in os.environ["XLA_FLAGS"] else {})


def optimised(fn: Callable) -> Callable:
    """`fn` under jax.jit, optimised: for comparisons within 1e-6."""
    return jax.jit(fn, compiler_options=OPTIONS)
