"""What each scheduler class of diffusers does with the fields of its config: levels, timesteps, solver.

Facts and defaults: diffusers 0.42, scheduling_flow_match_euler_discrete.py, scheduling_unipc_multistep.py,
scheduling_dpmsolver_multistep.py, scheduling_ddim_cogvideox.py and scheduling_dpm_cogvideox.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jdit.sampling import multistep, solvers
from jdit.sampling import sigmas as schedules
from jdit.sampling.table import PREDICTIONS, Grid, Table

Fields = dict[str, Any]

_BETAS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "rescale_betas_zero_snr": False, "steps_offset": 0, "prediction_type": "epsilon",
    "sample_max_value": 1.0,
}  # fmt: skip
# of the three spacings; in the signature of UniPC alone, yet read wherever a config has them
_ENDS = {"sigma_min": None, "sigma_max": None}
_FLOW_EULER = {
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "time_shift_type": "exponential", "stochastic_sampling": False, **_ENDS,
}  # fmt: skip
_MULTISTEP = {
    **_BETAS, "solver_order": 2, "thresholding": False, "dynamic_thresholding_ratio": 0.995, "lower_order_final": True,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_flow_sigmas": False,
    "flow_shift": 1.0, "timestep_spacing": "linspace", "final_sigmas_type": "zero", "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}  # fmt: skip
_UNIPC = {
    **_MULTISTEP, "predict_x0": True, "solver_type": "bh2", "disable_corrector": (), "solver_p": None,
    "shift_terminal": None, **_ENDS,
}  # fmt: skip
_DPM = {
    **_MULTISTEP, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False,
    "use_lu_lambdas": False, "lambda_min_clipped": -math.inf, "variance_type": None, **_ENDS,
}  # fmt: skip
# clip_sample, its range and sample_max_value are stored there, and never read
_COGVIDEOX = {
    **_BETAS, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": True,
    "clip_sample_range": 1.0, "set_alpha_to_one": True, "timestep_spacing": "leading", "snr_shift_scale": 3.0,
}  # fmt: skip
SPACINGS = ("linspace", "leading", "trailing")
ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")


def one_of(fields: Mapping[str, Any], field: str, allowed: Sequence[Any]) -> Any:
    if fields[field] not in allowed:
        raise ValueError(f"{field}={fields[field]!r} is not supported; supported: {', '.join(map(repr, allowed))}")
    return fields[field]


def _shifted(fields: Mapping[str, Any], sigmas: Float[np.ndarray, "S"], shift: float, mu: float | None):
    if mu is not None:
        sigmas = schedules.dynamic_shift(sigmas, mu, fields["time_shift_type"])
    else:
        sigmas = schedules.static_shift(sigmas, shift)
    return schedules.stretch_to(sigmas, fields["shift_terminal"]) if fields["shift_terminal"] else sigmas


def _flow_match_euler(fields: Fields, steps: int, mu: float | None, sigmas, begin: int) -> Table:
    if fields["stochastic_sampling"] and fields["invert_sigmas"]:
        raise ValueError("stochastic_sampling=True and invert_sigmas=True contradict each other")
    n, shift = fields["num_train_timesteps"], fields["shift"]
    if sigmas is None:
        # the ends are training sigmas, shifted once already; the shift below is a second one, as in the reference
        ends = np.array([n, 1], np.float32) / np.float32(n)
        ends = ends if fields["use_dynamic_shifting"] else schedules.static_shift(ends, shift)
        sigmas = np.linspace(float(ends[0]) * n, float(ends[1]) * n, steps) / n
    else:
        sigmas = sigmas.astype(np.float32)
    sigmas = _shifted(fields, sigmas, shift, mu)
    for flag, spacing in schedules.SPACINGS.items():
        if fields.get(flag):
            first, last = (float(end) if given is None else given for end, given in
                           ((sigmas[0], fields["sigma_max"]), (sigmas[-1], fields["sigma_min"])))  # fmt: skip
            if not last > 0:
                raise ValueError(f"{flag}=True needs a last sigma above 0")
            sigmas = spacing(first, last, steps)
    sigmas, final = np.asarray(sigmas, np.float32), 0.0
    if fields["invert_sigmas"]:
        sigmas, final = np.float32(1) - sigmas, 1.0
    grid = schedules.flow_grid(np.append(sigmas, final), sigmas * np.float32(n), inverted=fields["invert_sigmas"])
    if not fields["invert_sigmas"]:
        return solvers.euler(grid, begin=begin, stochastic=fields["stochastic_sampling"])
    # the velocity of these models points from noise to sample
    table = solvers.euler(grid, begin=begin)
    return table._replace(m_out=-table.m_out, x0_out=-table.x0_out)


def _order(fields: Fields, most: float = math.inf) -> int:
    order = fields["solver_order"]
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= most:
        ends = "at least 1" if math.isinf(most) else f"from 1 to {most}"
        raise ValueError(f"solver_order={order!r}: must be a whole number, {ends}")
    return order


def _prediction(fields: Fields) -> str:
    prediction = one_of(fields, "prediction_type", PREDICTIONS)
    if prediction == "flow_prediction" and not fields["use_flow_sigmas"]:
        raise ValueError("prediction_type='flow_prediction' is not supported with use_flow_sigmas=False")
    return prediction


def _threshold(fields: Fields) -> tuple[float, float] | None:
    ratio, most = fields["dynamic_thresholding_ratio"], fields["sample_max_value"]
    if not fields["thresholding"]:
        return None
    if not 0 <= ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio={ratio}: must lie in [0, 1]")
    if not most > 0:
        raise ValueError(f"sample_max_value={most}: must be positive")
    return ratio, most


def _unipc(fields: Fields, steps: int, mu: float | None, sigmas, begin: int) -> Table:
    one_of(fields, "timestep_spacing", SPACINGS)  # has no effect on flow sigmas
    one_of(fields, "final_sigmas_type", ("zero", "sigma_min"))
    prediction = _prediction(fields)
    if prediction == "flow_prediction" and not fields["predict_x0"]:
        raise ValueError("predict_x0=False is not supported with prediction_type='flow_prediction'")
    # solver types of DPM-Solver, left from an exchanged scheduler, mean bh2
    variant = one_of(fields, "solver_type", ("bh1", "bh2", "midpoint", "heun", "logrho"))
    return multistep.unipc(
        (_flow_grid if fields["use_flow_sigmas"] else _diffusion_grid)(fields, steps, mu, sigmas),
        order=_order(fields),
        variant="bh1" if variant == "bh1" else "bh2",
        prediction=prediction,
        predict_x0=bool(fields["predict_x0"]),
        lower_order_final=bool(fields["lower_order_final"]),
        disable_corrector=tuple(fields["disable_corrector"] or ()),
        threshold=_threshold(fields),
        begin=begin,
    )


def _dpmpp(fields: Fields, steps: int, mu: float | None, sigmas, begin: int) -> Table:
    if sigmas is not None:
        raise ValueError("DPMSolverMultistepScheduler takes no sigmas: its levels follow from the config")
    one_of(fields, "timestep_spacing", SPACINGS)
    one_of(fields, "variance_type", (None,))
    prediction = _prediction(fields)
    algorithm = one_of(fields, "algorithm_type", (*ALGORITHMS, "deis"))
    finals = ("zero", "sigma_min") if algorithm.endswith("++") else ("sigma_min",)
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm  # left from an exchanged scheduler
    predict_x0, stochastic = algorithm.endswith("++"), algorithm.startswith("sde")
    final = one_of(fields, "final_sigmas_type", finals)
    if prediction == "flow_prediction" and not predict_x0:
        raise ValueError(f"algorithm_type={algorithm!r} is not supported with prediction_type='flow_prediction'")
    kind = one_of(fields, "solver_type", ("midpoint", "heun", "logrho", "bh1", "bh2"))
    return multistep.dpmpp(
        (_dpm_flow_grid if fields["use_flow_sigmas"] else _diffusion_grid)(fields, steps, mu, sigmas),
        order=_order(fields, 2 if stochastic and not predict_x0 else 3),
        kind="heun" if kind == "heun" else "midpoint",
        prediction=prediction,
        predict_x0=predict_x0,
        stochastic=stochastic,
        lower_order_final=bool(fields["lower_order_final"]),
        euler_at_final=bool(fields["euler_at_final"]) or final == "zero",
        threshold=_threshold(fields),
        begin=begin,
    )


def _cogvideox(fields: Fields, steps: int, mu: float | None, sigmas, begin: int, *, stochastic: bool) -> Table:
    if sigmas is not None:
        raise ValueError("CogVideoX's schedulers take no sigmas: their levels follow from the config")
    prediction = one_of(fields, "prediction_type", ("epsilon", "v_prediction", "sample"))
    n, scale = fields["num_train_timesteps"], fields["snr_shift_scale"]
    if not scale > 0:
        raise ValueError(f"snr_shift_scale={scale}: must be positive")
    zero = bool(fields["rescale_betas_zero_snr"])
    bar = schedules.shifted_levels(_betas(fields, wide=True), scale, zero_snr=zero).astype(np.float64)
    spacing = one_of(fields, "timestep_spacing", SPACINGS)
    timesteps = schedules.spaced_timesteps(spacing, n, steps, fields["steps_offset"], to_zero=True)
    visited = timesteps.astype(int)
    if prediction == "epsilon" and (bar[visited[begin:]] == 0).any():
        raise ValueError("prediction_type='epsilon' says nothing of pure noise (rescale_betas_zero_snr=True)")
    # counted from the timestep, not the next one of the run: with 1000 / 30 steps the two differ by one now and then
    following = visited - n // steps
    after = np.where(following >= 0, bar[following], 1.0 if fields["set_alpha_to_one"] else bar[0])
    levels = np.append(bar[visited], after[-1])
    grid = Grid(np.sqrt(levels), np.sqrt(1 - levels), timesteps.astype(np.float32))
    target = np.sqrt(after), np.sqrt(1 - after)
    if not stochastic:
        return solvers.ddim(grid, prediction=prediction, target=target, begin=begin)
    # SDE-DPM-Solver++(2M): the first step, which may come from pure noise, and those to the end are of order 1
    orders = np.where(following >= 0, 2, 1).tolist()
    return multistep.dpmpp(grid, orders=orders, prediction=prediction, stochastic=True, target=target, begin=begin)


def _flow_grid(fields: Fields, steps: int, mu: float | None, sigmas) -> Grid:
    n, tiny = fields["num_train_timesteps"], 1e-6
    for field in ("use_exponential_sigmas", "use_beta_sigmas"):
        if fields[field]:
            raise ValueError(f"{field}=True is not supported with use_flow_sigmas=True")
    if fields["use_karras_sigmas"]:  # spaced over the beta schedule's range; no shift takes part
        if sigmas is not None or fields["use_dynamic_shifting"] or fields["shift_terminal"]:
            raise ValueError("use_karras_sigmas=True takes no sigmas, use_dynamic_shifting or shift_terminal")
        sigmas = _respaced(fields, schedules.karras, _training_sigmas(fields), steps)
        sigmas = sigmas / (sigmas + 1)
    else:
        sigmas = np.linspace(1, 1 / n, steps + 1)[:-1] if sigmas is None else sigmas
        sigmas = np.array(_shifted(fields, sigmas, fields["flow_shift"], mu))
        if math.fabs(sigmas[0] - 1) < tiny:
            sigmas[0] -= tiny  # the log-SNR stays finite
    last = sigmas[-1] if fields["final_sigmas_type"] == "sigma_min" else 0.0
    # timesteps are cut to whole numbers, and before the sigmas are rounded
    return schedules.flow_grid(np.append(sigmas, last), np.trunc(sigmas * n))


def _dpm_flow_grid(fields: Fields, steps: int, mu: float | None, sigmas) -> Grid:
    for field in schedules.SPACINGS:
        if fields[field]:
            raise ValueError(f"{field}=True is not supported with use_flow_sigmas=True")
    if mu is not None:
        one_of(fields, "time_shift_type", ("exponential",))
    n, shift = fields["num_train_timesteps"], fields["flow_shift"] if mu is None else math.exp(mu)
    sigmas = schedules.static_shift(1 - np.linspace(1, 1 / n, steps + 1), shift)[:0:-1]
    last = _training_sigmas(fields)[0] if fields["final_sigmas_type"] == "sigma_min" else 0.0
    return schedules.flow_grid(np.append(sigmas, last), np.trunc(sigmas * n))


def _diffusion_grid(fields: Fields, steps: int, mu: float | None, sigmas) -> Grid:
    for field in ("use_dynamic_shifting", "shift_terminal"):
        if fields.get(field):
            raise ValueError(f"{field}={fields[field]} is not supported with use_flow_sigmas=False")
    if sigmas is not None:
        raise ValueError("sigmas may be given only with use_flow_sigmas=True")
    training = _training_sigmas(fields)
    n, spacing = (
        fields["num_train_timesteps"],
        next((f for flag, f in schedules.SPACINGS.items() if fields.get(flag)), None),
    )
    dpm, smallest = "lambda_min_clipped" in fields, training[0]
    if spacing is None:
        last = n - _clipped(fields, training) if dpm else n
        kind = fields["timestep_spacing"]
        timesteps = schedules.spaced_timesteps(kind, n, steps, fields["steps_offset"], last=last)
        levels = np.interp(timesteps, np.arange(n), training)
    else:
        levels = _respaced(fields, spacing, training, steps)
        timesteps = schedules.timestep_of(levels, training)
        whole = spacing in (schedules.karras, schedules.uniform_log_snr)
        if whole and not (dpm and fields["beta_schedule"] == "squaredcos_cap_v2"):
            timesteps = np.round(timesteps)
        timesteps, smallest = np.trunc(timesteps), smallest if dpm else levels[-1]
    last = smallest if fields["final_sigmas_type"] == "sigma_min" else 0.0
    return schedules.diffusion_grid(np.append(levels, last), timesteps)


def _clipped(fields: Fields, training: Float[np.ndarray, "T"]) -> int:
    """How many training steps have a log-SNR below `lambda_min_clipped`."""
    least = float(fields["lambda_min_clipped"])
    if math.isinf(least) and least < 0:
        return 0
    bar = (1 / (1 + training.astype(np.float64) ** 2)).astype(np.float32)
    lam = np.log(np.sqrt(bar)) - np.log(np.sqrt(1 - bar))
    count = int(np.searchsorted(lam[::-1], np.float32(least)))
    if count == len(lam):
        raise ValueError(f"lambda_min_clipped={least} leaves no training step")
    return count


def _betas(fields: Fields, *, wide: bool = False) -> Float[np.ndarray, "T"]:
    n, trained = fields["num_train_timesteps"], fields["trained_betas"]
    for field in ("beta_start", "beta_end"):
        if not 0 < fields[field] < 1:
            raise ValueError(f"{field}={fields[field]}: must lie between 0 and 1")
    if trained is None:
        return schedules.betas(fields["beta_schedule"], fields["beta_start"], fields["beta_end"], n, wide=wide)
    if np.ndim(trained) != 1 or len(trained) != n:
        raise ValueError(f"trained_betas has {np.size(trained)} entries, num_train_timesteps={n}")
    return np.asarray(trained, np.float32)


def _training_sigmas(fields: Fields) -> Float[np.ndarray, "T"]:
    return schedules.training_sigmas(_betas(fields), zero_snr=bool(fields["rescale_betas_zero_snr"]))


def _respaced(fields: Fields, spacing, training: Float[np.ndarray, "T"], steps: int) -> Float[np.ndarray, "S"]:
    own = spacing is not schedules.uniform_log_snr  # it does not read the two fields
    ends = [fields[f] if own and fields[f] is not None else float(end) for f, end in
            (("sigma_max", training[-1]), ("sigma_min", training[0]))]  # fmt: skip
    return spacing(*ends, steps)


class Scheduler(NamedTuple):
    """A scheduler class: its fields with their defaults, and (fields, steps, mu, sigmas, begin) -> table."""

    defaults: Fields
    build: Callable[[Fields, int, float | None, Any, int], Table]


SCHEDULERS: dict[str, Scheduler] = {
    "FlowMatchEulerDiscreteScheduler": Scheduler(_FLOW_EULER, _flow_match_euler),
    "UniPCMultistepScheduler": Scheduler(_UNIPC, _unipc),
    "DPMSolverMultistepScheduler": Scheduler(_DPM, _dpmpp),
    "CogVideoXDDIMScheduler": Scheduler(_COGVIDEOX, partial(_cogvideox, stochastic=False)),
    "CogVideoXDPMScheduler": Scheduler(_COGVIDEOX, partial(_cogvideox, stochastic=True)),
}
