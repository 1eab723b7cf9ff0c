"""Guidance as wrappers of the model function: (x, t, *row) -> prediction.

Two questions, answered apart. How the two predictions are had is a pair: `one_batch` or `separate`. How one prediction
is made of them is a chain of terms, each (value, cond, x, t, *row) -> value; the first is given uncond as its value:

    guided(one_batch(model), linear(7.0), rescaled(0.7))                            arXiv 2305.08891
    guided(separate(negative, positive), linear(4.0), keep_norm(patch=2))           Qwen-Image
    zero_init(guided(one_batch(model), zero_star(), linear(5.0)), active)           CFG-Zero*
    guided(pair, projected(7.5, eta=0.0, threshold=15.0, momentum=-0.5))            adaptive projected guidance
    guided(separate(negative, positive), linear(3.0), active=flag)                  in an interval of steps only
    two_passes(embedded(negative, 6.0), embedded(positive, 6.0), 3.0)               true guidance of a distilled model

Terms work in float32 whatever the model gives, and never mix samples. Every strength is a dynamic value: a number, one
for each sample (B,), or a function of the row of per_step (`linear(lambda row: row["scale"])`). What depends on the
step alone is a column of per_step, made before the loop: `active_steps`, `step_range`, `within`, `dynamic_scale`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jdit.sampling.combine import Strength, linear, strength
from jdit.sampling.scan import Model, Stateful, begin, call
from jdit.sharding import whole_rows

Pair = Callable[..., tuple[Array, Array]] | Stateful  # (on, x, t, *row) -> (uncond, cond); on: a flag or None
Flag = Callable[..., Any]  # picks the step's flag out of the row of per_step


def _wide(a: Array) -> Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _tied(function: Callable[..., Any], *parts: Any, view: Callable[[Array], Array] = lambda x: x) -> Any:
    """(carries, *args) -> (out, carries) as a Stateful, or as a plain function where no part carries anything."""
    if any(isinstance(part, Stateful) for part in parts):
        return Stateful(lambda x: tuple(begin(part, view(x)) for part in parts), function)
    return lambda *args: function((None,) * len(parts), *args)[0]


# The two predictions


def one_batch(model: Model | Stateful, positive: Model | None = None) -> Pair:
    """Both predictions in one call.

    Args:
        model: takes a batch of 2B, the B negative (unconditional) ones first, as its conditions are to be laid out.
        positive: the conditional prediction alone, batch B, run on steps without guidance; without it all 2B run.

    Raises:
        ValueError: positive beside a Stateful model, whose carry is of batch 2B.
    """
    if positive is not None and isinstance(model, Stateful):
        raise ValueError("one_batch takes no positive beside a Stateful model: what it carries is of batch 2B")

    def pair(carries, on, x, t, *row):
        def both():
            out, carry = call(model, carries[0], whole_rows(jnp.concatenate([x, x])), t, *row)
            # on a mesh each device has both and goes on alone: the partitioner would let one of them have the latents,
            # and send it the other's prediction and all devices the result
            uncond, cond = jnp.split(whole_rows(_wide(out)), 2)
            return (uncond, cond), (carry,)

        if on is None or (alone := positive) is None:
            return both()
        return lax.cond(on, both, lambda: ((_wide(alone(x, t, *row)),) * 2, carries))

    return _tied(pair, model, view=lambda x: jnp.concatenate([x, x]))


def separate(negative: Model | Stateful, positive: Model | Stateful) -> Pair:
    """Two calls of batch B: half the activation memory, or unequal prompt lengths. On steps without guidance the
    negative one is not made."""

    def pair(carries, on, x, t, *row):
        cond, after = call(positive, carries[1], x, t, *row)
        cond = _wide(cond)

        def run():
            uncond, carry = call(negative, carries[0], x, t, *row)
            return _wide(uncond), carry

        uncond, before = run() if on is None else lax.cond(on, run, lambda: (cond, carries[0]))
        return (uncond, cond), (before, after)

    return _tied(pair, negative, positive)


# One prediction of them


def guided(pair: Pair, *terms: Any, active: Flag | None = None) -> Any:
    """A guided model.

    Args:
        pair: `one_batch` or `separate`.
        terms: applied in turn (jdit.sampling.combine): the first begins with uncond, each goes on from the one before.
        active: the flag of the steps with guidance (limited interval, arXiv 2404.07724); on the others the prediction
            is the conditional one, and no term runs.

    Returns:
        A model of batch B; a Stateful if the pair or a term is.

    Raises:
        ValueError: no terms.
    """
    if not terms:
        raise ValueError("guided needs at least one term, as linear(scale)")

    def model(carries, x, t, *row):
        on = None if active is None else active(*row)
        (uncond, cond), first = call(pair, carries[0], on, x, t, *row)

        def chain():
            value, after = uncond, []
            for term, carry in zip(terms, carries[1:], strict=True):
                value, carry = call(term, carry, value, cond, x, t, *row)
                after.append(carry)
            return value, tuple(after)

        value, rest = chain() if on is None else lax.cond(on, chain, lambda: (cond, tuple(carries[1:])))
        return value, (first, *rest)

    return _tied(model, pair, *terms)


def classifier_free(model: Model, scale: Strength) -> Model:
    """Classifier-free guidance in one call (arXiv 2207.12598): uncond + scale (cond - uncond).

    Args:
        model: takes a batch of 2B, the B negative (unconditional) ones first, as its conditions are to be laid out.
        scale: 1 is the conditional prediction alone.

    Returns:
        A model of batch B.
    """
    return guided(one_batch(model), linear(scale))


def two_passes(negative: Model, positive: Model, scale: Strength) -> Model:
    """Classifier-free guidance in two calls of batch B: half the activation memory, or unequal prompt lengths."""
    return guided(separate(negative, positive), linear(scale))


def away_from(weaker: Model | Stateful, scale: Strength, active: Flag | None = None) -> Any:
    """The term value + scale (cond - weaker(x, t, *row)): skip-layer guidance, or any other weakened network.

    Args:
        weaker: of batch B. It does not run on steps that are not active.
        active: picks the step's flag out of the row of per_step; None is every step.
    """

    def term(carries, value, cond, x, t, *row):
        def push():
            weak, carry = call(weaker, carries[0], x, t, *row)
            return value + strength(scale, value, row) * (cond - weak.astype(value.dtype)), (carry,)

        return push() if active is None else lax.cond(active(*row), push, lambda: (value, carries))

    return _tied(term, weaker)


def skip_layer(model: Model, skipping: Model, scale: Strength, layer_scale: Strength, active: Flag) -> Model:
    """Classifier-free guidance plus skip-layer guidance (Stable Diffusion 3.5):
    uncond + scale (cond - uncond) + layer_scale (cond - skipped), the last term on active steps alone.

    Args:
        model: as for `classifier_free`, batch 2B.
        skipping: the positive prediction with layers left out, batch B. It does not run on other steps.
        active: picks the step's flag out of the row of per_step; see `active_steps`.
    """
    return guided(one_batch(model), linear(scale), away_from(skipping, layer_scale, active))


# Wrappers of any model, guided or not


def zero_init(model: Model | Stateful, active: Flag) -> Any:
    """Zero in place of the prediction on active steps, on which the model does not run: CFG-Zero* (arXiv 2503.18886,
    section 4.2) leaves the first 4% of the steps out, diffusers' guider the first one (flags `table.index < 1`)."""

    def wrapped(carries, x, t, *row):
        dtype = jnp.promote_types(x.dtype, jnp.float32)

        def run():
            out, carry = call(model, carries[0], x, t, *row)
            return out.astype(dtype), (carry,)

        return lax.cond(active(*row), lambda: (jnp.zeros_like(x, dtype), carries), run)

    return _tied(wrapped, model)


def keep_known(model: Model | Stateful, clean: Array, mask: Array, weights: Callable[..., tuple[Any, Any]]) -> Any:
    """Inpainting: where `mask` is 0, the prediction that stands for the sample `clean`, which is known there.

    A sample that begins as `add_noise` of the known one then stays on the way to it, so that after every step it is
    the known sample at that step's noise level, as when it is laid over the result (pipeline_qwenimage_inpaint.py).

    Args:
        clean, mask: of the sample's shape, or such that they broadcast to it; 1 is to be generated.
        weights: (a, b) of x0 = a x + b prediction, out of the row: `table.x0_x` and `table.x0_out`.
    """

    def wrapped(carries, x, t, *row):
        out, carry = call(model, carries[0], x, t, *row)
        a, b = weights(*row)
        return jnp.where(mask > 0, _wide(out), (clean - a * x) / b), (carry,)

    return _tied(wrapped, model)


def embedded_scale(scale: Any, batch: int, dtype: Any = jnp.float32) -> Float[Array, "B"]:
    """What the guidance embedding of a distilled model is given, 1000 times the scale, in float32 but rounded as
    upstream does: the scale and the product to the compute dtype (transformer_flux.py, pipeline_hunyuan_video.py).

    Args:
        scale: a number, or one for each sample.
        dtype: the compute dtype of the network.
    """
    bits = jnp.finfo(dtype)
    rounded = lambda a: lax.reduce_precision(a, bits.nexp, bits.nmant)  # a cast there and back may be optimised away
    return rounded(1000 * rounded(jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (batch,))))


def embedded(model: Callable[..., Array], scale: Strength, dtype: Any = jnp.float32) -> Model:
    """Guidance that the network learned to take as an input (Flux, HunyuanVideo): model(x, t, *row, guidance=...) with
    `embedded_scale`, one for each sample of x. Classifier-free ("true") guidance goes around it, as round any model."""

    def wrapped(x, t, *row):
        value = scale(*row) if callable(scale) else scale
        return model(x, t, *row, guidance=embedded_scale(value, x.shape[0], dtype))

    return wrapped


# Columns of per_step


def active_steps(steps: int, start: float, stop: float) -> Bool[np.ndarray, "S"]:
    """Flags of the steps i with steps start < i < steps stop, both strict as in the reference."""
    i = np.arange(steps)
    return (i > steps * start) & (i < steps * stop)


def step_range(steps: int, start: float = 0.0, stop: float = 1.0) -> Bool[np.ndarray, "S"]:
    """Flags of the steps i with int(start steps) <= i < int(stop steps), as diffusers' guiders count."""
    i = np.arange(steps)
    return (i >= int(start * steps)) & (i < int(stop * steps))


def within(levels: Any, low: Any, high: Any) -> Any:
    """Flags of the steps with low < level <= high, on the host or traced (arXiv 2404.07724, section 3).

    Args:
        levels: (S,), as `table.sigma`, `table.timestep` or `table.index`. The paper's sigma is that of
            x0 + sigma noise: `table.sigma / table.alpha`.
    """
    return (levels > low) & (levels <= high)


def dynamic_scale(scale: Strength, timesteps: Any, steps: int) -> Any:
    """CogVideoX's dynamic guidance, a scale for each step: 1 + scale (1 - cos(pi ((steps - t) / steps)^5)) / 2.

    With timesteps far above `steps` the angle is millions of turns: it is taken on the host, in double precision and in
    the order of pipeline_cogvideox.py; from a float32 t in the loop it would be noise.

    Args:
        scale: a number or a traced scalar.
        timesteps: (S,) on the host, `table.timestep`.
        steps: upstream's num_inference_steps: with a strength (video to video) those that are left.
    """
    share = [(1 - math.cos(math.pi * ((steps - t) / steps) ** 5.0)) / 2 for t in np.asarray(timesteps).tolist()]
    return 1 + scale * np.asarray(share)
