"""The terms of guidance: how one prediction is made of two.

A term is (value, cond, x, t, *row) -> value; the first of a chain is given uncond as its value (`guidance.guided`).
All are float32 arrays (B, ..., C), and sums run over everything but the batch unless it says otherwise.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdit.sampling.scan import Stateful

Strength = float | Array | np.ndarray | Callable[..., Any]  # a number, one a sample (B,), or of the row of per_step
Term = Callable[..., Array]


def strength(value: Strength, like: Float[Array, "B *S"], row: tuple) -> Array:
    """A strength at this step, in the dtype of `like` and of a shape that broadcasts to it."""
    array = jnp.asarray(value(*row) if callable(value) else value, like.dtype)
    return array.reshape(array.shape + (1,) * (like.ndim - 1)) if array.ndim == 1 else array


def _sum(a: Float[Array, "B *S"], axes: tuple[int, ...] | None) -> Array:
    return jnp.sum(a, axis=tuple(range(1, a.ndim)) if axes is None else axes, keepdims=True)


def _norm(a: Float[Array, "B *S"], axes: tuple[int, ...] | None = None) -> Array:
    return jnp.sqrt(_sum(a * a, axes))


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 1 where b is 0: a network whose last layer starts at zero predicts exactly that."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 1)


def linear(scale: Strength) -> Term:
    """uncond + scale (cond - uncond): arXiv 2207.12598, with the scale of Imagen (arXiv 2205.11487, equation 2)."""
    return lambda value, cond, x, t, *row: value + strength(scale, cond, row) * (cond - value)


def zero_star(eps: float = 1e-8) -> Term:
    """uncond scaled to fit cond best, in front of `linear`: s uncond with s = <cond, uncond> / (||uncond||^2 + eps).

    CFG-Zero* (arXiv 2503.18886, section 4.1). Its zero steps are `guidance.zero_init`.
    """
    return lambda value, cond, x, t, *row: value * (_sum(cond * value, None) / (_sum(value * value, None) + eps))


def rescaled(phi: Strength) -> Term:
    """The value brought to the spread of cond, by a share of phi: value (phi std(cond) / std(value) + 1 - phi).

    arXiv 2305.08891, section 3.4 (diffusers' rescale_noise_cfg and guidance_rescale).
    """

    def term(value, cond, x, t, *row):
        axes = tuple(range(1, value.ndim))
        share = strength(phi, value, row)
        ratio = _ratio(jnp.std(cond, axes, keepdims=True), jnp.std(value, axes, keepdims=True))
        return value * (share * ratio + (1 - share))

    return term


def _tiles(shape: tuple[int, ...], patch: int | tuple[int, ...]) -> tuple[int, ...]:
    """(B, d1, ..., dk, C) with each di split into (di / pi, pi)."""
    sizes = ((1,) if patch == 1 else (patch, patch)) if isinstance(patch, int) else tuple(patch)
    room = shape[1:-1]
    if len(sizes) > max(len(room), 1) or any(p < 1 for p in sizes):
        raise ValueError(f"patch={patch} needs positive sizes, at most one for each axis between the ends of {shape}")
    sizes = (1,) * (len(room) - len(sizes)) + sizes[: len(room)]
    if any(d % p for d, p in zip(room, sizes, strict=True)):
        raise ValueError(f"patch={patch} does not divide the inner axes of {shape}")
    return (shape[0], *(n for d, p in zip(room, sizes, strict=True) for n in (d // p, p)), shape[-1])


def keep_norm(patch: int | tuple[int, ...] = 1) -> Term:
    """The value with the norm that cond has, token by token: value ||cond|| / ||value||.

    Qwen-Image's true guidance (pipeline_qwenimage.py), where a token is a patch of 2 x 2 latents with all its channels.

    Args:
        patch: sizes of a token along the last axes before the channels. 2 is (2, 2): rows and columns of (B, H, W, C)
            or (B, T, H, W, C); 1 is each position by itself, as in packed tokens (B, N, C).

    Raises:
        ValueError: (when it runs) a patch that does not divide the sample.
    """

    def term(value, cond, x, t, *row):
        shape = _tiles(value.shape, patch)
        inside = (*range(2, len(shape) - 1, 2), len(shape) - 1)
        tiles = value.reshape(shape)
        ratio = _ratio(_norm(cond.reshape(shape), inside), _norm(tiles, inside))
        return (tiles * ratio).reshape(value.shape)

    return term


def projected(
    scale: Strength,
    *,
    eta: Strength = 1.0,
    threshold: Strength = 0.0,
    momentum: Strength | None = None,
    axes: tuple[int, ...] | None = None,
    from_cond: bool = False,
    clean: Callable[..., tuple[Any, Any]] | None = None,
) -> Any:
    """Adaptive projected guidance (arXiv 2410.02416; diffusers' adaptive_projected_guidance.py):

        d = cond - uncond + momentum d'                     d' is the d of the step before, 0 at first
        d = d min(1, threshold / ||d||)                     if threshold > 0
        u = <d, cond> cond / ||cond||^2                     the part of d along cond
        uncond + scale (d - u + eta u)                      and cond at scale 1, where diffusers turns guidance off

    With eta 1 and nothing else it is `linear`. It is the first term of a chain.

    Args:
        eta: how much of the parallel part stays; the paper takes 0.
        threshold: the largest norm of d, 0 for any; diffusers takes 15 unless told otherwise.
        momentum: None carries nothing; a value, 0 too, makes the model Stateful. The paper takes negative ones.
        axes: those of the norm and of the projection; None is all but the batch.
        from_cond: begin at cond, not at uncond: cond + scale (d - u + eta u). The paper's w is scale + 1.
        clean: weights (a, b) of x0 = a x + b prediction, out of the row: the projection, the momentum and the threshold
            are those of x0 predictions, as in the paper. None projects what the network predicts, as diffusers does.
            The columns are `table.x0_x` and `table.x0_out`.
    """

    def term(last, value, cond, x, t, *row):
        a, b = (0, 1) if clean is None else (strength(w, cond, ()) for w in clean(*row))
        d, along = b * (cond - value), cond if clean is None else a * x.astype(cond.dtype) + b * cond
        if momentum is not None:
            d = last = (d + strength(momentum, cond, row) * last).astype(last.dtype)
        limit = strength(threshold, cond, row)
        d = d * jnp.where(limit > 0, _ratio(limit, jnp.maximum(_norm(d, axes), limit)), 1)
        unit = along / jnp.maximum(_norm(along, axes), 1e-12)
        push = (d - (1 - strength(eta, cond, row)) * _sum(d * unit, axes) * unit) / b
        w = strength(scale, cond, row)
        out = cond + w * push if from_cond else jnp.where(w == 1, cond, value + w * push)
        return out.astype(cond.dtype), last

    if momentum is None:
        return lambda *args: term(None, *args)[0]
    return Stateful(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), term)
