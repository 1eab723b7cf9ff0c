"""Which scheduler config a call runs: the checkpoint's, another solver on the same noise schedule, or the caller's."""

from collections.abc import Mapping
from typing import Any

EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
SOLVERS = {"euler": EULER, "unipc": UNIPC}


def flow_scheduler(config: Mapping[str, Any], solver: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The scheduler config of a flow-matching run.

    Args:
        config: the checkpoint's. solver: None keeps it; a name of `SOLVERS` changes the solver and keeps the shift, as
            upstream's `from_config` does; a mapping is a config of its own.

    Raises:
        ValueError: an unknown solver, or a schedule that the named solver cannot follow.
    """
    if solver is None:
        return dict(config)
    if not isinstance(solver, str):
        return dict(solver)
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}; there are {', '.join(SOLVERS)}, or a scheduler config")
    if config["_class_name"] == SOLVERS[solver]:
        return dict(config)
    train = config.get("num_train_timesteps", 1000)
    if solver == "unipc":
        if config.get("use_dynamic_shifting"):
            raise ValueError("solver='unipc' takes a static shift; this checkpoint's shift depends on the size")
        return {
            "_class_name": UNIPC, "num_train_timesteps": train, "prediction_type": "flow_prediction",
            "use_flow_sigmas": True, "flow_shift": config.get("shift", 1.0),
        }  # fmt: skip
    return {"_class_name": EULER, "num_train_timesteps": train, "shift": config.get("flow_shift", 1.0)}
