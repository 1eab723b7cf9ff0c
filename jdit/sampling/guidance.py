"""Guidance as wrappers of the model function: (x, t, *row) -> prediction. Scales are dynamic values."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jdit.sampling.scan import Model

Scale = float | Float[Array, ""]


def _combine(uncond: Float[Array, "*S"], cond: Float[Array, "*S"], scale: Scale) -> Float[Array, "*S"]:
    wide = jnp.promote_types(cond.dtype, jnp.float32)
    uncond, cond = uncond.astype(wide), cond.astype(wide)
    return uncond + jnp.asarray(scale, wide) * (cond - uncond)


def _double(model: Model, x: Float[Array, "B *S"], t, row) -> tuple[Array, Array]:
    uncond, cond = jnp.split(model(jnp.concatenate([x, x]), t, *row), 2)
    return uncond, cond


def classifier_free(model: Model, scale: Scale) -> Model:
    """Classifier-free guidance in one call (arXiv 2207.12598): uncond + scale (cond - uncond).

    Args:
        model: takes a batch of 2B, the B negative (unconditional) ones first, as its conditions are to be laid out.
        scale: 1 is the conditional prediction alone.

    Returns:
        A model of batch B.
    """
    return lambda x, t, *row: _combine(*_double(model, x, t, row), scale)


def two_passes(negative: Model, positive: Model, scale: Scale) -> Model:
    """Classifier-free guidance in two calls of batch B: half the activation memory, or unequal prompt lengths."""
    return lambda x, t, *row: _combine(negative(x, t, *row), positive(x, t, *row), scale)


def skip_layer(
    model: Model, skipping: Model, scale: Scale, layer_scale: Scale, active: Callable[[Any], Bool[Array, ""]]
) -> Model:
    """Classifier-free guidance plus skip-layer guidance (Stable Diffusion 3.5):
    uncond + scale (cond - uncond) + layer_scale (cond - skipped), the last term on active steps alone.

    Args:
        model: as for `classifier_free`, batch 2B.
        skipping: the positive prediction with layers left out, batch B. It does not run on other steps.
        active: picks the step's flag out of the row of per_step; see `active_steps`.
    """

    def guided(x, t, row):
        uncond, cond = _double(model, x, t, (row,))
        out = _combine(uncond, cond, scale)

        def push(out):
            skipped = skipping(x, t, row).astype(out.dtype)
            return out + jnp.asarray(layer_scale, out.dtype) * (cond.astype(out.dtype) - skipped)

        return lax.cond(active(row), push, lambda out: out, out)

    return guided


def active_steps(steps: int, start: float, stop: float) -> Bool[np.ndarray, "S"]:
    """Flags of the steps i with steps start < i < steps stop, both strict as in the reference."""
    i = np.arange(steps)
    return (i > steps * start) & (i < steps * stop)
