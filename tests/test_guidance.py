"""Guidance: closed forms, properties, what runs when, and what is compiled when."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdit import sampling
from jdit.sampling import (
    Stateful,
    away_from,
    dynamic_scale,
    embedded,
    embedded_scale,
    guided,
    keep_known,
    keep_norm,
    linear,
    one_batch,
    projected,
    rescaled,
    separate,
    within,
    zero_init,
    zero_star,
)

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction",
    "flow_shift": 3.0, "solver_order": 3,
}  # fmt: skip
CHAINS = {
    "linear": lambda s=4.5: (linear(s),),
    "rescaled": lambda s=4.5: (linear(s), rescaled(0.7)),
    "keep_norm": lambda s=4.5: (linear(s), keep_norm(2)),
    "zero_star": lambda s=4.5: (zero_star(), linear(s)),
    "projected": lambda s=4.5: (projected(s, eta=0.3, threshold=3.0),),
    "momentum": lambda s=4.5: (projected(s, eta=0.3, threshold=3.0, momentum=-0.5), rescaled(0.2)),
}  # fmt: skip
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def noise(seed=0, shape=(3, 4, 6, 2)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conditional(bias):
    return lambda x, t, *row: jnp.tanh(x + bias + jnp.cos(t / 10)) - 0.2 * x + bias


NEGATIVE, POSITIVE = noise(5), noise(6)
T = jnp.float32(500)
negative, positive = conditional(NEGATIVE), conditional(POSITIVE)
both = conditional(np.concatenate([NEGATIVE, POSITIVE]))
fixed = lambda uncond, cond: separate(lambda x, t, *row: uncond, lambda x, t, *row: cond)


def counted(model, seen):
    """A model that notes its timesteps, when it runs and not when it is traced."""

    def call(x, t, *row):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return model(x, t, *row)

    return call


def assert_close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def predict(model, x=None, row=()):
    x = noise() if x is None else x
    return model.call(model.init(x), x, T, *row)[0] if isinstance(model, Stateful) else model(x, T, *row)


# Closed forms


@chains
def test_one_batch_equals_two_passes(chain):
    table, x = sampling.from_config(UNIPC, 6), noise()
    one = sampling.solve(guided(one_batch(both), *chain()), x, table)
    two = sampling.solve(guided(separate(negative, positive), *chain()), x, table)
    assert_close(one, two, 1e-6)


def test_the_named_wrappers():
    x = noise()
    u, c = np.asarray(negative(x, T)), np.asarray(positive(x, T))
    expected = u + 4.5 * (c - u)
    np.testing.assert_allclose(sampling.classifier_free(both, 4.5)(x, T), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sampling.two_passes(negative, positive, 4.5)(x, T), expected, rtol=1e-5, atol=1e-5)


@chains
def test_scale_one_is_the_conditional_prediction(chain):
    assert_close(predict(guided(one_batch(both), *chain(1.0))), positive(noise(), T), 1e-6)


def test_strengths_that_change_nothing():
    plain = predict(guided(one_batch(both), linear(4.5)))
    for terms in (
        (linear(4.5), rescaled(0.0)),
        (projected(4.5),),
        (projected(4.5, momentum=0.0),),
        (projected(4.5, threshold=1e6),),
        (projected(3.5, from_cond=True),),
        (projected(4.5, clean=lambda: (1.0, -0.4)),),
        (linear(4.5), away_from(negative, 0.0)),
    ):
        assert_close(predict(guided(one_batch(both), *terms)), plain, 1e-6)


def test_zero_star_of_parallel_predictions():
    """The unconditional prediction is scaled onto the conditional one, and no scale can push away from it."""
    for factor in (0.3, -2.0):
        assert_close(predict(guided(fixed(factor * POSITIVE, POSITIVE), zero_star(), linear(3.0))), POSITIVE, 1e-6)
    out = predict(guided(fixed(NEGATIVE, POSITIVE), zero_star(), linear(0.0)))  # what is left of uncond
    for o, c in zip(np.asarray(out), POSITIVE, strict=True):
        assert abs(np.vdot(c - o, o)) < 1e-4  # the residue of the best fit is orthogonal to it


def test_rescaled_has_the_spread_of_the_conditional_prediction():
    out = np.asarray(predict(guided(fixed(NEGATIVE, POSITIVE), linear(6.0), rescaled(1.0))))
    np.testing.assert_allclose(out.std((1, 2, 3)), POSITIVE.std((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("patch", [1, 2, (2, 3), (4, 1)])
def test_keep_norm_keeps_the_norm_of_every_token(patch):
    out = np.asarray(predict(guided(fixed(NEGATIVE, POSITIVE), linear(6.0), keep_norm(patch))))
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    for i, j in itertools.product(range(0, 4, rows), range(0, 6, columns)):
        token = np.s_[:, i : i + rows, j : j + columns]
        norm = lambda a, token=token: np.sqrt((a[token] ** 2).sum((1, 2, 3)))
        np.testing.assert_allclose(norm(out), norm(POSITIVE), rtol=1e-5)
    plain = NEGATIVE + 6.0 * (POSITIVE - NEGATIVE)
    token = np.s_[:, :rows, :columns]  # scaled by one number, not bent
    share = out[token] / plain[token]
    np.testing.assert_allclose(share, np.broadcast_to(share[:, :1, :1, :1], share.shape), rtol=1e-4)


def test_keep_norm_of_videos_and_tokens():
    for shape, patch in (((2, 3, 4, 6, 2), 2), ((2, 3, 4, 6, 2), (3, 2, 2)), ((2, 5, 8), 1), ((2, 8), 1)):
        u, c = noise(1, shape), noise(2, shape)
        out = np.asarray(predict(guided(fixed(u, c), linear(6.0), keep_norm(patch)), noise(3, shape)))
        np.testing.assert_allclose(np.linalg.norm(out), np.linalg.norm(c), rtol=1e-5)


def test_projected():
    dots = lambda a, b: (np.asarray(a) * b).sum((1, 2, 3))
    push = np.asarray(predict(guided(fixed(NEGATIVE, POSITIVE), projected(5.0, eta=0.0)))) - NEGATIVE
    cosine = dots(push, POSITIVE) / np.sqrt(dots(push, push) * dots(POSITIVE, POSITIVE))
    np.testing.assert_allclose(cosine, 0, atol=1e-6)
    push = np.asarray(predict(guided(fixed(NEGATIVE, POSITIVE), projected(5.0, threshold=2.5)))) - NEGATIVE
    np.testing.assert_allclose(np.sqrt(dots(push, push)), 5.0 * 2.5, rtol=1e-5)
    # along C alone: each position by itself
    out = predict(guided(fixed(NEGATIVE, POSITIVE), projected(5.0, eta=0.0, axes=(-1,)))) - NEGATIVE
    np.testing.assert_allclose((out * POSITIVE).sum(-1), 0, atol=1e-4)


def test_projected_in_the_space_of_clean_samples():
    """Guiding a network's x0 predictions, and turning the result back, is the same as `clean`."""
    x, table = noise(), sampling.from_config(EULER, 7)
    a, b = (np.float32(w[2]) for w in (table.x0_x, table.x0_out))
    terms: dict[str, Any] = {"eta": 0.2, "threshold": 3.0, "momentum": -0.5}
    in_place = guided(separate(negative, positive), projected(4.0, clean=lambda row: row, **terms))
    to_clean = lambda model: lambda x, t, row: a * x + b * model(x, t)
    expected = guided(separate(to_clean(negative), to_clean(positive)), projected(4.0, **terms))
    assert_close(predict(in_place, x, ((a, b),)), (predict(expected, x, (None,)) - a * x) / b, 2e-6)
    out = sampling.solve(in_place, x, table, per_step=(table.x0_x, table.x0_out))
    assert np.isfinite(out).all()


def test_momentum_of_constant_predictions():
    """d_n = d (1 - m^n) / (1 - m): a step of Euler adds (sigma' - sigma) (uncond + scale d_n)."""
    table, x, m = sampling.from_config(EULER, 8), noise(), -0.6
    model = guided(fixed(NEGATIVE, POSITIVE), projected(3.0, momentum=m))
    expected = x.astype(np.float64)
    for n, size in enumerate(np.diff([*table.sigma, 0.0]), 1):
        expected += size * (NEGATIVE + 3.0 * (POSITIVE - NEGATIVE) * (1 - m**n) / (1 - m))
    assert_close(sampling.solve(model, x, table), expected, 1e-6)


def test_a_network_that_predicts_zero():
    zero = np.zeros_like(POSITIVE)
    with jax.debug_nans(True):
        for chain in CHAINS.values():
            assert not np.asarray(predict(guided(fixed(zero, zero), *chain()))).any()


# What is carried from step to step


def test_scan_host_loop_and_parts_carry_the_same():
    table, x = sampling.from_config(UNIPC, 9), noise()
    model = guided(one_batch(both), *CHAINS["momentum"]())
    whole = sampling.solve(model, x, table)
    assert_close([*sampling.iterate(model, x, table)][-1].x, whole, 1e-6)
    high, low = sampling.split(table, 875.0)
    state = sampling.run(model, sampling.init(x, table), high)
    assert_close(sampling.run(model, state, low).x, whole, 1e-6)
    forgotten = sampling.run(model, state._replace(carry=None), low).x
    assert np.abs(forgotten - whole).max() > 1e-3


def test_stateful_models_are_guided_too():
    """A model that counts its calls (as a cache would) inside a pair, beside a term with momentum."""

    def counting(model):
        count = lambda n, x, t, *row: (model(x, t, *row) + 0.1 * n, n + 1)
        return Stateful(lambda x: jnp.zeros(x.shape[:1] + (1,) * (x.ndim - 1)), count)

    table, x = sampling.from_config(EULER, 5), noise()
    by_row = lambda model: lambda x, t, n: model(x, t) + 0.1 * n
    expected = sampling.solve(
        guided(separate(by_row(negative), by_row(positive)), projected(3.0, momentum=-0.5),
               away_from(by_row(negative), 0.5)), x, table, per_step=np.arange(5.0)
    )  # fmt: skip
    terms = (projected(3.0, momentum=-0.5), away_from(counting(negative), 0.5))
    for pair in (one_batch(counting(both)), separate(counting(negative), counting(positive))):
        assert_close(sampling.solve(guided(pair, *terms), x, table), expected, 1e-6)
    # where there is no guidance nothing is counted, and nothing is remembered
    flags = np.array([0, 0, 1, 1, 1], bool)
    pair = separate(counting(negative), positive)
    state = sampling.run(guided(pair, *terms, active=lambda on: on), sampling.init(x, table), table, per_step=flags)
    assert [np.ravel(a)[0] for a in jax.tree.leaves(state.carry) if a.shape == (3, 1, 1, 1)] == [3, 3]


# What runs when


def test_skip_layer_guidance():
    skipped, runs = conditional(noise(7)), []
    table, x = sampling.from_config(EULER, 10), noise()
    flags = sampling.active_steps(10, 0.1, 0.5)
    assert flags.tolist() == [1 < i < 5 for i in range(10)]  # both ends are left out
    model = sampling.skip_layer(both, counted(skipped, runs), 4.0, 2.5, lambda row: row)
    result = sampling.solve(model, x, table, per_step=flags)
    jax.effects_barrier()
    assert sorted(runs, reverse=True) == table.timestep[flags].tolist()  # elsewhere the pass is not made

    def expected(x, t, row):
        u, c = negative(x, t), positive(x, t)
        return u + 4.0 * (c - u) + row * 2.5 * (c - skipped(x, t))

    assert_close(result, sampling.solve(expected, x, table, per_step=flags.astype(np.float32)), 1e-6)


def test_guidance_in_an_interval():
    table, x, seen, alone = sampling.from_config(UNIPC, 10), noise(), [], []
    flags = within(table.sigma, 0.4, 0.9)
    assert flags.tolist() == [0.4 < s <= 0.9 for s in table.sigma] and 2 < flags.sum() < 8
    expected = sampling.solve(
        lambda x, t, on: jnp.where(on, guided(one_batch(both), *CHAINS["rescaled"]())(x, t), positive(x, t)),
        x, table, per_step=flags
    )  # fmt: skip
    for pair in (
        separate(counted(negative, seen), positive),
        one_batch(counted(both, seen), counted(positive, alone)),
        one_batch(both),
    ):
        model = guided(pair, *CHAINS["rescaled"](), active=lambda on: on)
        assert_close(sampling.solve(model, x, table, per_step=flags), expected, 1e-6)
    jax.effects_barrier()
    assert sorted(seen) == sorted([*table.timestep[flags]] * 2)
    assert sorted(alone) == sorted(table.timestep[~flags])
    model = guided(separate(negative, positive), *CHAINS["rescaled"](), active=lambda on: on)
    assert (predict(model, x, (False,)) == positive(x, T)).all()  # nothing is rounded there


def test_zero_init():
    table, x, seen = sampling.from_config(EULER, 6), noise(), []
    for terms in ((linear(3.0),), (projected(3.0, momentum=-0.5),)):
        model = guided(separate(negative, counted(positive, seen)), *terms)
        result = sampling.solve(zero_init(model, lambda on: on), x, table, per_step=table.index < 2)
        expected = sampling.solve(model, x, sampling.part(table, 2))  # a velocity of zero leaves the sample alone
        assert_close(result, expected, 1e-6)
        jax.effects_barrier()
        assert sorted(seen) == sorted([*table.timestep[2:]] * 2)
        seen.clear()


@pytest.mark.parametrize("config", [EULER, UNIPC])
def test_known_parts_are_as_if_laid_over_every_step(config):
    table, mask = sampling.from_config(config, 6), (np.arange(6) % 2 > 0)[:, None]
    clean, first = noise(3), noise()
    model = guided(separate(negative, positive), linear(3.0))
    kept = keep_known(model, clean, mask, lambda row: row)
    x = sampling.add_noise(clean, first, table)
    steps = list(sampling.iterate(kept, x, table, per_step=(table.x0_x, table.x0_out)))
    alpha, sigma = np.append(table.alpha[1:], 1), np.append(table.sigma[1:], 0)
    for i, step in enumerate(steps):
        level = alpha[i] * clean + sigma[i] * first
        assert_close((1 - mask) * step.x, (1 - mask) * level, 1e-5)
        if config is EULER:
            x = np.where(mask, x + (sigma[i] - table.sigma[i]) * model(x, jnp.float32(table.timestep[i])), level)
            assert_close(step.x, x, 1e-5)


# Strengths


@chains
def test_changing_strengths_does_not_recompile(chain):
    traces, outputs = [], []
    table, x = sampling.from_config(EULER, 4), noise()

    @jax.jit
    def generate(table, v):
        traces.append(v)
        terms = (
            zero_star(), projected(v["scale"], eta=v["eta"], threshold=v["threshold"], momentum=v["momentum"]),
            away_from(negative, v["layers"]), rescaled(v["phi"]), *chain(v["scale"]),
        )  # fmt: skip
        rows = (within(table.sigma, v["low"], v["high"]), v["scales"])
        take = lambda model: embedded(lambda x, t, row, guidance: model(x, t) + guidance.reshape(-1, 1, 1, 1), v["g"])
        pair = separate(take(negative), take(positive))
        model = zero_init(guided(pair, *terms, active=lambda row: row[0]), lambda row: row[1] > 5)
        return sampling.solve(model, x, table, per_step=rows)

    base = {"scale": 4.0, "eta": 0.5, "threshold": 2.0, "momentum": -0.5, "layers": 1.0, "phi": 0.3, "low": 0.3,
            "high": 0.95, "g": 1e-4, "scales": dynamic_scale(1.0, table.timestep, 4)}  # fmt: skip
    outputs = [generate(table, base)]
    others = {"scale": 5.0, "eta": 0.0, "threshold": 0.0, "momentum": 0.1, "layers": 0.5, "phi": 0.9, "low": 0.7,
              "high": 0.8, "g": 1e-3, "scales": np.full(4, 9.0)}  # fmt: skip
    outputs += [generate(table, {**base, name: value}) for name, value in others.items()]
    assert len(traces) == 1
    for a, b in itertools.combinations(map(np.asarray, outputs), 2):
        assert not np.allclose(a, b, rtol=1e-6)


def test_strengths_by_row_and_by_sample():
    table, x = sampling.from_config(EULER, 5), noise()
    scales, each = np.linspace(1, 6, 5, dtype=np.float32), np.array([1.0, 3.0, 7.0], np.float32)
    found = sampling.solve(guided(one_batch(both), linear(lambda row: row)), x, table, per_step=scales)

    def expected(x, t, scale):
        return negative(x, t) + scale * (positive(x, t) - negative(x, t))

    assert_close(found, sampling.solve(expected, x, table, per_step=scales), 1e-6)
    for chain in CHAINS.values():
        found = predict(guided(one_batch(both), *chain(each)))
        for i, scale in enumerate(each):
            assert_close(found[i], predict(guided(one_batch(both), *chain(scale)))[i], 1e-6)


def test_columns_of_flags():
    """Of an interval of levels the upper end counts, of a range of steps the lower one."""
    assert within(np.array([3.0, 2.0, 1.0, 0.5]), 0.5, 2.0).tolist() == [False, True, True, False]
    assert jax.jit(within)(jnp.arange(4), 0, 2).tolist() == [False, True, True, False]
    assert sampling.step_range(10, 0.25, 0.79).tolist() == [2 <= i < 7 for i in range(10)]
    assert sampling.step_range(3).all() and not sampling.step_range(3, 0.5, 0.5).any()


def test_dynamic_scale():
    with np.errstate(all="raise"):
        column = dynamic_scale(6.0, np.array([50.0, 25.0, 0.0], np.float32), 50)
    np.testing.assert_allclose(column, [1, 1 + 6 * (1 - np.cos(np.pi / 32)) / 2, 7], rtol=1e-12)
    traced = jax.jit(lambda g: dynamic_scale(g, np.arange(0, 1000, 37), 27))(3.0)
    np.testing.assert_allclose(traced, dynamic_scale(3.0, np.arange(0, 1000, 37), 27), rtol=1e-6)


def test_embedded_guidance():
    model = lambda bias: lambda x, t, guidance: conditional(bias)(x, t) * (guidance / 1000).reshape(-1, 1, 1, 1)
    x = noise()
    assert_close(embedded(model(POSITIVE), 3.5)(x, T), 3.5 * positive(x, T), 1e-6)
    assert_close(embedded(model(POSITIVE), np.array([1.0, 2.0, 3.0]))(x, T)[1], 2 * positive(x, T)[1], 1e-6)
    true = sampling.two_passes(embedded(model(NEGATIVE), 3.5), embedded(model(POSITIVE), 3.5), 2.0)
    together = sampling.classifier_free(embedded(model(np.concatenate([NEGATIVE, POSITIVE])), 3.5), 2.0)
    expected = 3.5 * (2 * positive(x, T) - negative(x, T))
    assert_close(true(x, T), expected, 1e-6)
    assert_close(together(x, T), expected, 1e-6)
    by_row = embedded(lambda x, t, row, guidance: model(POSITIVE)(x, t, guidance), lambda row: row)
    assert_close(by_row(x, T, 2.5), 2.5 * positive(x, T), 1e-6)
    assert embedded_scale(3.5, 2).tolist() == [3500.0] * 2
    assert jax.jit(lambda g: embedded_scale(g, 1, jnp.bfloat16))(3.5).tolist() == [3504.0]


# The batch, dtypes and devices


@chains
def test_batch_equals_singles(chain):
    x = noise()
    whole = predict(guided(separate(negative, positive), *chain()), x)
    for i in range(3):
        one = guided(separate(conditional(NEGATIVE[i]), conditional(POSITIVE[i])), *chain())
        assert_close(whole[i : i + 1], predict(one, x[i : i + 1]), 1e-6)
    turned = guided(separate(conditional(NEGATIVE[::-1]), conditional(POSITIVE[::-1])), *chain())
    assert_close(predict(turned, x[::-1])[::-1], whole, 1e-6)


@chains
def test_predictions_are_combined_in_float32(chain, dtype=jnp.bfloat16):
    u, c = jnp.asarray(NEGATIVE, dtype), jnp.asarray(POSITIVE, dtype)
    expected = predict(guided(fixed(u.astype(jnp.float32), c.astype(jnp.float32)), *chain()))
    batch = lambda x, t, on: jnp.concatenate([u, c])
    for pair in (fixed(u, c), one_batch(batch), one_batch(batch, lambda x, t, on: c)):
        model = guided(pair, *chain(), active=lambda on: on)
        out = predict(model, jnp.asarray(noise(), dtype), (True,))
        assert out.dtype == jnp.float32
        assert_close(out, expected, 1e-6)  # in the dtype itself it is 1e-3 or worse
        assert (predict(model, jnp.asarray(noise(), dtype), (False,)) == c.astype(jnp.float32)).all()
        assert predict(zero_init(model, lambda on: on), row=(True,)).dtype == jnp.float32


def test_float64_stays():
    with jax.enable_x64(True):
        x, u, c = (noise(i).astype(np.float64) for i in range(3))
        for chain in CHAINS.values():
            model = guided(separate(conditional(u), conditional(c)), *chain())
            assert predict(model, x).dtype == np.float64
            assert sampling.solve(model, x, sampling.from_config(EULER, 2)).dtype == np.float64


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_eight_devices_equal_one():
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "sequence"))
    u, c, x = (noise(i, (2, 8, 6, 2)) for i in range(3))
    terms = (zero_star(), projected(4.0, eta=0.3, threshold=3.0, momentum=-0.5), rescaled(0.4), keep_norm(2))
    table, flags = sampling.from_config(EULER, 4), np.array([0, 1, 1, 0], bool)

    @jax.jit
    def solve(x, u, c):
        model = guided(separate(conditional(u), conditional(c)), *terms, active=lambda on: on)
        return sampling.solve(model, x, table, per_step=flags)

    result = solve(*(jax.device_put(a, split) for a in (x, u, c)))
    assert result.sharding.is_equivalent_to(split, 4)
    assert_close(result, solve(x, u, c), 1e-6)


# What is refused


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least one term"):
        guided(one_batch(both))
    with pytest.raises(ValueError, match="no positive beside a Stateful"):
        one_batch(Stateful(lambda x: 0, lambda n, x, t: (x, n)), positive)
    for patch, words in ((5, r"patch=5 does not divide.*\(3, 4, 6, 2\)"), ((2, 2, 2), "at most one"), (0, "positive")):
        with pytest.raises(ValueError, match=words):
            predict(guided(one_batch(both), linear(2.0), keep_norm(patch)))
    with pytest.raises(ValueError, match="at most one"):
        predict(guided(fixed(noise(1, (2, 5, 8)), noise(2, (2, 5, 8))), linear(2.0), keep_norm(2)))
