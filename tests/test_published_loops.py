"""The figures that diffusers publishes for its schedulers' full loops (tests/schedulers/test_scheduler_unipc.py and
test_scheduler_dpm_multi.py), from the same sample and the same stand-in for a network. No torch."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdit import sampling

UNIPC = {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2"}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "lower_order_final": False}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}
COMMON = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
          "solver_order": 2, "final_sigmas_type": "sigma_min"}  # fmt: skip
V = {"prediction_type": "v_prediction"}
KARRAS, LU = {"use_karras_sigmas": True}, {"use_lu_lambdas": True}
WIDE, THIN = (4, 3, 8, 8), (4, 3, 8)  # upstream runs each on pictures and on rows


def samples(shape):
    """Upstream's sample and noise: numbers counted up and down, the batch varying fastest."""
    up = np.arange(np.prod(shape), dtype=np.float32)
    lay = lambda a: np.moveaxis((a / len(up)).reshape(*shape[1:], shape[0]), -1, 0)
    return lay(up), lay(up[::-1])


def model(x, t):
    return x * t / (t + 1)


@pytest.mark.parametrize(
    "config,shape,mean",
    [
        (UNIPC, WIDE, 0.2464),
        ({**UNIPC, **KARRAS}, WIDE, 0.2925),
        ({**UNIPC, **V}, WIDE, 0.1014),
        ({**UNIPC, **V, **KARRAS}, WIDE, 0.1966),
        (UNIPC, THIN, 0.2441),
        ({**UNIPC, **KARRAS}, THIN, 0.2898),
        ({**UNIPC, **V}, THIN, 0.1014),
        ({**UNIPC, **V, **KARRAS}, THIN, 0.1944),
        (DPM, WIDE, 0.3301),
        ({**DPM, **V}, WIDE, 0.2251),
        ({**DPM, **V, **KARRAS}, WIDE, 0.2096),
        ({**DPM, **V, **LU}, WIDE, 0.1554),
        ({**DPM, **THRESHOLD}, WIDE, 1.1364),
    ],
    ids=str,
)
def test_ten_steps(config, shape, mean):
    x, _ = samples(shape)
    out = sampling.solve(model, x, sampling.from_config({**COMMON, **config}, 10))
    assert float(jnp.abs(out).mean()) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    "config,shape,begin,total,mean",
    [(UNIPC, WIDE, 8, 315.5757, 0.4109), (UNIPC, THIN, 8, 39.0870, 0.4072), (DPM, WIDE, 5, 318.4111, 0.4146)],
    ids=str,
)
def test_from_a_noised_sample(config, shape, begin, total, mean):
    x, noise = samples(shape)
    table = sampling.from_config({**COMMON, **config}, 10, begin=begin)
    out = jnp.abs(sampling.solve(model, sampling.add_noise(x, noise, table), table))
    assert float(out.sum()) == pytest.approx(total, abs=1e-2)
    assert float(out.mean()) == pytest.approx(mean, abs=1e-3)


def test_flow_and_karras_sigmas():
    config = {"_class_name": "UniPCMultistepScheduler", "sigma_min": 0.01, "sigma_max": 200.0, "use_flow_sigmas": True,
              "use_karras_sigmas": True, "num_train_timesteps": 1000}  # fmt: skip
    expected = [0.9950248599052429, 0.9787454605102539, 0.8774884343147278, 0.3604971766471863, 0.009900986216962337]
    table = sampling.from_config(config, 5)
    np.testing.assert_allclose(table.sigma, expected, rtol=1e-6)
    assert table.timestep.tolist() == [int(np.float32(s) * 1000) for s in expected]
