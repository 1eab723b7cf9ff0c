"""How fast each solver converges where the solution is known: on a mixture on the line, and in a Gaussian's moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import util_mixture as mixture

from jdit import sampling

FLOW, DIFFUSION = "flow_prediction", "v_prediction"  # one prediction of each kind of levels
BEFORE = 3  # levels whose exact history a run starts from: the warm-up's first step, of order 1, would rule otherwise
COUNTS = (40, 80)


def grid(kind, n):
    """Levels whose log-SNR rises unevenly from -1.5 to 2."""
    u = np.linspace(0, 1, n + 1)
    lam = -1.5 + 3.5 * u + 0.6 * u * (u - 1)
    alpha = 1 / (1 + np.exp(-lam)) if kind == FLOW else 1 / np.sqrt(1 + np.exp(-2 * lam))
    sigma = 1 - alpha if kind == FLOW else np.sqrt(1 - alpha**2)
    return sampling.Grid(alpha, sigma, np.zeros(n))


def per_step(table):
    return np.asarray(table.alpha), np.asarray(table.sigma)


def finish(model):
    return jax.jit(lambda state, table, levels: sampling.run(model, state, table, per_step=levels).x)


FINISH = {kind: finish(mixture.network(kind)) for kind in (FLOW, DIFFUSION)}


def order(build, kind):
    """The order at which the error of build(grid, kind) falls."""
    mass, errors = np.linspace(0.05, 0.95, 19), []
    with jax.enable_x64(True):
        for n in COUNTS:
            levels = grid(kind, n)
            table = build(levels, kind)
            past = [mixture.quantile(mass, levels.alpha[i], levels.sigma[i]) for i in range(BEFORE + 1)]
            out = [mixture.network(kind)(x, 0, levels_of(levels, i)) for i, x in enumerate(past)]
            m = [table.m_x[i] * past[i] + table.m_out[i] * out[i] for i in range(BEFORE)]
            state = sampling.init(past[-1], table)
            state = state._replace(history=tuple(m[::-1][: table.history]))
            if state.x_last is not None:
                state = state._replace(x_last=jnp.asarray(past[-2]))
            rest = sampling.part(table, BEFORE)
            exact = mixture.quantile(mass, levels.alpha[-1], levels.sigma[-1])
            errors.append(np.linalg.norm(FINISH[kind](state, rest, per_step(rest)) - exact))
    return np.log(errors[0] / errors[1]) / np.log(COUNTS[1] / COUNTS[0])


def levels_of(levels, i):
    return levels.alpha[i], levels.sigma[i]


def test_the_mixture_is_known():
    """Its quantiles carry the mass they are asked for, and its x0 is that of Bayes' formula, summed over noise."""
    mass = np.linspace(0.01, 0.99, 9)
    x = mixture.quantile(mass, 0.6, 0.4)
    np.testing.assert_allclose(mixture.below(x, 0.6, 0.4), mass, rtol=1e-13)
    clean = np.linspace(-6, 6, 40001)
    centred = (clean[:, None] - mixture.MEANS) / mixture.STDS
    density = (mixture.WEIGHTS / mixture.STDS * np.exp(-0.5 * centred**2)).sum(-1)
    posterior = density * np.exp(-0.5 * ((x[:, None] - 0.6 * clean) / 0.4) ** 2)
    with jax.enable_x64(True):
        np.testing.assert_allclose(mixture.x0(x, 0.6, 0.4), posterior @ clean / posterior.sum(-1), rtol=1e-10)


@pytest.mark.parametrize("variant,predict_x0", [("bh1", True), ("bh2", True), ("bh2", False)])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_converges_with_its_order(p, variant, predict_x0):
    kind = FLOW if predict_x0 else DIFFUSION
    build = lambda disable: lambda g, prediction: sampling.unipc(
        g, order=p, variant=variant, prediction=prediction, predict_x0=predict_x0, lower_order_final=False,
        disable_corrector=disable,
    )  # fmt: skip
    assert order(build(range(1000)), kind) == pytest.approx(p, abs=0.2)
    # the corrector adds an order; a third one is seen from afar while the terms above have not died out
    assert order(build(()), kind) == pytest.approx(p + 1, abs=0.2 if p < 3 else 0.6)


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("p,kind", [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpm_solver_converges_with_its_order(p, kind, predict_x0):
    build = lambda g, prediction: sampling.dpmpp(
        g, order=p, kind=kind, prediction=prediction, predict_x0=predict_x0, lower_order_final=False
    )
    # upstream's third order takes half of the second derivative (below), and is a better second order
    assert order(build, FLOW if predict_x0 else DIFFUSION) == pytest.approx(min(p, 2), abs=0.3)


@pytest.mark.parametrize("predict_x0", [True, False])
def test_dpm_solver_3_lacks_half_a_bend(predict_x0, monkeypatch):
    """The divided difference of three predictions is half their second derivative; taken twice, order 3 is reached."""
    from jdit.sampling import multistep

    moment = multistep._DPM._moment
    monkeypatch.setattr(multistep._DPM, "_moment", lambda s, k, z, scale: moment(s, k, z, scale) * (1 + (k == 3)))
    build = lambda g, kind: sampling.dpmpp(g, order=3, prediction=kind, predict_x0=predict_x0, lower_order_final=False)
    assert order(build, FLOW if predict_x0 else DIFFUSION) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("kind", [FLOW, DIFFUSION])
def test_first_order(kind):
    assert order(lambda g, prediction: sampling.ddim(g, prediction=prediction), kind) == pytest.approx(1, abs=0.1)
    if kind == FLOW:
        assert order(lambda g, _: sampling.euler(g), kind) == pytest.approx(1, abs=0.1)


def test_from_noise_the_warm_up_rules():
    """A whole run begins with a step of order 1, whose error of two orders stays."""
    build = lambda p: (
        lambda n: sampling.unipc(grid(FLOW, n), order=p, lower_order_final=False, disable_corrector=range(n))
    )
    mass, errors = np.linspace(0.05, 0.95, 19), []
    with jax.enable_x64(True):
        for n in COUNTS:
            table, levels = build(3)(n), grid(FLOW, n)
            start = mixture.quantile(mass, levels.alpha[0], levels.sigma[0])
            end = FINISH[FLOW](sampling.init(start, table), table, per_step(table))
            errors.append(np.linalg.norm(end - mixture.quantile(mass, levels.alpha[-1], levels.sigma[-1])))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


# Stochastic solvers: data N(MEAN, STD^2), of which every step is linear, so that the moments follow without drawing

MEAN, STD = 0.7, 0.4


def gaussian(prediction, mean):
    """The exact network of N(mean, STD^2); finite at pure noise."""

    def model(x, t, levels):
        alpha, sigma = levels
        clean = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)
        noise = (x - alpha * clean) / sigma
        return {"sample": clean, FLOW: noise - clean, DIFFUSION: alpha * noise - sigma * clean}[prediction]

    return model


def moments(table, prediction, start):
    """Mean and standard deviation of the last x, from those of the first: the means are followed, and beside them each
    independent piece of noise by itself."""
    n = table.steps
    pieces = np.eye(n + 2)
    model = gaussian(prediction, MEAN * pieces[0])

    @jax.jit
    def final(x, table, levels):
        def body(state, xs):
            row, at, z = xs
            return sampling.step(state, row, model(state.x, 0, at), z), None

        return jax.lax.scan(body, sampling.init(x, table), (table, levels, jnp.asarray(pieces[2:])))[0].x

    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, table)
        x = np.asarray(final(start[0] * pieces[0] + start[1] * pieces[1], arrays, per_step(table)))
    return x[0], np.linalg.norm(x[1:])


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "p,predict_x0,expected",
    [(1, True, 1), (2, True, 2), (1, False, 1), (2, False, 2), (3, True, 1)],  # 3 with upstream's sign
)
def test_sde_moments_converge(p, predict_x0, expected, kind):
    errors = []
    for n in (60, 120):
        levels = grid(DIFFUSION, n)
        table = sampling.dpmpp(levels, order=p, kind=kind, prediction="sample", predict_x0=predict_x0,
                               stochastic=True, lower_order_final=False)  # fmt: skip
        exact = [(a * MEAN, np.hypot(a * STD, s)) for a, s in zip(levels.alpha, levels.sigma)]
        mean, std = moments(table, "sample", exact[0])
        assert mean == pytest.approx(exact[-1][0], rel=1e-9)  # x0 predictions of the mean are the mean
        errors.append(abs(std - exact[-1][1]))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.25)


COG_DPM = {"_class_name": "CogVideoXDPMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
           "timestep_spacing": "trailing", "snr_shift_scale": 1.0}  # fmt: skip
SDE = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction", "algorithm_type":
       "sde-dpmsolver++", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # fmt: skip


@pytest.mark.parametrize("config", [COG_DPM, SDE], ids=["cogvideox dpm", "sde-dpmsolver++"])
def test_sampled_moments(config):
    """From pure noise to the data: the moments are those of the data, and drawn samples have them."""
    table = sampling.from_config(config, 200)
    mean, std = moments(table, DIFFUSION, (0.0, 1.0))
    assert mean == pytest.approx(MEAN, rel=1e-6) and std == pytest.approx(STD, rel=0.01)
    n = 20_000
    x = jax.random.normal(jax.random.key(0), (n,))
    solve = jax.jit(lambda x, key: sampling.solve(gaussian(DIFFUSION, MEAN), x, table, key=key,
                                                  per_step=per_step(table)))  # fmt: skip
    drawn = np.asarray(solve(x, jax.random.key(1)), np.float64)
    assert abs(drawn.mean() - mean) < 4 * std / np.sqrt(n)
    assert abs(drawn.std() - std) < 4 * std / np.sqrt(2 * n)


def test_consistency_sampling_is_for_another_network():
    """`stochastic_sampling` renoises x0. Given the mean of x0, as by a network that was not distilled, half of a
    Gaussian's variance is left: the fixed point of V = k^2 (alpha^2 V + sigma^2) as sigma goes to 0."""
    table = sampling.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, 200)
    mean, std = moments(table, FLOW, (0.0, 1.0))
    assert mean == pytest.approx(MEAN, rel=1e-6) and std == pytest.approx(STD / np.sqrt(2), rel=0.03)
