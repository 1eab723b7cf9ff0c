"""Kernels on a GPU: what dense layers add is apart from their products, statistics from a rotation; gradients pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdit.nn import layers
from jdit.sharding import Rules
from jdit.target import Target, compiling_for

AXES = ("embed", "mlp")
LAYERS = {
    "one": (layers.linear, (6, 5), (2, 3, 6)),
    "fused": (layers.fused_linear, (6, 3, 5), (2, 3, 6)),
    "joined": (layers.joined_linear, (3, 6, 5), (2, 3, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bias_is_apart_from_the_product_on_a_gpu(kind):
    """XLA reads the weights of scanned layers in place for products that have nothing fused in."""
    make, sizes, shape = LAYERS[kind]
    layer = lambda rngs: make(*sizes, AXES, dtype="float32", rngs=rngs)
    stacked, x = layers.stack(layer, 2, nnx.Rngs(0)), jax.random.normal(jax.random.key(1), shape)
    names = lambda: [e.primitive.name for e in jax.make_jaxpr(lambda m, x: m(x))(layer(nnx.Rngs(0)), x).jaxpr.eqns]

    def loss(blocks, x):
        call = lambda block, total, _: total + jnp.sum(jax.vmap(block)(x[None]) ** 2)
        return layers.scan_blocks(blocks, jnp.float32(0), call=call)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    plain, want = names(), grad(stacked, x)
    with compiling_for(Target("gpu")):
        apart, got = names(), grad(stacked, x)
    assert "optimization_barrier" not in plain
    assert apart.index("dot_general") + 1 == apart.index("optimization_barrier") < apart.index("add")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_some_parts_of_a_product(bias):
    fused = layers.fused_linear(6, 3, 5, AXES, dtype="float32", rngs=nnx.Rngs(0), bias=bias)
    x = jax.random.normal(jax.random.key(1), (2, 3, 6))
    for which in (slice(1), slice(1, 3), slice(2, None), slice(3), slice(None)):
        np.testing.assert_allclose(layers.some_parts(fused, x, which, Rules()), fused(x)[:, :, which], rtol=1e-6)


@pytest.mark.parametrize("kind", [layers.RMSNorm, layers.LayerNorm])
def test_statistics_are_apart_from_a_rotation_on_a_gpu(kind):
    norm, x = kind(6, eps=1e-6, dtype="float32"), jax.random.normal(jax.random.key(1), (2, 3, 6)) + 2

    def known(rotated):
        call = lambda x: norm(x, rotated=rotated)
        names = [e.primitive.name for e in jax.make_jaxpr(call)(x).jaxpr.eqns]
        return names.count("optimization_barrier"), jax.grad(lambda x: jnp.sum(jnp.sin(call(x))))(x)

    (none, want), (nor_here, _) = known(True), known(False)
    with compiling_for(Target("gpu")):
        (one, got), (without, _) = known(True), known(False)
    assert (none, nor_here, one, without) == (0, 0, 1, 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
