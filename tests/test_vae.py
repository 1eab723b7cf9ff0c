"""The image autoencoder against closed formulas and properties, without torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import autoencoder_kl as kl
from convert import table
from jdit import sharding
from jdit.nn.vae import tiling
from jdit.nn.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior
from jdit.nn.vae.blocks import GroupNorm

pytestmark = pytest.mark.slow

TINY = AutoencoderKLConfig(
    channels=(4, 8), layers=1, latent_channels=3, groups=2, sample_size=16, quant_conv=True, post_quant_conv=True
)


def error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(np.asarray(want)))


def build(cfg: AutoencoderKLConfig = TINY, kind: type[AutoencoderKL] = AutoencoderKL) -> AutoencoderKL:
    """Every leaf random, norms and biases too."""
    rng = np.random.default_rng(0)
    make = sharding.Make(kind, cfg)
    leaves = {
        path: jnp.asarray((path[-1] == "scale") + rng.normal(size=leaf.shape) * 0.3, leaf.dtype)
        for path, leaf in sharding.abstract(make)[1].items()
    }
    return sharding.assemble(make, leaves)


def pixels(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_group_norm_is_the_formula(offset):
    """Also with means far above the spread, where the plain difference of squares fails."""
    norm = GroupNorm(6, groups=3, eps=1e-6, dtype=jnp.float32)
    x = np.asarray(pixels(2, 5, 7, 6)) + np.float32(offset)
    groups = x.astype(np.float64).reshape(2, 35, 3, 2)
    want = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    assert error(norm(jnp.asarray(x)), want.reshape(x.shape)) < 1e-6


def test_group_norm_gradient_is_that_of_the_formula():
    norm = GroupNorm(4, groups=2, eps=1e-6, dtype=jnp.float32)
    x, weight = pixels(2, 3, 3, 4), pixels(2, 3, 3, 4, seed=2)

    def plain(x):
        groups = x.reshape(2, 9, 2, 2)
        centred = groups - groups.mean((1, 3), keepdims=True)
        return (centred / jnp.sqrt(jnp.square(centred).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)

    got, want = (jax.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (norm, plain))
    assert error(got, want) < 1e-5


def test_shapes_and_dtypes():
    vae = build(dataclasses.replace(TINY, dtype="bfloat16"))
    posterior = jax.jit(AutoencoderKL.encode)(vae, pixels(2, 10, 13, 3))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 5, 6, 3)
    assert posterior.mean.dtype == jnp.float32
    out = jax.jit(AutoencoderKL.decode)(vae, posterior.mode())
    assert out.shape == (2, 10, 12, 3) and out.dtype == jnp.float32


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="1x8 pixels is below the smallest, 2x2"):
        build().encode(pixels(1, 1, 8, 3))


def test_posterior():
    mean, logvar = jnp.full((1, 64, 64, 4), 2.0), jnp.full((1, 64, 64, 4), -1.0)
    p = Posterior.of(jnp.concatenate([mean, logvar], -1))
    draws = p.sample(jax.random.key(0))
    assert draws.shape == mean.shape
    assert abs(float(draws.mean()) - 2.0) < 0.02
    assert abs(float(draws.std()) - np.exp(-0.5)) < 0.02
    assert bool((p.mode() == mean).all())
    np.testing.assert_allclose(p.kl(), 0.5 * (4 + np.exp(-1) - 1 + 1) * mean.size, rtol=1e-6)
    clamped = Posterior.of(jnp.asarray([[[[0.0, 0.0, -99.0, 99.0]]]])).logvar
    assert clamped.ravel().tolist() == [-30.0, 20.0]


def test_normalise_and_back():
    vae, z = build(), pixels(1, 4, 4, 3)
    np.testing.assert_allclose(vae.normalise(z), (np.asarray(z) - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(vae.denormalise(vae.normalise(z)), z, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("change", "says"), [
    ({"channels": (4, 7)}, "[7] are not divisible into 2 norm groups"),
    ({"act": "mish", "channels": ()}, "channels is empty; act 'mish'"),
    ({"scale": 0.0}, "scale is 0"),
])  # fmt: skip
def test_config_errors(change, says):
    with pytest.raises(ValueError) as e:
        dataclasses.replace(TINY, **change)
    assert says in str(e.value)


@pytest.mark.slow
def test_one_at_a_time_equals_the_batch():
    vae, x = build(), pixels(3, 8, 6, 3)
    whole = jax.jit(AutoencoderKL.encode)(vae, x)
    single = jax.jit(lambda vae, x: tiling.one_at_a_time(vae.encode, x))(vae, x)
    assert error(single.mean, whole.mean) < 1e-5 and error(single.logvar, whole.logvar) < 1e-5
    decoded = tiling.one_at_a_time(lambda z: tiling.decode_tiled(vae, z, tile=8), whole.mean)
    assert error(decoded, tiling.decode_tiled(vae, whole.mean, tile=8)) < 1e-5


def test_tiles_that_do_not_fit():
    vae = build()
    with pytest.raises(ValueError, match=r"tile 10 with overlap 0\.25: .* multiples of 2 pixels .* multiples of 8"):
        tiling.decode_tiled(vae, pixels(1, 9, 9, 3), tile=10)
    with pytest.raises(ValueError, match="overlap 1"):
        tiling.decode_tiled(vae, pixels(1, 9, 9, 3), tile=8, overlap=1.0)
    with pytest.raises(ValueError, match=r"sizes \[13\] leave a tile of less than 2 pixels"):
        tiling.encode_tiled(vae, pixels(1, 13, 12, 3), tile=8)


@pytest.mark.slow
def test_tiling_is_exact_where_nothing_is_global():
    """A decoder that only sees its own latent pixel: blended tiles must give the untiled picture."""

    class Pointwise(AutoencoderKL):
        def decode(self, latents):
            return jnp.repeat(jnp.repeat(latents, 2, 1), 2, 2)

        def moments(self, pixels):
            return jnp.concatenate([pixels[:, ::2, ::2]] * 2, -1)

    vae = build(kind=Pointwise)
    z, x = pixels(2, 13, 10, 3), pixels(2, 26, 20, 3)
    assert error(tiling.decode_tiled(vae, z, tile=8), vae.decode(z)) < 1e-6
    assert error(tiling.encode_tiled(vae, x, tile=8).mean, vae.encode(x).mean) < 1e-6


@pytest.mark.slow
def test_tiles_keep_memory_bounded():
    """Peak temporary memory of a compiled tiled decode hardly grows with the picture; that of a whole decode does."""
    make = lambda: AutoencoderKL(dataclasses.replace(TINY, channels=(16, 16), mid_attention=False), rngs=nnx.Rngs(0))
    vae = nnx.eval_shape(make)

    def peak(fn, n):
        z = jax.ShapeDtypeStruct((1, n, n, 3), jnp.float32)
        return jax.jit(fn).lower(vae, z).compile().memory_analysis().temp_size_in_bytes

    tiled = lambda vae, z: tiling.decode_tiled(vae, z, tile=32)
    outputs = lambda n: 2 * (2 * n) ** 2 * 3 * 4 * (16 / 12) ** 2  # tiles overlap; once in the loop, once blended
    assert peak(AutoencoderKL.decode, 76) > 3 * peak(AutoencoderKL.decode, 40)
    assert peak(tiled, 76) - peak(tiled, 40) < 1.5 * (outputs(76) - outputs(40))
    assert peak(tiled, 76) < peak(AutoencoderKL.decode, 76) / 2


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"sequence": 8}, {"data": 2, "sequence": 4}])
def test_sharded_equals_unsharded(sizes):
    vae, x = build(), pixels(2, 32, 14, 3)
    encode, decode = jax.jit(AutoencoderKL.encode), jax.jit(AutoencoderKL.decode)
    posterior = encode(vae, x)
    picture = decode(vae, posterior.mean)
    with jax.set_mesh(sharding.make_mesh(**sizes)):
        sharded = encode(vae, x)
        out = decode(vae, posterior.mean)
        text = decode.lower(vae, posterior.mean).compile().as_text()
    assert error(sharded.mean, posterior.mean) < 1e-5 and error(sharded.logvar, posterior.logvar) < 1e-5
    assert error(out, picture) < 1e-5
    assert "collective-permute" in text  # rows really are apart: convolutions fetch their neighbours' edge


@pytest.mark.slow
def test_full_size_count():
    """Stable Diffusion 3's autoencoder has 83,819,683 parameters."""
    make = lambda: AutoencoderKL(AutoencoderKLConfig(), rngs=nnx.Rngs(0))
    assert sharding.count(make) == 83_819_683
    vae = nnx.eval_shape(make)
    out = nnx.eval_shape(lambda vae, z: vae.decode(z), vae, jax.ShapeDtypeStruct((1, 128, 96, 16), jnp.float32))
    assert out.shape == (1, 1024, 768, 3)


def leaves_by_name(vae):
    return {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(vae).items()}


@pytest.mark.parametrize("make_rules", [kl.rules, kl.original_rules])
def test_rules_there_and_back(make_rules):
    """Every leaf becomes keys that fill the same leaf again, bit for bit."""
    ours = leaves_by_name(build())
    tensors = {k: op.inverse(ours[p][i]) for k, p, i, op in table.back(make_rules(TINY), ours)}
    fills = table.plan({k: v.shape for k, v in tensors.items()}, make_rules(TINY), ours)
    assert sorted(f.path for f in fills) == sorted(ours)
    for f in fills:
        np.testing.assert_array_equal(table.fill(f, tensors.__getitem__), ours[f.path])


def test_a_missing_and_an_unknown_key_are_named():
    ours = leaves_by_name(build())
    tensors = {k: op.inverse(ours[p][i]).shape for k, p, i, op in table.back(kl.rules(TINY), ours)}
    del tensors["encoder.mid_block.attentions.0.to_q.bias"]
    tensors["decoder.up_blocks.0.attentions.0.to_q.bias"] = (4,)
    with pytest.raises(table.ConversionError) as e:
        table.plan(tensors, kl.rules(TINY), ours)
    assert "encoder.mid_block.attentions.0.to_q.bias: missing" in str(e.value)
    assert "decoder.up_blocks.0.attentions.0.to_q.bias: no rule takes it" in str(e.value)


def test_upstream_configs():
    sd3 = {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.29.0", "act_fn": "silu", "in_channels": 3,
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True, "latent_channels": 16, "latents_mean": None, "latents_std": None, "layers_per_block": 2,
        "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 1.5305,
        "shift_factor": 0.0609, "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False,
        "use_quant_conv": False,
    }  # fmt: skip
    assert kl.config(sd3) == AutoencoderKLConfig()
    assert kl.config(kl.upstream_config(AutoencoderKLConfig())) == AutoencoderKLConfig()
    sparse = kl.config({}, dtype="bfloat16")
    assert (sparse.channels, sparse.layers, sparse.shift, sparse.dtype) == ((64,), 1, 0.0, "bfloat16")
    assert sparse.quant_conv and sparse.post_quant_conv


def test_unsupported_upstream_fields_are_all_named():
    with pytest.raises(ValueError) as e:
        kl.config({
            "_class_name": "AutoencoderTiny", "latents_mean": [0.0], "act_fn": "mish", "magic": 1,
            "block_out_channels": [32, 64], "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        })  # fmt: skip
    for name in ("_class_name", "latents_mean", "act_fn", "magic", "down_block_types", "up_block_types"):
        assert name in str(e.value)
