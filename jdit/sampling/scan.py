"""The loop: one linear step, one lax.scan, for every solver that is a table."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jdit.sampling import table as tables
from jdit.sampling.table import Table, Threshold


class Stateful(NamedTuple):
    """A model that remembers something from step to step (momentum, a cache): the loop carries it."""

    init: Callable[[Array], Any]  # x -> what is carried into the first step, a pytree of arrays
    call: Callable[..., tuple[Any, Any]]  # (carry, x, t, *row) -> (raw prediction, carry)


Model = Callable[..., Array]  # (x, t) or (x, t, row of per_step) -> raw prediction, of x's shape
OnStep = Callable[..., Any]  # (index of the finished step from 0, number of steps), and x0 where a preview is asked for


class State(NamedTuple):
    """What a solver carries, in float32 (float64 for a float64 sample)."""

    x: Float[Array, "*S"]
    x_last: Float[Array, "*S"] | None  # the corrected sample of the previous step; None where there is no corrector
    history: tuple[Float[Array, "*S"], ...]  # past predictions, newest first
    predictor: "State | None" = None  # of the table's predictor
    carry: Any = None  # what a Stateful model carries; None until it has begun, and for other models


class Progress(NamedTuple):
    """One finished step of `iterate`."""

    index: int  # from 0
    steps: int
    x: Float[Array, "*S"]
    x0: Float[Array, "*S"]  # the clean sample as predicted in this step


def init(x: Float[Array, "*S"], table: Table) -> State:
    """The state before the first step of a table."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    zeros = jnp.zeros_like(x)
    predictor = None if table.predictor is None else init(x, table.predictor)
    return State(x, None if table.corrector is None else zeros, (zeros,) * table.history, predictor)


def _cast(table: Table, dtype) -> Table:
    kinds = {"index": jnp.int32, "timestep": jnp.float32}
    return jax.tree.map_with_path(lambda path, a: jnp.asarray(a, kinds.get(path[-1].name, dtype)), table)


def _mix(weights: Array, arrays: tuple[Array, ...]) -> Array:
    # not a dot product: that would be taken in TF32 or bfloat16 on accelerators
    return sum((weights[j] * a for j, a in enumerate(arrays[1:], 1)), weights[0] * arrays[0])


def _threshold(x0: Float[Array, "B *S"], by: Threshold) -> Float[Array, "B *S"]:
    magnitudes = jnp.abs(x0).reshape(len(x0), -1)
    # the ceiling comes last: below 1 it wins over the floor, as torch's clamp has it
    cut = jnp.minimum(jnp.maximum(jnp.quantile(magnitudes, by.ratio, axis=1), 1), by.most)
    cut = cut.reshape(-1, *(1,) * (x0.ndim - 1))
    return jnp.clip(x0, -cut, cut) / cut


def denoised(state: State, row: Table, out: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The clean sample that a network output at state.x stands for."""
    row = _cast(row, state.x.dtype)
    x0 = row.x0_x * state.x + row.x0_out * out.astype(state.x.dtype)
    return x0 if row.threshold is None else _threshold(x0, row.threshold)


def step(state: State, row: Table, out: Float[Array, "*S"], noise: Float[Array, "*S"] | None = None) -> State:
    """One step of any solver.

    Args:
        row: the step's weights (`row(table, i)`).
        out: the network's raw prediction at (state.x, row.timestep).
        noise: standard normal, for stochastic solvers; None adds none.
    """
    dtype = state.x.dtype
    row, x, out = _cast(row, dtype), state.x, out.astype(dtype)
    m = row.m_x * x + row.m_out * (out if row.threshold is None else denoised(state, row, out))
    if (c := row.corrector) is not None:
        x = c.x * x + c.last * state.x_last + c.new * m + _mix(c.m, state.history)
    past, inner = (m, *state.history), state.predictor
    if row.predictor is not None and inner is not None:
        inner = step(inner._replace(x=x), row.predictor, out, noise)
        following = inner.x
    else:
        following = row.pred_x * x + _mix(row.pred_m, past[: row.pred_m.shape[-1]])
    if row.noise is not None and noise is not None:
        following = following + row.noise * noise.astype(dtype)
    return State(following, None if row.corrector is None else x, past[: len(state.history)], inner, state.carry)


def draw(key: Array, index, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Noise of one step. `key` is one key for the whole of x, or one for each element along its first axis, so that a
    sample's noise does not depend on its neighbours."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)
    if key.shape != x.shape[:1]:
        raise ValueError(f"key has shape {key.shape}; it may be one key or one for each of the {x.shape[0]} samples")
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), x.shape[1:], x.dtype))(key)


def begin(model: Any, x: Float[Array, "*S"]) -> Any:
    """What a model carries into its first step; None if it is not Stateful."""
    return model.init(x) if isinstance(model, Stateful) else None


def call(model: Any, carry: Any, *args) -> tuple[Any, Any]:
    """(output, carry) of any model, Stateful or a plain function."""
    return model.call(carry, *args) if isinstance(model, Stateful) else (model(*args), carry)


def _begun(model: Model | Stateful, state: State) -> State:
    return state if state.carry is not None else state._replace(carry=begin(model, state.x))


def _output(model: Model | Stateful, state: State, row: Table, extra) -> tuple[Array, State]:
    out, carry = call(model, state.carry, state.x, row.timestep, *(() if extra is None else (extra,)))
    return out, state._replace(carry=carry)


def _noise(key: Array | None, state: State, row: Table) -> Array | None:
    return draw(key, row.index, state.x) if key is not None and row.stochastic else None


def run(
    model: Model | Stateful,
    state: State,
    table: Table,
    *,
    key: Array | None = None,
    on_step: OnStep | None = None,
    preview: bool = False,
    per_step: Any = None,
    total: int | None = None,
) -> State:
    """Run the rows of a table from a state: `solve` without its beginning and its end.

    With it a table is run in parts, by one network after another (`split`). `total` is the number of steps that
    on_step is told, those of this table by default. What a Stateful model carries goes on in the next part, if its
    model is Stateful too.
    """
    total, state = table.steps if total is None else total, _begun(model, state)

    body = _kept_body(model, on_step, preview, total)
    return lax.scan(body, (state, key), (_cast(table, state.x.dtype), per_step))[0][0]


_bodies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _kept_body(model: Model | Stateful, *settings) -> Callable:
    """The same body for the same model, so that `solve` outside of a jit is traced once too (lax.scan remembers the
    functions that it has seen). It must not keep the model, which may hold weights, alive."""
    try:
        kept, of = _bodies.setdefault(model, {}), weakref.ref(model)
    except TypeError:  # a Stateful, or another callable that takes no weak reference
        return _body(lambda: model, *settings)
    if settings not in kept:
        kept[settings] = _body(of, *settings)
    return kept[settings]


def _body(model: Callable[[], Any], on_step: OnStep | None, preview: bool, total: int) -> Callable:
    def body(carry: tuple[State, Array | None], xs) -> tuple[tuple[State, Array | None], None]:
        (state, key), (row, extra) = carry, xs
        out, before = _output(model(), state, row, extra)
        state = step(before, row, out, _noise(key, before, row))
        if on_step is not None and preview:
            show = lambda i, x0, call=on_step: call(int(i), total, np.asarray(x0))
            jax.debug.callback(show, row.index, denoised(before, row, out))
        elif on_step is not None:
            # the pixel ties the call to the end of the step; without it XLA may call before the network has run
            pixel = state.x[(0,) * state.x.ndim]
            jax.debug.callback(lambda i, _, call=on_step: call(int(i), total), row.index, pixel)
        return (state, key), None

    return body


def solve(
    model: Model | Stateful,
    x: Float[Array, "*S"],
    table: Table,
    *,
    key: Array | None = None,
    on_step: OnStep | None = None,
    preview: bool = False,
    per_step: Any = None,
) -> Float[Array, "*S"]:
    """Sample: one `lax.scan` over the rows of a table.

    Args:
        model: (x, t) -> raw prediction of x's shape at timestep t, a float32 scalar; x is float32 (float64 if the
            sample is). With `per_step` its row of this step is a third argument. Or a Stateful.
        x: the initial noise, or a noised sample (`add_noise`), of any shape.
        table: from `from_config`; may be an argument of the surrounding jit, so that other sigmas do not recompile.
        key: for stochastic solvers, one key or one for each sample; None adds no noise.
        on_step: called on the host after every step with (index from 0, number of steps); nothing is compiled for
            None. Calls are asynchronous: `jax.effects_barrier()` waits for them. What it raises stops the run at that
            step, as an error of the device's; to stop and keep the sample, leave a loop over `iterate`.
        preview: on_step is also given the step's predicted clean sample, a NumPy array.
        per_step: pytree with leading axis S (modulation tables, flags), one row a step.

    Returns:
        The last x, in the dtype of `x`.

    Raises:
        ValueError: per_step or key of a wrong length.
    """
    _check_rows(table, per_step)
    state = run(model, init(x, table), table, key=key, on_step=on_step, preview=preview, per_step=per_step)
    return state.x.astype(x.dtype)


_host_step = jax.jit(lambda state, row, out, noise: (step(state, row, out, noise), denoised(state, row, out)))


def iterate(
    model: Model | Stateful, x: Float[Array, "*S"], table: Table, *, key: Array | None = None, per_step: Any = None
) -> Iterator[Progress]:
    """The same run as a loop on the host: yields after every step, with a preview; to stop, stop iterating.

    `model` (the `call` of a Stateful) should be compiled by its owner; only the solver's step is compiled here.
    """
    _check_rows(table, per_step)
    state, dtype = _begun(model, init(x, table)), x.dtype
    cast = _cast(table, state.x.dtype)
    for i in range(table.steps):
        weights = tables.row(cast, i)
        extra = None if per_step is None else jax.tree.map(lambda a, i=i: a[i], per_step)
        out, state = _output(model, state, weights, extra)
        state, x0 = _host_step(state, weights, out, _noise(key, state, weights))
        yield Progress(i, table.steps, state.x.astype(dtype), x0.astype(dtype))


def _check_rows(table: Table, per_step) -> None:
    wrong = {jnp.shape(a)[:1] for a in jax.tree.leaves(per_step)} - {(table.steps,)}
    if wrong:
        raise ValueError(f"per_step has leading axes {sorted(wrong)}; the table has {table.steps} steps")


def add_noise(x0: Float[Array, "*S"], noise: Float[Array, "*S"], table: Table) -> Float[Array, "*S"]:
    """A clean sample brought to the noise level of a table's first step: where image-to-image starts."""
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    alpha, sigma = jnp.asarray(table.alpha[0], dtype), jnp.asarray(table.sigma[0], dtype)
    return (alpha * x0 + sigma * noise).astype(x0.dtype)
