"""Scheduler configs of diffusers -> solver tables: the part that all classes share. Theirs is in `schedulers`."""

import logging
import math
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
           "final_sigmas_type", "thresholding", "solver_p", *schedules.SPACINGS}  # fmt: skip


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
    steps, begin = _whole("steps", steps, 1), _whole("begin", begin, 0)
    mu, shift = (value if value is None else _real(what, value) for what, value in (("mu", mu), ("shift", shift)))
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
    if shift_field and not fields[shift_field] > 0:
        raise ValueError(f"{shift_field}={fields[shift_field]!r}: must be a positive number")
    if sigmas is not None:
        sigmas = schedules.given_sigmas(sigmas, steps)
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
    flows, the latter two for schedules of betas, "ddim" or "dpm" for CogVideoX. On a flow each class lays its own
    levels between the same ends.

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
    if solver == "dpmpp" and fields.get("use_dynamic_shifting") and fields["time_shift_type"] != "exponential":
        raise ValueError(f"solver='dpmpp' does not go with time_shift_type={fields['time_shift_type']!r}")
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
    pipelines of SD3, Flux and Qwen-Image compute it.

    Raises:
        ValueError: two equal lengths in the config.
    """
    c = {**SCHEDULERS["FlowMatchEulerDiscreteScheduler"].defaults, **{k: v for k, v in config.items() if v is not None}}
    if c["max_image_seq_len"] == c["base_image_seq_len"]:
        raise ValueError(f"max_image_seq_len={c['max_image_seq_len']} must differ from base_image_seq_len")
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
    steps, strength = _whole("steps", steps, 1), _real("strength", strength)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: must lie in [0, 1]")
    kept = min(steps * strength, steps)
    begin = steps - int(kept) if whole else int(steps - kept)
    if begin >= steps:
        raise ValueError(f"strength={strength} leaves none of the {steps} steps to run")
    return begin


def _read(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config must be a scheduler's config, a mapping with _class_name, not {type(config).__name__}"
        )
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f"_class_name={name!r} is not supported; supported: {', '.join(SCHEDULERS)}")
    defaults = SCHEDULERS[name].defaults
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    unread = sorted(set(given) & _FOREIGN - set(defaults))
    if unread:
        log.info("%s does not read %s", name, ", ".join(unread))
    unknown = sorted(set(given) - set(defaults) - _FOREIGN)
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}; its fields: {', '.join(sorted(defaults))}")
    fields = {k: _checked(k, given.get(k, default), default) for k, default in defaults.items()}
    if fields["num_train_timesteps"] < 1:
        raise ValueError(f"num_train_timesteps={fields['num_train_timesteps']!r}: must be a whole number, at least 1")
    if "time_shift_type" in fields:
        one_of(fields, "time_shift_type", schedules.SHIFTS)
    spacings = [k for k in schedules.SPACINGS if fields.get(k)]
    if len(spacings) > 1:
        raise ValueError(f"{', '.join(spacings)} contradict each other: one at most may be true")
    return name, fields


_NUMBERS = {"sigma_min", "sigma_max", "shift_terminal"}  # None where absent


def _checked(field: str, value: Any, default: Any) -> Any:
    """A field's value as a Python number, flag or word, by the kind of its default.

    Raises:
        ValueError: another kind, or a number that the field cannot be.
    """
    if field in _NUMBERS:
        value = value if value is None else _real(field, value)
        ok = value is None or (value > 0 if field != "shift_terminal" else 0 <= value < 1)
        if not ok:
            raise ValueError(f"{field}={value}: must {'be positive' if field != 'shift_terminal' else 'lie in [0, 1)'}")
        return value
    if isinstance(default, bool):
        if value is not None and not isinstance(value, bool | int | np.bool_):
            raise ValueError(f"{field}={value!r}: must be true or false")
        return bool(value)
    if isinstance(default, int):
        return _whole(field, value, None)
    if isinstance(default, float):
        return _real(field, value, finite=field != "lambda_min_clipped")
    if field == "disable_corrector":
        return tuple(_whole(f"{field} entry", i, 0) for i in np.ravel(np.asarray([] if value is None else value)))
    return value


def _whole(what: str, value: Any, least: int | None) -> int:
    number = value.item() if isinstance(value, np.generic) else value
    good = isinstance(number, int | float) and not isinstance(number, bool) and number == number // 1
    if not good or math.isinf(number) or (least is not None and number < least):
        raise ValueError(f"{what}={value!r}: must be a whole number{'' if least is None else f', at least {least}'}")
    return int(number)


def _real(what: str, value: Any, *, finite: bool = True) -> float:
    """Python's own float: a NumPy scalar would widen the float32 arithmetic that rounding depends on."""
    try:
        number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if (isinstance(value, bool | str) and finite) or math.isnan(number) or (finite and math.isinf(number)):
        raise ValueError(f"{what}={value!r}: must be a {'finite ' * finite}number")
    return number
