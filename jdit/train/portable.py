"""A small copy of a checkpoint, to go on with on another machine: six bytes a parameter instead of sixteen.

Weights are bfloat16, which moves them less than a step does; the average is kept as its distance from them and Adam's
second moment likewise; the first moment starts at zero and is itself again after ten steps. A run that goes on from
this copy is therefore not bit for bit the one that was never stopped, as it is from a checkpoint.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.flax import load_file, save

from jdit.atomic import write_file

FILE = "state.safetensors"
PARAMS, EMA = re.compile(r"\d+_params_(.*)"), re.compile(r"\d+_ema_(.*)")
FIRST_MOMENT = re.compile(r"\d+_opt_\d+_mu_")
Flat = dict[str, Array]
"""A state's leaves by name, as `jdit.train.loop` numbers and names them."""


def _weights(state: Flat) -> dict[str, str]:
    """Name of each average -> that of its weights."""
    bare = {m[1]: k for k in state if (m := PARAMS.match(k))}
    return {k: bare[m[1]] for k in state if (m := EMA.match(k))}


def write(folder: Path, state: Flat) -> Path:
    """Write the copy, in the place of an older one."""
    small = lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim else a
    weights = _weights(state)
    out = {}
    for name, leaf in state.items():
        if FIRST_MOMENT.match(name):
            continue
        if name in weights:
            leaf = leaf - small(state[weights[name]]).astype(leaf.dtype)
        out[name] = small(leaf)
    write_file(folder / FILE, save(out))
    return folder / FILE


def read(folder: Path, like: Flat) -> Flat:
    """The state of the copy, placed as `like` is.

    Raises:
        ValueError: it is broken, or of another model or optimiser.
    """
    path, weights = folder / FILE, _weights(like)
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: {e}") from None
    wanted = {k: a for k, a in like.items() if not FIRST_MOMENT.match(k)}
    wrong = sorted({k for k in found.keys() | wanted.keys()
                    if k not in found or k not in wanted or found[k].shape != wanted[k].shape})  # fmt: skip
    if wrong:
        names = ", ".join(wrong[:5])
        raise ValueError(f"{path} does not fit this config, it is of another model or optimiser: {names}")
    out = {}
    for name, leaf in like.items():
        value = jnp.zeros_like(leaf) if FIRST_MOMENT.match(name) else found[name].astype(leaf.dtype)
        if name in weights:
            value = value + found[weights[name]].astype(leaf.dtype)
        out[name] = jax.device_put(value, leaf.sharding)
    return out
