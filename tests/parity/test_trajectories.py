"""Hundreds of drawn scheduler configs: whole trajectories against diffusers' own step loops."""

import math

import numpy as np
import pytest

from jdit import sampling

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from util_schedulers import (  # noqa: E402, F401
    COG_DDIM,
    COG_DPM,
    DPM,
    EULER,
    SHAPE,
    UNIPC,
    error,
    exact_roots,
    noise,
    reference,
    run,
    same_timesteps,
)  # fmt: skip

pytestmark = pytest.mark.torch

drawn = settings(
    derandomize=True, deadline=None, database=None, max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
STEPS = st.one_of(st.integers(1, 16), st.integers(17, 100))


class Trained(list):
    __repr__ = lambda self: f"{len(self)} betas"


TRAINED = Trained(np.linspace(1e-4, 0.03, 200).tolist())
BETAS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "beta_end": 0.03, "num_train_timesteps": 500},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": TRAINED, "num_train_timesteps": 200},
]
SPACED = [{"timestep_spacing": s} for s in ("linspace", "leading", "trailing")]


@st.composite
def multistep(draw, name):
    """Configs of UniPC and DPM-Solver that say what no other field contradicts."""
    flow = draw(st.booleans())
    config = {"_class_name": name, "solver_order": draw(st.integers(1, 3)), "use_flow_sigmas": flow,
              "lower_order_final": draw(st.booleans()), **draw(st.sampled_from(BETAS))}  # fmt: skip
    final = draw(st.sampled_from(["zero", "sigma_min"]))
    if name == UNIPC:
        config |= {"solver_type": draw(st.sampled_from(["bh1", "bh2"])), "predict_x0": draw(st.booleans()),
                   "disable_corrector": draw(st.lists(st.integers(0, 20), max_size=4))}  # fmt: skip
        # noise extrapolated from a flow's first level, 1e-6 from pure noise, has no digit in float32 on either side
        clean = config["predict_x0"] = config["predict_x0"] or flow
    else:
        algorithm = draw(st.sampled_from(["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]))
        config |= {"solver_type": draw(st.sampled_from(["midpoint", "heun"])), "algorithm_type": algorithm,
                   "euler_at_final": draw(st.booleans())}  # fmt: skip
        clean = algorithm.endswith("++")
        if algorithm == "sde-dpmsolver":
            config["solver_order"] = min(config["solver_order"], 2)
    config["final_sigmas_type"] = final if clean else "sigma_min"
    kinds = ["epsilon", "v_prediction", "sample"] + ["flow_prediction"] * (flow and clean)
    config["prediction_type"] = draw(st.sampled_from(kinds))
    if flow:
        config["flow_shift"] = draw(st.sampled_from([0.5, 1.0, 3.0, 7.0]))
    else:
        spacings = SPACED + [{f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta")]
        config |= draw(st.sampled_from(spacings + [{"use_lu_lambdas": True}] * (name == DPM)))
        config["steps_offset"] = draw(st.integers(0, 1))
        config["rescale_betas_zero_snr"] = draw(st.booleans())
        if name == DPM:
            config["lambda_min_clipped"] = draw(st.sampled_from([-math.inf, -5.1]))
    if draw(st.integers(0, 4)) == 0:
        config |= {"thresholding": True, "dynamic_thresholding_ratio": draw(st.sampled_from([0.6, 0.995])),
                   "sample_max_value": draw(st.sampled_from([0.5, 1.0, 1.7]))}  # fmt: skip
    return config


@st.composite
def cogvideox(draw):
    config = {"_class_name": draw(st.sampled_from([COG_DDIM, COG_DPM])), **draw(st.sampled_from([{}, *BETAS])),
              **draw(st.sampled_from(SPACED)), "steps_offset": draw(st.integers(0, 3)),
              "snr_shift_scale": draw(st.sampled_from([1.0, 2.0, 3.0])), "set_alpha_to_one": draw(st.booleans()),
              "rescale_betas_zero_snr": draw(st.booleans())}  # fmt: skip
    kinds = ["v_prediction", "sample"] + ["epsilon"] * (not config["rescale_betas_zero_snr"])
    return {**config, "prediction_type": draw(st.sampled_from(kinds))}


@st.composite
def flow_euler(draw):
    """A config with its arguments: sigmas of our own are falling multiples of 1/997."""
    dynamic, stochastic = draw(st.booleans()), draw(st.booleans())
    config = {"_class_name": EULER, "use_dynamic_shifting": dynamic,
              "shift": draw(st.sampled_from([0.2, 0.5, 1.0, 1.58, 3.0, 4.03, 7.0])),
              "num_train_timesteps": draw(st.sampled_from([1000, 500])), "stochastic_sampling": stochastic,
              "time_shift_type": draw(st.sampled_from(["exponential", "linear"])),
              "shift_terminal": draw(st.sampled_from([None, None, 0.02, 0.1]))}  # fmt: skip
    config |= draw(st.sampled_from([{}, {}, *({f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta"))]))
    config["invert_sigmas"] = not stochastic and draw(st.booleans())
    sigmas = draw(st.none() | st.lists(st.integers(1, 997), min_size=2, max_size=30, unique=True))
    arguments = {"mu": draw(st.sampled_from([0.4, 1.15, 2.3])) if dynamic else None}
    if sigmas is not None:
        arguments["sigmas"] = np.sort(np.array(sigmas) / 997)[::-1].copy()
    return config, arguments


def compare(config, steps, **arguments):
    """Float64 throughout first, where only the formulas can differ; then in float32, as both are run. Whether the
    reference had finite numbers to compare with."""
    noises = noise(2, (steps + 1, *SHAPE))
    try:
        table = sampling.from_config(config, steps, **arguments)
    except ValueError as e:
        assert "the SDE form" in str(e)  # the reference takes the root of a negative number there
        return False
    begin = arguments.get("begin", 0)
    try:
        wide, scheduler = reference(config, steps, noise(), noises=noises, dtype=torch.float64, **arguments)
    except torch.linalg.LinAlgError:  # equal noise levels, which are the identity here
        wide, scheduler = np.array(np.nan), None
    if not np.isfinite(wide).all():
        return False
    same_timesteps(table, scheduler, begin)
    assert error(run(table, noise(), noises, wide=True), wide) <= 1e-10
    narrow, _ = reference(config, steps, noise(), noises=noises, **arguments)
    ours = run(table, noise(), noises)
    # in some configs (noise extrapolated from nearly pure noise) float32 itself has not got five digits: there both
    # loops are as far from the exact one
    assert error(ours, narrow) <= 2e-5 or error(ours, wide) <= 4 * error(narrow, wide)
    return True


@pytest.mark.parametrize("name", [UNIPC, DPM])
def test_multistep(name):
    @drawn
    @given(multistep(name), STEPS, st.integers(0, 3))
    def check(config, steps, late):
        assume(compare(config, steps, begin=steps // 3 if late == 0 else 0))

    check()


@drawn
@given(cogvideox(), STEPS, st.integers(0, 3))
def test_cogvideox(config, steps, late):
    assume(compare(config, steps, begin=steps // 3 if late == 0 else 0))


@drawn
@given(flow_euler(), STEPS)
def test_flow_euler(drawn_config, steps):
    config, arguments = drawn_config
    steps = len(arguments["sigmas"]) if "sigmas" in arguments else max(steps, 2)  # the terminal needs two
    assume(compare(config, steps, **arguments))


@pytest.mark.parametrize(
    "predictor",
    [
        {"_class_name": DPM, "solver_order": 1},
        {"_class_name": DPM, "solver_order": 3, "solver_type": "heun"},
        {"_class_name": DPM, "solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": UNIPC, "solver_order": 3},
    ],
    ids=str,
)
def test_solver_p(predictor):
    same = {"prediction_type": "v_prediction", "final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}
    config = {"_class_name": UNIPC, **same, "solver_p": {**same, **predictor}}
    for steps, begin in ((1, 0), (7, 0), (20, 5)):
        assert compare(config, steps, begin=begin)
        plain = run(sampling.from_config({**config, "solver_p": None}, steps), noise())
        assert steps == 1 or error(run(sampling.from_config(config, steps), noise()), plain) > 1e-4


def test_solver_p_of_cogvideox():
    same = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="solver_p"):
        sampling.from_config({"_class_name": UNIPC, **same, "solver_p": {"_class_name": COG_DPM, **same}}, 8)
    assert compare({"_class_name": UNIPC, **same, "solver_p": {"_class_name": COG_DDIM, **same}}, 8)
    with pytest.raises(ValueError, match="timesteps"):
        spaced = {**same, "timestep_spacing": "leading"}
        sampling.from_config({"_class_name": UNIPC, **same, "solver_p": {"_class_name": COG_DDIM, **spaced}}, 8)
