"""Activations of text encoders by the names that upstream configs use (transformers' activations.py)."""

from collections.abc import Callable

import jax
from flax import nnx

from jdit.nn.layers import gelu_tanh


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * nnx.sigmoid(1.702 * x)


def gelu_exact(x: jax.Array) -> jax.Array:
    return nnx.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu_exact,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nnx.relu,
    "silu": nnx.silu,
}


def check_activation(name: str) -> None:
    """Raises:
    ValueError: no such activation; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known; there are {list(ACTIVATIONS)}")
