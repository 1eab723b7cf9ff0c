"""Scheduler configs of diffusers -> solver tables.

Facts and defaults: diffusers 0.42, scheduling_flow_match_euler_discrete.py and scheduling_unipc_multistep.py.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jdit.sampling import sigmas as schedules
from jdit.sampling import solvers
from jdit.sampling.table import PREDICTIONS, Grid, Table

log = logging.getLogger("jdit")

_FLOW_EULER = {
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "time_shift_type": "exponential", "stochastic_sampling": False,
}  # fmt: skip
_UNIPC = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "solver_order": 2, "prediction_type": "epsilon", "thresholding": False,
    "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "predict_x0": True, "solver_type": "bh2",
    "lower_order_final": True, "disable_corrector": (), "solver_p": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_flow_sigmas": False, "flow_shift": 1.0,
    "timestep_spacing": "linspace", "steps_offset": 0, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False, "time_shift_type": "exponential", "sigma_min": None, "sigma_max": None,
    "shift_terminal": None,
}  # fmt: skip
# left behind in a config when a pipeline's scheduler was exchanged; the class in charge never reads them
_FOREIGN = {
    "clip_sample", "clip_sample_range", "set_alpha_to_one", "skip_prk_steps", "interpolation_type", "algorithm_type",
    "euler_at_final", "use_lu_lambdas", "lambda_min_clipped", "variance_type", "snr_shift_scale", "timestep_type",
}  # fmt: skip


def from_config(
    config: Mapping[str, Any],
    steps: int,
    *,
    mu: float | None = None,
    sigmas: Sequence[float] | np.ndarray | None = None,
    shift: float | None = None,
    begin: int = 0,
) -> Table:
    """The table of a diffusers scheduler_config.json.

    Args:
        config: its contents; `_class_name` chooses the solver, absent fields take the defaults of that class.
        steps: number of steps of the whole schedule.
        mu: resolution-dependent shift, needed by (and only allowed with) `use_dynamic_shifting`; see `dynamic_mu`.
        sigmas: `steps` noise levels instead of the default ones, before any shift and without the final one.
        shift: replaces the config's `shift` or `flow_shift`.
        begin: the first step to run (`start_index`); the table has steps - begin rows.

    Raises:
        ValueError: a class, a field or a value that is not supported (named), or arguments that contradict it.
    """
    name, fields = _read(config)
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps={steps}: must be a whole number, at least 1")
    steps = int(steps)
    if not 0 <= begin < steps:
        raise ValueError(f"begin={begin}: must be from 0 to {steps - 1} with {steps} steps")
    if fields["use_dynamic_shifting"]:
        if mu is None:
            raise ValueError("mu is missing: the config has use_dynamic_shifting=True (dynamic_mu computes it)")
        if shift is not None:
            raise ValueError(f"shift={shift} has no effect with use_dynamic_shifting=True: give mu")
    elif mu is not None:
        raise ValueError(f"mu={mu} has no effect with use_dynamic_shifting=False: give shift")
    shift_field = "shift" if "shift" in fields else "flow_shift"
    if shift is not None:
        fields[shift_field] = shift
        if not fields.get("use_flow_sigmas", True) or ("flow_shift" in fields and fields["use_karras_sigmas"]):
            raise ValueError(f"shift={shift} has no effect: the config's sigmas are no shifted flow schedule")
    if not (isinstance(fields[shift_field], (int, float)) and fields[shift_field] > 0):
        raise ValueError(f"{shift_field}={fields[shift_field]!r}: must be a positive number")
    if sigmas is not None:
        sigmas = np.asarray(sigmas)  # float32 stays so: the reference's rounding depends on it
        sigmas = sigmas if sigmas.dtype == np.float32 else sigmas.astype(np.float64)
        if sigmas.shape != (steps,):
            raise ValueError(f"sigmas has shape {sigmas.shape}: {steps} steps need {steps} numbers")
    return _BUILDERS[name][1](fields, steps, mu, sigmas, begin)


def with_solver(config: Mapping[str, Any], solver: str) -> dict[str, Any]:
    """The same flow schedule under another solver: "euler" or "unipc" (order 2, bh2).

    Raises:
        ValueError: an unknown solver, or a schedule that the other solver cannot run.
    """
    classes = {"euler": "FlowMatchEulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler"}
    if solver not in classes:
        raise ValueError(f"solver={solver!r} is unknown; there are {', '.join(classes)}")
    name, fields = _read(config)
    if name == classes[solver]:
        return dict(config)
    if not fields.get("use_flow_sigmas", True):
        raise ValueError(f"solver={solver!r} needs a flow schedule; the config has use_flow_sigmas=False")
    for field in ("invert_sigmas", "stochastic_sampling", *schedules.SPACINGS):
        if fields.get(field):
            raise ValueError(f"solver={solver!r} does not go with the config's {field}=True")
    shared = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
    kept = {field: fields[field] for field in shared}
    if solver == "euler":
        if fields["prediction_type"] != "flow_prediction":
            raise ValueError(f"solver='euler' does not go with prediction_type={fields['prediction_type']!r}")
        return {"_class_name": classes[solver], **kept, "shift": fields["flow_shift"]}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": fields["shift"]}
    ends = {f: fields[f] for f in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")}
    return {"_class_name": classes[solver], **kept, **flow, **ends}


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """mu for an image of that many tokens: linear between the config's two sequence lengths and their shifts, as the
    pipelines of SD3, Flux and Qwen-Image compute it."""
    c = {**_FLOW_EULER, **{k: v for k, v in config.items() if v is not None}}
    slope = (c["max_shift"] - c["base_shift"]) / (c["max_image_seq_len"] - c["base_image_seq_len"])
    return tokens * slope + c["base_shift"] - slope * c["base_image_seq_len"]


def start_index(steps: int, strength: float) -> int:
    """The step at which image-to-image begins: strength 1 runs all of them, 0.3 the last third or so.

    Raises:
        ValueError: strength outside [0, 1], or so small that no step is left.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: must lie in [0, 1]")
    begin = int(max(steps - min(steps * strength, steps), 0))
    if begin >= steps:
        raise ValueError(f"strength={strength} leaves none of the {steps} steps to run")
    return begin


def _read(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name = config.get("_class_name")
    if name not in _BUILDERS:
        raise ValueError(f"_class_name={name!r} is not supported; supported: {', '.join(_BUILDERS)}")
    defaults = _BUILDERS[name][0]
    others = _FOREIGN.union(*(d for d, _ in _BUILDERS.values())) - set(defaults)
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    unread = sorted(set(given) & others)
    if unread:
        log.info("%s does not read %s", name, ", ".join(unread))
    unknown = sorted(set(given) - set(defaults) - others)
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}; its fields: {', '.join(sorted(defaults))}")
    fields = {**defaults, **{k: v for k, v in given.items() if k in defaults}}
    n = fields["num_train_timesteps"]
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_train_timesteps={n!r}: must be a whole number, at least 1")
    _one_of(fields, "time_shift_type", schedules.SHIFTS)
    spacings = [k for k in schedules.SPACINGS if fields[k]]
    if len(spacings) > 1:
        raise ValueError(f"{', '.join(spacings)} contradict each other: one at most may be true")
    return name, fields


def _one_of(fields: Mapping[str, Any], field: str, allowed: Sequence[Any]) -> Any:
    if fields[field] not in allowed:
        raise ValueError(f"{field}={fields[field]!r} is not supported; supported: {', '.join(map(repr, allowed))}")
    return fields[field]


def _shifted(fields: Mapping[str, Any], sigmas: Float[np.ndarray, "S"], shift: float, mu: float | None):
    if mu is not None:
        sigmas = schedules.dynamic_shift(sigmas, mu, fields["time_shift_type"])
    else:
        sigmas = schedules.static_shift(sigmas, shift)
    return schedules.stretch_to(sigmas, fields["shift_terminal"]) if fields["shift_terminal"] else sigmas


def _flow_match_euler(fields: dict[str, Any], steps: int, mu: float | None, sigmas, begin: int) -> Table:
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
        if fields[flag]:
            first, last = float(sigmas[0]), float(sigmas[-1])
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


def _unipc(fields: dict[str, Any], steps: int, mu: float | None, sigmas, begin: int) -> Table:
    _one_of(fields, "thresholding", (False,))
    _one_of(fields, "solver_p", (None,))
    _one_of(fields, "timestep_spacing", ("linspace", "leading", "trailing"))  # has no effect on flow sigmas
    _one_of(fields, "final_sigmas_type", ("zero", "sigma_min"))
    flow = fields["use_flow_sigmas"]
    prediction = _one_of(fields, "prediction_type", PREDICTIONS)
    if prediction == "flow_prediction" and not fields["predict_x0"]:
        raise ValueError("predict_x0=False is not supported with prediction_type='flow_prediction'")
    if prediction == "flow_prediction" and not flow:
        raise ValueError("prediction_type='flow_prediction' is not supported with use_flow_sigmas=False")
    order = fields["solver_order"]
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"solver_order={order!r}: must be a whole number, at least 1")
    # solver types of DPM-Solver, left from an exchanged scheduler, mean bh2
    variant = _one_of(fields, "solver_type", ("bh1", "bh2", "midpoint", "heun", "logrho"))
    return solvers.unipc(
        (_flow_grid if flow else _diffusion_grid)(fields, steps, mu, sigmas),
        order=order,
        variant="bh1" if variant == "bh1" else "bh2",
        prediction=prediction,
        predict_x0=bool(fields["predict_x0"]),
        lower_order_final=bool(fields["lower_order_final"]),
        disable_corrector=tuple(fields["disable_corrector"] or ()),
        begin=begin,
    )


def _flow_grid(fields: dict[str, Any], steps: int, mu: float | None, sigmas) -> Grid:
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


def _diffusion_grid(fields: dict[str, Any], steps: int, mu: float | None, sigmas) -> Grid:
    for field in ("use_dynamic_shifting", "shift_terminal"):
        if fields[field]:
            raise ValueError(f"{field}={fields[field]} is not supported with use_flow_sigmas=False")
    if sigmas is not None:
        raise ValueError("sigmas may be given only with use_flow_sigmas=True")
    training = _training_sigmas(fields)
    spacing = next((f for flag, f in schedules.SPACINGS.items() if fields[flag]), None)
    if spacing is None:
        n = fields["num_train_timesteps"]
        timesteps = schedules.spaced_timesteps(fields["timestep_spacing"], n, steps, fields["steps_offset"])
        levels, smallest = np.interp(timesteps, np.arange(n), training), training[0]
    else:
        levels = _respaced(fields, spacing, training, steps)
        timesteps, smallest = schedules.timestep_of(levels, training), levels[-1]
        timesteps = np.round(timesteps) if spacing is schedules.karras else np.trunc(timesteps)
    last = smallest if fields["final_sigmas_type"] == "sigma_min" else 0.0
    return schedules.diffusion_grid(np.append(levels, last), timesteps)


def _training_sigmas(fields: dict[str, Any]) -> Float[np.ndarray, "T"]:
    n, trained = fields["num_train_timesteps"], fields["trained_betas"]
    if trained is None:
        betas = schedules.betas(fields["beta_schedule"], fields["beta_start"], fields["beta_end"], n)
    elif len(trained) != n:
        raise ValueError(f"trained_betas has {len(trained)} entries, num_train_timesteps={n}")
    else:
        betas = np.asarray(trained, np.float32)
    return schedules.training_sigmas(betas, zero_snr=bool(fields["rescale_betas_zero_snr"]))


def _respaced(fields: dict[str, Any], spacing, training: Float[np.ndarray, "T"], steps: int) -> Float[np.ndarray, "S"]:
    ends = [fields[f] if fields[f] is not None else float(end) for f, end in
            (("sigma_max", training[-1]), ("sigma_min", training[0]))]  # fmt: skip
    return spacing(*ends, steps)


_BUILDERS = {
    "FlowMatchEulerDiscreteScheduler": (_FLOW_EULER, _flow_match_euler),
    "UniPCMultistepScheduler": (_UNIPC, _unipc),
}
