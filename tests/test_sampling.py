"""Solvers as tables: closed forms, the loop, and what is compiled when. Orders of convergence: test_orders."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdit import sampling
from jdit.sampling import sigmas as schedules

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
STOCHASTIC = {**EULER, "stochastic_sampling": True}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction",
    "flow_shift": 3.0, "solver_order": 3,
}  # fmt: skip
DIFFUSION = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "v_prediction", "solver_order": 3}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction", "solver_order": 3}
SDE = {**DPM, "algorithm_type": "sde-dpmsolver++", "solver_order": 2}
COG = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
       "timestep_spacing": "trailing"}  # fmt: skip
COG_DPM = {**COG, "_class_name": "CogVideoXDPMScheduler"}
NESTED = {**DIFFUSION, "solver_p": SDE}


def noise(seed=0, shape=(3, 4, 5)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(x, t, *row):
    return jnp.tanh(x + jnp.cos(t / 10)) - 0.2 * x


def assert_close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


# Closed forms


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize(
    "config,out",
    [
        (EULER, lambda x0, z, a, s: z - x0),
        ({**EULER, "invert_sigmas": True}, lambda x0, z, a, s: x0 - z),
        (UNIPC, lambda x0, z, a, s: z - x0),
        ({**UNIPC, "solver_type": "bh1", "disable_corrector": [1, 2]}, lambda x0, z, a, s: z - x0),
        ({**UNIPC, "prediction_type": "sample"}, lambda x0, z, a, s: x0),
        (DIFFUSION, lambda x0, z, a, s: a * z - s * x0),
        ({**DIFFUSION, "prediction_type": "epsilon", "predict_x0": False}, lambda x0, z, a, s: z),
        (DPM, lambda x0, z, a, s: a * z - s * x0),
        ({**DPM, "solver_type": "heun", "solver_order": 2}, lambda x0, z, a, s: a * z - s * x0),
        ({**COG, "timestep_spacing": "leading"}, lambda x0, z, a, s: a * z - s * x0),
        ({**DIFFUSION, "solver_p": DPM}, lambda x0, z, a, s: a * z - s * x0),
    ],
    ids=lambda c: None if callable(c) else "-".join(str(v) for v in list(c.values())[:3]),
)
def test_a_single_clean_sample_is_followed_exactly(config, out, steps):
    """If the data is one point x0, every solver stays on x = alpha x0 + sigma z, and ends in x0."""
    x0, z = noise(1).astype(np.float64), noise(2).astype(np.float64)
    table = sampling.from_config(config, steps)
    with jax.enable_x64(True):
        state = sampling.init(table.alpha[0] * x0 + table.sigma[0] * z, table)
        for i in range(steps):
            np.testing.assert_allclose(state.x, table.alpha[i] * x0 + table.sigma[i] * z, atol=1e-9)
            prediction = jnp.asarray(out(x0, z, table.alpha[i], table.sigma[i]))
            np.testing.assert_allclose(sampling.denoised(state, sampling.row(table, i), prediction), x0, atol=1e-7)
            state = sampling.step(state, sampling.row(table, i), prediction)
        np.testing.assert_allclose(state.x, x0, atol=1e-9)


def test_predictions_agree():
    """Noise, v, flow and x0 of one sample give the same x0 and the same noise."""
    from jdit.sampling.table import PREDICTIONS, to_noise, to_x0

    sigma = np.linspace(0.05, 0.95, 7)
    x0, z = noise(1, (7,)).astype(np.float64), noise(2, (7,)).astype(np.float64)
    alpha = 1 - sigma
    x = alpha * x0 + sigma * z
    scale = np.sqrt(alpha**2 + sigma**2)  # v belongs to variance-preserving levels
    outs = {"epsilon": z, "sample": x0, "flow_prediction": z - x0}
    for prediction in PREDICTIONS:
        a, s, y = (alpha / scale, sigma / scale, x / scale) if prediction == "v_prediction" else (alpha, sigma, x)
        out = outs.get(prediction, alpha / scale * z - sigma / scale * x0)
        for to, expected in ((to_x0, x0), (to_noise, z)):
            on_x, on_out = to(prediction, a, s)
            np.testing.assert_allclose(on_x * y + on_out * out, expected, rtol=1e-9, atol=1e-9)


# The loop


@pytest.mark.parametrize(
    "config",
    [EULER, STOCHASTIC, UNIPC, DIFFUSION, DPM, SDE, COG, COG_DPM, {**DPM, "thresholding": True}, NESTED],
    ids=["euler", "stochastic", "unipc", "vp", "dpm", "sde", "ddim", "cogvideox dpm", "threshold", "nested"],
)
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_scan_equals_host_loop(config, steps):
    table, x, key = sampling.from_config(config, steps), noise(), jax.random.key(3)
    rows = {"gain": np.linspace(0.5, 1, steps)}
    guided = lambda x, t, row: row["gain"] * model(x, t)
    progress = list(sampling.iterate(guided, x, table, key=key, per_step=rows))
    assert [p.index for p in progress] == list(range(steps)) and progress[0].steps == steps
    assert_close(sampling.solve(guided, x, table, key=key, per_step=rows), progress[-1].x, 1e-6)
    # the last step leads to noise level 0 and is x0; CogVideoX's may end before it, and solver_p has an x0 of its own
    if config not in (COG, COG_DPM, NESTED):
        assert_close(progress[-1].x0, progress[-1].x, 1e-6)


def test_iteration_can_be_stopped():
    calls = []
    table = sampling.from_config(UNIPC, 9)
    for progress in sampling.iterate(lambda x, t: calls.append(t) or model(x, t), noise(), table):
        if progress.index == 3:
            break
    assert len(calls) == 4


def test_parts_equal_the_whole():
    table, x = sampling.from_config(UNIPC, 11), noise()
    high, low = sampling.split(table, 875.0)
    assert high.steps + low.steps == 11 and min(high.timestep) >= 875 > max(low.timestep)
    seen = []
    state = sampling.run(model, sampling.init(x, table), high, on_step=lambda i, n: seen.append((i, n)), total=11)
    state = sampling.run(model, state, low, on_step=lambda i, n: seen.append((i, n)), total=11)
    assert_close(state.x, sampling.solve(model, x, table), 1e-6)
    jax.effects_barrier()
    assert seen == [(i, 11) for i in range(11)]


def test_changing_numbers_does_not_recompile():
    traces = []

    @jax.jit
    def generate(x, table, scale, key):
        traces.append(table)
        doubled = lambda x, t: model(x, t) + jnp.arange(x.shape[0]).reshape(-1, 1, 1)
        return sampling.solve(sampling.classifier_free(doubled, scale), x, table, key=key)

    outputs = []
    for config, arguments in (
        (UNIPC, {}),
        (UNIPC, {"shift": 5.0}),
        (UNIPC, {"sigmas": np.linspace(1, 0.1, 8)}),
        ({**UNIPC, "disable_corrector": [0], "solver_type": "bh1", "lower_order_final": False}, {}),
        ({**UNIPC, "use_dynamic_shifting": True}, {"mu": 1.3}),
    ):
        for scale, seed in ((2.0, 0), (3.0, 1)):
            table = sampling.from_config(config, 8, **arguments)
            outputs.append(generate(noise(), table, scale, jax.random.key(seed)))
    assert len(traces) == 1
    assert len({np.asarray(o).tobytes() for o in outputs}) == len(outputs)  # each of them had its effect


def test_solve_by_itself_is_traced_once():
    traces = []

    def network(x, t):
        traces.append(t)
        return model(x, t)

    for shift in (1.0, 3.0, 5.0):
        sampling.solve(network, noise(), sampling.from_config(UNIPC, 6, shift=shift), key=jax.random.key(int(shift)))
    assert len(traces) == 1
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None  # what it holds, perhaps weights, is not kept


def test_the_program_does_not_grow_with_steps():
    def size(config, steps):
        table = sampling.from_config(config, steps)
        return len(jax.jit(lambda x, t: sampling.solve(model, x, t)).lower(noise(), table).as_text().splitlines())

    for config in (EULER, UNIPC, DPM, COG_DPM, NESTED):
        assert size(config, 5) == size(config, 50)


def test_callbacks_are_compiled_out():
    table, seen = sampling.from_config(UNIPC, 6), []
    program = lambda on_step: jax.jit(lambda x: sampling.solve(model, x, table, on_step=on_step)).lower(noise())
    on_step = lambda i, n: seen.append((i, n))
    assert "callback" not in program(None).as_text()
    assert "callback" in program(on_step).as_text()
    jax.jit(lambda x: sampling.solve(model, x, table, on_step=on_step))(noise()).block_until_ready()
    jax.effects_barrier()
    assert seen == [(i, 6) for i in range(6)]


def test_a_preview_is_what_iteration_yields():
    table, x, seen = sampling.from_config(UNIPC, 5), noise(), []
    on_step = lambda i, n, x0: seen.append((i, n, x0))
    jax.jit(lambda x: sampling.solve(model, x, table, on_step=on_step, preview=True))(x).block_until_ready()
    jax.effects_barrier()
    progress = list(sampling.iterate(model, x, table))
    assert [s[:2] for s in seen] == [(p.index, p.steps) for p in progress]
    for (_, _, x0), p in zip(seen, progress):
        assert isinstance(x0, np.ndarray)
        assert_close(x0, p.x0, 1e-5)


def test_what_a_listener_raises_stops_the_run():
    table, seen = sampling.from_config(UNIPC, 30), []

    def on_step(i, n):
        seen.append(i)
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: sampling.solve(model, x, table, on_step=on_step))(noise()).block_until_ready()
        jax.effects_barrier()
    assert len(seen) < 30


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_eight_devices_equal_one():
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "sequence"))
    table, x, keys = sampling.from_config(STOCHASTIC, 6), noise(0, (4, 8, 3)), jax.random.split(jax.random.key(0), 4)
    seen = []
    solve = jax.jit(lambda x: sampling.solve(model, x, table, key=keys, on_step=lambda i, n: seen.append(i)))
    result = solve(jax.device_put(x, split))
    jax.effects_barrier()
    assert seen == list(range(6)) and result.sharding.is_equivalent_to(split, 3)
    assert_close(result, solve(x), 1e-6)


@pytest.mark.parametrize(
    "config", [EULER, STOCHASTIC, UNIPC, SDE, COG_DPM, {**SDE, "thresholding": True, "sample_max_value": 2.0}, NESTED],
    ids=["euler", "stochastic", "unipc", "sde", "cogvideox dpm", "threshold", "nested"],
)  # fmt: skip
def test_batch_equals_singles(config):
    table, x, keys = sampling.from_config(config, 7), noise(), jax.random.split(jax.random.key(0), 3)
    whole = sampling.solve(model, x, table, key=keys)
    for i in range(len(x)):
        assert_close(whole[i : i + 1], sampling.solve(model, x[i : i + 1], table, key=keys[i : i + 1]), 1e-6)
    assert_close(sampling.solve(model, x[::-1], table, key=keys[::-1])[::-1], whole, 1e-6)


def test_noise_comes_from_the_key():
    table, x = sampling.from_config(STOCHASTIC, 4), noise()
    run = lambda key: np.asarray(sampling.solve(model, x, table, key=key))
    assert (run(jax.random.key(1)) == run(jax.random.PRNGKey(1))).all()
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))
    # without a key the renoising is left out: what remains is a fraction of the prediction
    silent = sampling.solve(model, x, table._replace(noise=None))
    assert (run(None) == np.asarray(silent)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_state_is_float32(dtype):
    seen = []
    x = jnp.asarray(noise(), dtype)
    out = sampling.solve(lambda x, t: seen.append((x.dtype, t.dtype)) or model(x, t).astype(dtype), x,
                         sampling.from_config(UNIPC, 3))  # fmt: skip
    assert out.dtype == dtype and set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"))}


# Where a run begins


@pytest.mark.parametrize("config", [EULER, UNIPC], ids=["euler", "unipc"])
def test_beginning_late(config):
    whole, late = sampling.from_config(config, 10), sampling.from_config(config, 10, begin=4)
    assert late.steps == 6 and (late.sigma == whole.sigma[4:]).all() and (late.index == np.arange(6)).all()
    x0, z = noise(1), noise(2)
    expected = (1 - whole.sigma[4]) * x0 + whole.sigma[4] * z
    np.testing.assert_allclose(sampling.add_noise(x0, z, late), expected, rtol=1e-6, atol=1e-6)


def test_start_index():
    assert [sampling.start_index(20, s) for s in (1.0, 0.6, 0.5, 0.05)] == [0, 8, 10, 19]
    assert sampling.start_index(21, 0.7) == 6 and sampling.start_index(21, 0.7, whole=True) == 7
    for strength in (-0.1, 1.1, 0.0):
        with pytest.raises(ValueError, match="strength"):
            sampling.start_index(20, strength)


def test_other_solver():
    unipc = sampling.with_solver(EULER, "unipc")
    assert_close(sampling.from_config(unipc, 9).sigma, sampling.from_config(UNIPC, 9).sigma, 1e-12)
    back = sampling.with_solver(unipc, "euler")
    assert_close(sampling.from_config(back, 9).sigma, sampling.from_config(EULER, 9).sigma, 1e-12)
    assert sampling.with_solver(UNIPC, "unipc") == UNIPC
    dpm = sampling.with_solver(EULER, "dpmpp")
    assert dpm["use_flow_sigmas"] and dpm["flow_shift"] == 3.0 and sampling.from_config(dpm, 9).steps == 9
    same = sampling.with_solver({**DIFFUSION, "beta_schedule": "scaled_linear"}, "dpmpp")
    assert_close(sampling.from_config(same, 9).sigma,
                 sampling.from_config({**DIFFUSION, "beta_schedule": "scaled_linear"}, 9).sigma, 1e-12)  # fmt: skip
    assert sampling.with_solver(COG, "dpm") == COG_DPM and sampling.with_solver(COG_DPM, "ddim") == COG
    clipped, terminal = {**DPM, "lambda_min_clipped": -5.0}, {**EULER, "shift_terminal": 0.1}
    for config, solver in ((EULER, "ddim"), (STOCHASTIC, "unipc"), (DIFFUSION, "euler"), (COG, "unipc"), (COG, "pndm"),
                           (clipped, "unipc"), (terminal, "dpmpp"), (NESTED, "dpmpp")):  # fmt: skip
        with pytest.raises(ValueError, match=f"solver='{solver}'"):
            sampling.with_solver(config, solver)


# What is refused


@pytest.mark.parametrize(
    "config,arguments,words",
    [
        ({}, {}, "_class_name=None"),
        ({"_class_name": "PNDMScheduler"}, {}, "FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler"),
        ({**EULER, "warp": 1}, {}, "warp"),
        (EULER, {"steps": 0}, "steps=0"),
        (EULER, {"steps": 2.5}, "steps=2.5"),
        (EULER, {"begin": 5}, "begin=5"),
        (EULER, {"mu": 1.0}, "mu=1.0"),
        (EULER, {"shift": 0.0}, "shift=0.0"),
        (EULER, {"shift": -1}, "shift=-1"),
        ({**EULER, "shift": None}, {}, "shift=None"),
        (EULER, {"sigmas": [1.0, 0.5]}, "5 numbers"),
        (EULER, {"sigmas": [1.0, 0.5, 0.6, 0.2, 0.1]}, "must not rise"),
        (EULER, {"sigmas": [1.0, 0.5, np.nan, 0.2, 0.1]}, r"in \[0, 1\]"),
        ({**EULER, "use_dynamic_shifting": True}, {}, "mu is missing"),
        ({**EULER, "use_dynamic_shifting": True}, {"mu": 1.0, "shift": 2.0}, "shift=2.0 has no effect"),
        ({**EULER, "use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": -1.0}, "mu=-1.0"),
        ({**EULER, "time_shift_type": "cubic"}, {}, "time_shift_type='cubic'.*'exponential', 'linear'"),
        ({**EULER, "use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "use_karras_sigmas, use_beta_sigmas"),
        ({**STOCHASTIC, "invert_sigmas": True}, {}, "invert_sigmas"),
        ({**EULER, "num_train_timesteps": 0}, {}, "num_train_timesteps=0"),
        ({**UNIPC, "solver_type": "bh3"}, {}, "solver_type='bh3'.*'bh1', 'bh2'"),
        ({**UNIPC, "solver_order": 0}, {}, "solver_order=0"),
        ({**UNIPC, "solver_p": "DDIM"}, {}, "solver_p='DDIM': must be the config"),
        ({**UNIPC, "predict_x0": False}, {}, "predict_x0=False"),
        ({**UNIPC, "prediction_type": "score"}, {}, "prediction_type='score'.*'epsilon'"),
        ({**UNIPC, "use_flow_sigmas": False}, {}, "prediction_type='flow_prediction'"),
        ({**UNIPC, "final_sigmas_type": "one"}, {}, "final_sigmas_type='one'.*'sigma_min'"),
        ({**UNIPC, "timestep_spacing": "odd"}, {}, "timestep_spacing='odd'"),
        ({**UNIPC, "use_beta_sigmas": True}, {}, "use_beta_sigmas=True"),
        ({**DIFFUSION, "beta_schedule": "square"}, {}, "beta_schedule='square'.*scaled_linear"),
        ({**DIFFUSION, "trained_betas": [0.1]}, {}, "trained_betas has 1"),
        ({**DIFFUSION, "shift_terminal": 0.1}, {}, "shift_terminal=0.1"),
        (DIFFUSION, {"shift": 2.0}, "shift=2.0 has no effect"),
        (DIFFUSION, {"sigmas": np.linspace(1, 0.1, 5)}, "sigmas"),
        (DIFFUSION, {"steps": 1001}, "steps=1001"),
        ({**DIFFUSION, "thresholding": True, "dynamic_thresholding_ratio": 2}, {}, "dynamic_thresholding_ratio=2"),
        ({**DIFFUSION, "thresholding": True, "sample_max_value": 0}, {}, "sample_max_value=0"),
        ({**DIFFUSION, "solver_p": {**DPM, "timestep_spacing": "trailing"}}, {}, "solver_p: its timesteps"),
        ({**DIFFUSION, "solver_p": {**DPM, "solver_order": 0}}, {}, "solver_p: solver_order=0"),
        ({**DIFFUSION, "timestep_spacing": "leading", "steps_offset": 900}, {}, "steps_offset=900"),
        ({**DPM, "solver_order": 4}, {}, "solver_order=4.*from 1 to 3"),
        ({**SDE, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}, {}, "to 2"),
        ({**DPM, "algorithm_type": "dpm"}, {}, "algorithm_type='dpm'.*'sde-dpmsolver'"),
        ({**DPM, "algorithm_type": "dpmsolver"}, {}, "final_sigmas_type='zero'.*'sigma_min'"),
        ({**DPM, "solver_type": "euler"}, {}, "solver_type='euler'.*'heun'"),
        ({**DPM, "variance_type": "learned"}, {}, "variance_type='learned'"),
        ({**DPM, "use_karras_sigmas": True, "use_lu_lambdas": True}, {}, "use_karras_sigmas, use_lu_lambdas"),
        ({**DPM, "use_flow_sigmas": True, "use_beta_sigmas": True}, {}, "use_beta_sigmas=True"),
        ({**DPM, "use_flow_sigmas": True, "use_dynamic_shifting": True}, {}, "mu is missing"),
        ({**DPM, "lambda_min_clipped": 50}, {}, "lambda_min_clipped=50"),
        (DPM, {"sigmas": np.linspace(1, 0.1, 5)}, "takes no sigmas"),
        (COG, {"sigmas": np.linspace(1, 0.1, 5)}, "take no sigmas"),
        (COG, {"shift": 2.0}, "shift=2.0 has no effect"),
        (COG, {"mu": 2.0}, "mu=2.0 has no effect"),
        ({**COG, "prediction_type": "epsilon"}, {}, "prediction_type='epsilon'.*rescale_betas_zero_snr"),
        ({**COG, "prediction_type": "flow_prediction"}, {}, "prediction_type='flow_prediction'"),
        ({**COG, "snr_shift_scale": 0}, {}, "snr_shift_scale=0"),
        ({**COG, "timestep_spacing": "odd"}, {}, "timestep_spacing='odd'"),
        (COG, {"steps": 1001}, "steps=1001"),
        (None, {}, "mapping with _class_name"),
        (EULER, {"steps": None}, "steps=None"),
        (EULER, {"steps": float("inf")}, "steps=inf"),
        (EULER, {"begin": 1.5}, "begin=1.5"),
        (EULER, {"shift": float("nan")}, "shift=nan"),
        ({**EULER, "use_dynamic_shifting": True}, {"mu": "1"}, "mu='1'"),
        ({**EULER, "use_dynamic_shifting": True}, {"mu": 800}, "mu=800"),
        ({**EULER, "shift_terminal": 1.5}, {}, "shift_terminal=1.5"),
        ({**UNIPC, "use_flow_sigmas": "false"}, {}, "use_flow_sigmas='false'"),
        ({**UNIPC, "disable_corrector": ["a"]}, {}, "disable_corrector"),
        ({**DIFFUSION, "use_karras_sigmas": True, "sigma_min": -1}, {}, "sigma_min=-1"),
        ({**DIFFUSION, "beta_start": None}, {}, "beta_start=None"),
        ({**DIFFUSION, "beta_end": 5.0}, {}, "beta_end=5.0"),
        ({**DPM, "algorithm_type": "deis"}, {}, "final_sigmas_type='zero'"),
        ({**DPM, "lambda_min_clipped": 0.0, "timestep_spacing": "trailing"}, {"steps": 20, "begin": 19}, "begin=19"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_refused(config, arguments, words):
    with pytest.raises(ValueError, match=words):
        sampling.from_config(config, **{"steps": 5, **arguments})


def test_numpy_numbers_are_numbers():
    table = sampling.from_config({**EULER, "num_train_timesteps": np.int64(1000)}, np.int64(9), shift=np.float64(2.7))
    plain = sampling.from_config(EULER, 9, shift=2.7)
    assert (table.timestep == plain.timestep).all() and (table.sigma == plain.sigma).all()


def test_fields_of_other_schedulers_are_ignored():
    config = {**UNIPC, "shift": 9.0, "clip_sample": False, "_diffusers_version": "0.42.1"}
    assert (sampling.from_config(config, 5).sigma == sampling.from_config(UNIPC, 5).sigma).all()


def test_per_step_must_have_a_row_a_step():
    with pytest.raises(ValueError, match="5 steps"):
        sampling.solve(lambda x, t, row: model(x, t), noise(), sampling.from_config(EULER, 5), per_step=np.zeros(4))
    with pytest.raises(ValueError, match="3 samples"):
        sampling.solve(model, noise(), sampling.from_config(STOCHASTIC, 5), key=jax.random.split(jax.random.key(0), 2))


def test_spacings_keep_their_ends():
    for spacing in schedules.SPACINGS.values():
        found = spacing(0.9, 0.1, 7)
        np.testing.assert_allclose(found[[0, -1]], [0.9, 0.1], rtol=1e-7)
        assert (np.diff(found) < 0).all()
