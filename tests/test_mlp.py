"""GELU in a product, as on a GPU: when, with which result, and with which gradients."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from util_random import error

from jdit.nn import layers
from jdit.sharding import planned_mesh
from jdit.target import Target, compiling_for

D = 32


def made(dtype=jnp.bfloat16, act=layers.gelu_tanh) -> layers.Mlp:
    mlp = layers.Mlp(D, 96, act, dtype=dtype, rngs=nnx.Rngs(0))
    assert mlp.up.bias is not None
    mlp.up.bias.set_value(jax.random.normal(jax.random.key(1), (96,), dtype))
    return mlp


def in_product(mlp: layers.Mlp, rows: int, platform: str = "gpu", **sizes: int) -> bool:
    x = jax.ShapeDtypeStruct((1, rows, D), mlp.up.kernel.get_value().dtype)
    mesh = jax.sharding.use_abstract_mesh(planned_mesh(**sizes)) if sizes else contextlib.nullcontext()
    with compiling_for(Target(platform)), mesh:
        return "_product_with_gelu" in str(jax.make_jaxpr(lambda x: mlp(x))(x))


def test_only_where_a_product_does_it_and_it_pays():
    mlp = made()
    assert in_product(mlp, D + 1) and not in_product(mlp, D)
    assert not in_product(mlp, D + 1, "cpu") and not in_product(mlp, D + 1, "tpu")
    assert in_product(made(jnp.float16), D + 1) and not in_product(made(jnp.float32), D + 1)
    assert not in_product(made(act=layers.gelu), D + 1) and not in_product(made(act=layers.silu), D + 1)


@pytest.mark.parametrize("sizes, ways", [(dict(data=2, sequence=2), 4), (dict(tensor=4), 1)])
def test_rows_are_those_of_a_device(sizes, ways):
    mlp = made()
    assert in_product(mlp, (D + 1) * ways, **sizes) and not in_product(mlp, D * ways, **sizes)


def test_results_and_gradients():
    """The result is rounded where XLA says so, the gradients are those without a product that does it."""
    mlp, x = made(), jax.random.normal(jax.random.key(2), (2, 50, D), jnp.bfloat16)
    both = lambda: jax.jit(
        jax.value_and_grad(lambda x: (jnp.sin(y := mlp(x).astype(jnp.float32)).sum(), y), has_aux=True)
    )(x)
    want = jax.jit(lambda x: mlp(x))(x)
    (_, plain), gradient = both()
    with compiling_for(Target("gpu")):
        got = jax.jit(lambda x: mlp(x))(x)
        (_, trained), same = both()
    assert error(plain, want) == 0 < error(got, want) < 1e-2
    assert error(trained, want) == 0 == error(same, gradient)
