"""Modulation of all steps as a stage of its own, whose weights the sampling loop does without.

What depends on time alone is always made before the loop. A table that has a row for each prompt, too, is not where it
would be large, and larger than the weights that it is made from: the loop keeps them and makes it in the steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdit import sharding
from jdit.nn import parts
from jdit.pipeline.executor import Stage

LARGE = 1e9
"""Bytes up to which a table is no matter, whatever its weights."""


def stages(loop: Stage, make: Callable, reads: Sequence[str], *, static: Sequence[str] = (), name: str = "modulate",
           tabled: bool = True) -> list[Stage]:  # fmt: skip
    """The stage that makes a table, and the loop that reads it without the weights which it was made from.

    Args:
        loop: reads the table as the value `loop.frees` names; its component is `loop.weights`.
        make: (module, *reads) -> table.
        tabled: without a table the loop is left as it is, and reads None.
    """
    (component,), (table,) = loop.weights, loop.frees
    if not tabled:
        return [loop]
    first = Stage(name, make, (parts.name(component, parts.MODULATION),), tuple(reads), (table,), tuple(static))
    return [first, dataclasses.replace(loop, weights=(parts.name(component, parts.LOOP),))]


def at(table: Any, make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """(timestep, row of the table) -> a step's modulation: the row or, of no table (None), that of `make` with the one
    timestep (1,)."""
    if table is not None:
        return lambda t, row: row
    return lambda t, row: jax.tree.map(lambda a: a[0], make(jnp.asarray(t, jnp.float32)[None]))


def spec(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@functools.cache
def table_bytes(module: type[Any], cfg: Any, *inputs: Any, make: Callable | None = None) -> int:
    """Size of `make(module, *inputs)`, or of `module.modulation_table(*inputs)`; inputs are made of `spec`."""
    described = sharding.described(sharding.Make(module, cfg))
    return sharding.tree_bytes(jax.eval_shape(make or module.modulation_table, described, *inputs))


@functools.cache
def weight_bytes(module: type[Any], cfg: Any, part: str) -> int:
    """Size of a part of the module's weights."""
    return sharding.tree_bytes(parts.take(sharding.described(sharding.Make(module, cfg)), part))


def tabled(module: type[Any], cfg: Any, times: Any, *prompts: Any, make: Callable | None = None) -> bool:
    """Whether the table of these inputs is to be made: always of times alone; with prompts if it is small, or no larger
    than the weights it is made from."""
    most = max(LARGE, weight_bytes(module, cfg, parts.MODULATION))
    return not prompts or table_bytes(module, cfg, times, *prompts, make=make) <= most
