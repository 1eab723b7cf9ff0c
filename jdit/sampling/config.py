"""Scheduler configs of diffusers -> solver tables: the part that all classes share. Theirs is in `schedulers`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdit.sampling import sigmas as schedules
from jdit.sampling.schedulers import SCHEDULERS, one_of
from jdit.sampling.table import Table

log = logging.getLogger("jdit")

# left behind in a config when a pipeline's scheduler was exchanged; the class in charge never reads them
_FOREIGN = {"skip_prk_steps", "interpolation_type", "timestep_type"}.union(*(s.defaults for s in SCHEDULERS.values()))
_SOLVERS = {
    "euler": "FlowMatchEulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler",
    "dpmpp": "DPMSolverMultistepScheduler", "ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler",
}  # fmt: skip
# what a schedule's levels depend on, and not every class has
_LEVELS = {"invert_sigmas", "stochastic_sampling", "shift_terminal", "sigma_min", "sigma_max", "lambda_min_clipped",
           "thresholding", "solver_p", *schedules.SPACINGS}  # fmt: skip


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
        config: its contents; `_class_name` chooses the solver, absent fields take the defaults of that class. UniPC's
            `solver_p` is another such config (or a scheduler that has one).
        steps: number of steps of the whole schedule.
        mu: resolution-dependent shift, needed by (and only allowed with) `use_dynamic_shifting`; see `dynamic_mu`.
        sigmas: `steps` noise levels instead of the default ones, before any shift and without the final one.
        shift: replaces the config's `shift` or `flow_shift`.
        begin: the first step to run (`start_index`); the table has steps - begin rows.

    Returns:
        A row a step, float64 on the host. Where the reference's own timesteps are more or fewer than `steps` (trailing
        spacing of 61 of 1000, `lambda_min_clipped`), so are the rows.

    Raises:
        ValueError: a class, a field or a value that is not supported (named), or arguments that contradict it.
    """
    name, fields = _read(config)
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps={steps}: must be a whole number, at least 1")
    steps = int(steps)
    if not 0 <= begin < steps:
        raise ValueError(f"begin={begin}: must be from 0 to {steps - 1} with {steps} steps")
    if fields.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError("mu is missing: the config has use_dynamic_shifting=True (dynamic_mu computes it)")
        if shift is not None:
            raise ValueError(f"shift={shift} has no effect with use_dynamic_shifting=True: give mu")
    elif mu is not None:
        raise ValueError(f"mu={mu} has no effect without use_dynamic_shifting=True: give shift")
    shift_field = next((f for f in ("shift", "flow_shift") if f in fields), None)
    if shift is not None:
        respaced = shift_field == "flow_shift" and fields["use_karras_sigmas"]
        if shift_field is None or not fields.get("use_flow_sigmas", True) or respaced:
            raise ValueError(f"shift={shift} has no effect: the config's sigmas are no shifted flow schedule")
        fields[shift_field] = shift
    if shift_field and not (isinstance(fields[shift_field], (int, float)) and fields[shift_field] > 0):
        raise ValueError(f"{shift_field}={fields[shift_field]!r}: must be a positive number")
    if sigmas is not None:
        sigmas = np.asarray(sigmas)  # float32 stays so: the reference's rounding depends on it
        sigmas = sigmas if sigmas.dtype == np.float32 else sigmas.astype(np.float64)
        if sigmas.shape != (steps,):
            raise ValueError(f"sigmas has shape {sigmas.shape}: {steps} steps need {steps} numbers")
    table = SCHEDULERS[name].build(fields, steps, mu, sigmas, begin)
    predictor = fields.get("solver_p")
    return table if predictor is None else table._replace(predictor=_predictor(predictor, table, begin))


def _predictor(config: Any, table: Table, begin: int) -> Table:
    """The table of UniPC's `solver_p`, which keeps its own schedule and is asked at the timesteps of `table`."""
    if not isinstance(config, Mapping) and hasattr(config, "config"):
        config = {"_class_name": type(config).__name__, **config.config}
    if not isinstance(config, Mapping) or config.get("_class_name") == "CogVideoXDPMScheduler":
        raise ValueError(f"solver_p={config!r}: must be the config of a scheduler other than CogVideoXDPMScheduler")
    try:
        predictor = from_config(config, table.steps + begin, begin=begin)
    except ValueError as e:
        raise ValueError(f"solver_p: {e}") from None
    if not np.array_equal(predictor.timestep, table.timestep):
        raise ValueError("solver_p: its timesteps are not those of the UniPCMultistepScheduler")
    return predictor


def with_solver(config: Mapping[str, Any], solver: str) -> dict[str, Any]:
    """The same noise schedule under another solver: "euler", "unipc" (order 2, bh2) or "dpmpp" (order 2, midpoint) for
    flows, the latter two for schedules of betas, "ddim" or "dpm" for CogVideoX.

    Raises:
        ValueError: an unknown solver, or a schedule that the other solver cannot run.
    """
    if solver not in _SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; there are {', '.join(_SOLVERS)}")
    wanted, (name, fields) = _SOLVERS[solver], _read(config)
    if name == wanted:
        return dict(config)
    if "CogVideoX" in name or "CogVideoX" in wanted:
        if not ("CogVideoX" in name and "CogVideoX" in wanted):
            raise ValueError(f"solver={solver!r} cannot run the schedule of {name}")
        return {**config, "_class_name": wanted}
    defaults, flow = SCHEDULERS[wanted].defaults, fields.get("use_flow_sigmas", True)
    if not flow and solver == "euler":
        raise ValueError("solver='euler' needs a flow schedule; the config has use_flow_sigmas=False")
    own = {"solver_order", "solver_type", "algorithm_type", "euler_at_final", "disable_corrector", "predict_x0"}
    same = {"shift": "flow_shift", "flow_shift": "shift"}
    kept: dict[str, Any] = {"_class_name": wanted}
    if name == _SOLVERS["euler"]:
        kept |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    spaced = schedules.SPACINGS if flow else ()  # each class has its own way of spacing flow sigmas
    for field, value in fields.items():
        default = SCHEDULERS[name].defaults[field]
        if field in defaults and field not in own and field not in spaced:
            kept[field] = value
        elif same.get(field) in defaults:
            kept[same[field]] = value
        elif field in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
            kept[field] = value  # `dynamic_mu` reads them
        elif field not in own and field in _LEVELS and value != default:
            raise ValueError(f"solver={solver!r} does not go with the config's {field}={value}")
    if solver == "euler" and fields["prediction_type"] != "flow_prediction":
        raise ValueError(f"solver='euler' does not go with prediction_type={fields['prediction_type']!r}")
    return kept


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """mu for an image of that many tokens: linear between the config's two sequence lengths and their shifts, as the
    pipelines of SD3, Flux and Qwen-Image compute it."""
    c = {**SCHEDULERS["FlowMatchEulerDiscreteScheduler"].defaults, **{k: v for k, v in config.items() if v is not None}}
    slope = (c["max_shift"] - c["base_shift"]) / (c["max_image_seq_len"] - c["base_image_seq_len"])
    return tokens * slope + c["base_shift"] - slope * c["base_image_seq_len"]


def start_index(steps: int, strength: float, *, whole: bool = False) -> int:
    """The step at which image-to-image begins: strength 1 runs all of them, 0.3 the last third or so.

    Args:
        whole: count the steps to run in whole numbers, as the video-to-video pipelines of CogVideoX, Wan and
            HunyuanVideo do; those of pictures count the steps to leave out.

    Raises:
        ValueError: strength outside [0, 1], or so small that no step is left.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: must lie in [0, 1]")
    kept = min(steps * strength, steps)
    begin = steps - int(kept) if whole else int(steps - kept)
    if begin >= steps:
        raise ValueError(f"strength={strength} leaves none of the {steps} steps to run")
    return begin


def _read(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"_class_name={name!r} is not supported; supported: {', '.join(SCHEDULERS)}")
    defaults = SCHEDULERS[name].defaults
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    unread = sorted(set(given) & _FOREIGN - set(defaults))
    if unread:
        log.info("%s does not read %s", name, ", ".join(unread))
    unknown = sorted(set(given) - set(defaults) - _FOREIGN)
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}; its fields: {', '.join(sorted(defaults))}")
    fields = {**defaults, **{k: v for k, v in given.items() if k in defaults}}
    n = fields["num_train_timesteps"]
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_train_timesteps={n!r}: must be a whole number, at least 1")
    if "time_shift_type" in fields:
        one_of(fields, "time_shift_type", schedules.SHIFTS)
    spacings = [k for k in schedules.SPACINGS if fields.get(k)]
    if len(spacings) > 1:
        raise ValueError(f"{', '.join(spacings)} contradict each other: one at most may be true")
    return name, fields
