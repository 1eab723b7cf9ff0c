"""Rules, meshes and annotated modules: eight devices give the numbers of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from util_random import error

from jdit import sharding
from jdit.nn.mmdit import MMDiT, MMDiTConfig
from jdit.nn.text.clip import CLIPText, CLIPTextConfig
from jdit.nn.text.t5 import T5, T5Config
from jdit.pipeline.executor import Stage, Weights, run
from jdit.sharding import Rules, make_mesh

CFG = MMDiTConfig(
    sample_size=16, layers=4, heads=8, head_dim=8, joint_dim=24, pooled_dim=16, pos_size=8, dual_layers=(0, 1),
    qk_norm="rms_norm",
)  # fmt: skip
MESHES = {"sequence8": dict(sequence=8), "2x2x2": dict(data=2, sequence=2, tensor=2)}
FSDP = Rules(embed=("data", "sequence"))


def random(make):
    _, leaves = sharding.abstract(make)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda k, s: jax.random.normal(k, s.shape, s.dtype) * (0.3 if len(s.shape) < 3 else 0.1)
    return {p: draw(k, s) for k, (p, s) in zip(keys, leaves.items())}


def place(make, values, mesh, rules):
    _, leaves = sharding.abstract(make, mesh, rules)
    return sharding.assemble(make, {p: jax.device_put(v, leaves[p].sharding) for p, v in values.items()})


def test_equal_constructors_are_described_once():
    """And modules made by them share nothing that one could change."""
    make, same = (sharding.Make(CLIPText, CLIPTextConfig(width=8, heads=2, layers=2)) for _ in range(2))
    kept = sharding.described(make)
    assert sharding.described(same) is kept
    assert sharding.described(dataclasses.replace(make, cfg=CLIPTextConfig(width=8, heads=2, layers=1))) is not kept
    shapes = sharding.abstract(make)[1]
    one, other = (sharding.assemble(make, {p: jnp.zeros(a.shape) for p, a in shapes.items()}) for _ in range(2))
    one.projection.kernel.set_value(jnp.ones(one.projection.kernel.shape))
    one.extra = 1
    assert any(a.any() for a in sharding.leaves(one).values())
    assert not any(a.any() for a in sharding.leaves(other).values()) and not hasattr(other, "extra")
    assert sharding.abstract(make)[1] == shapes and not hasattr(kept, "extra")


@pytest.mark.slow
@pytest.mark.parametrize("rules", [Rules(), FSDP], ids=["plain", "fsdp"])
def test_mmdit_equals_one_device(rules):
    """All families on all meshes are in test_meshes.py; this one also runs in Flax's tree mode."""
    key = jax.random.key(1)
    x = jax.random.normal(key, (8, 16, 8, 16))
    args = jax.random.uniform(key, (8,)) * 1000, jax.random.normal(key, (8, 8, 24)), jax.random.normal(key, (8, 16))
    values = random(lambda: MMDiT(CFG, rngs=nnx.Rngs(0)))
    one = sharding.assemble(lambda: MMDiT(CFG, rngs=nnx.Rngs(0)), values)
    call = jax.jit(lambda m, *a: m(*a))
    want = call(one, x, *args)
    mesh, cfg = make_mesh(**MESHES["2x2x2"]), dataclasses.replace(CFG, rules=rules)
    with jax.set_mesh(mesh):
        got = call(place(lambda: MMDiT(cfg, rngs=nnx.Rngs(0)), values, mesh, rules), x, *args)
    assert error(got, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
def test_text_encoders_equal_one_device(sizes):
    clip = CLIPTextConfig(vocab_size=40, width=32, mlp=64, layers=3, heads=8, max_positions=12, projection=16)
    t5 = T5Config(vocab_size=40, width=32, kv=4, heads=8, mlp=64, layers=2)
    ids = np.random.default_rng(0).integers(0, 40, (8, 12))
    mesh = make_mesh(**sizes)
    for make in (lambda: CLIPText(clip, rngs=nnx.Rngs(0)), lambda: T5(t5, rngs=nnx.Rngs(0))):
        values = random(make)
        call = jax.jit(lambda m, ids: jax.tree.leaves(m(ids)))
        want = call(sharding.assemble(make, values), ids)
        with jax.set_mesh(mesh):
            got = call(place(make, values, mesh, Rules()), ids)
        assert max(error(a, b) for a, b in zip(got, want)) < 1e-5


def test_parameters_carry_their_axes():
    mesh = make_mesh(data=2, sequence=2, tensor=2)
    _, leaves = sharding.abstract(lambda: MMDiT(CFG, rngs=nnx.Rngs(0)), mesh, FSDP)
    spec = {sharding.dotted(p): s.sharding.spec for p, s in leaves.items()}
    embed = ("data", "sequence")
    assert spec["blocks.0.image.attn.qkv.kernel"] == P(None, embed, None, "tensor")
    assert spec["blocks.0.image.attn.out.kernel"] == P(None, "tensor", embed)
    assert spec["blocks.1.context.mlp.up.kernel"] == P(None, embed, "tensor")
    assert spec["blocks.1.context.mlp.up.bias"] == P(None, "tensor")
    assert spec["blocks.2.image.mlp.down.kernel"] == P(None, "tensor", embed)


def test_rules_refuse_collisions_and_unknown_names():
    with pytest.raises(ValueError, match="'batch' and 'mlp' are both on mesh axis 'data'"):
        Rules(mlp="data").spec(("batch", "mlp"))
    with pytest.raises(ValueError, match="'lemon' is not a logical axis"):
        Rules().spec(("lemon",))
    assert Rules().spec(("embed", "mlp"), 4) == P(None, None, None, "tensor")


def test_presets_of_rules():
    mesh, spec = make_mesh(data=2, sequence=2, tensor=2), {}
    for name in sharding.PRESETS:
        _, leaves = sharding.abstract(lambda: MMDiT(CFG, rngs=nnx.Rngs(0)), mesh, Rules.named(name))
        spec[name] = {sharding.dotted(p): s.sharding.spec for p, s in leaves.items()}["blocks.2.image.mlp.up.kernel"]
    fsdp = P(None, ("data", "sequence"), "tensor")
    assert spec == {"replicated": P(None, None, None), "fsdp": fsdp, "tensor": P(None, None, "tensor")}
    assert Rules.tensor() == Rules() and Rules.fsdp() == FSDP
    with pytest.raises(ValueError, match="rules='zero'; there are replicated, fsdp, tensor"):
        Rules.named("zero")


def test_mesh_that_cannot_be_had():
    with pytest.raises(ValueError, match="needs 16 devices; there are 8"):
        make_mesh(data=16)
    assert sharding.planned_mesh(data=16).size == 16


@pytest.mark.parametrize("tokens, axis, ways", [(16, "seq", 8), (13, "seq", 8), (5, "seq", 1), (13, "rows", 1)])
def test_dimensions_that_do_not_divide(tokens, axis, ways, caplog):
    """Tokens are spread nevertheless if there are as many as devices; the rest stays whole, which is logged once."""
    sharding._log_whole.cache_clear()
    seen, x = [], np.random.default_rng(0).normal(size=(2, tokens, 4)).astype(np.float32)

    def program(x):
        y = sharding.shard(jnp.sin(x), "batch", axis, "width", rules=Rules())
        jax.debug.inspect_array_sharding(y, callback=seen.append)
        return sharding.shard(y, "batch", axis, "width", rules=Rules())

    with caplog.at_level("INFO", "jdit"), jax.set_mesh(mesh := make_mesh(sequence=8)):
        np.testing.assert_allclose(jax.jit(program)(x), np.sin(x), rtol=1e-5, atol=1e-6)
    spread = NamedSharding(mesh, P(None, "sequence" if ways > 1 else None, None))
    assert seen[0].is_equivalent_to(spread, 3)
    said = [f"sharding: {axis} of {tokens} does not divide by mesh axis sequence=8 and stays whole on it"]
    assert [r.message for r in caplog.records] == (said if ways == 1 else [])


def test_stages_hand_on_tokens_that_do_not_divide():
    """Arrays between programs cannot be spread unevenly: JAX gathers them, and no stage need know."""
    spread = lambda x: sharding.shard(x, "batch", "seq", "width", rules=Rules())
    first = Stage("first", lambda x: spread(jnp.sin(x)), reads=("x",), writes=("y",))
    second = Stage("second", lambda y: (spread(y * 2), spread(y).sum(1)), reads=("y",), writes=("z", "sum"))
    x = np.random.default_rng(0).normal(size=(2, 13, 4)).astype(np.float32)
    with jax.set_mesh(make_mesh(sequence=8)):
        values, _ = run([first, second], Weights({}), {"x": x})
    np.testing.assert_allclose(values["z"], 2 * np.sin(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["sum"], np.sin(x).sum(1), rtol=1e-5, atol=1e-5)
