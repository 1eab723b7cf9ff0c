"""Training: autoencoders, text encoders, MMDiT and Wan, from a config and a folder of captioned pictures or clips."""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("jdit")

TASKS = {
    "vae": ("vae", "VAETask"), "text": ("text", "TextTask"), "flow": ("flow", "FlowTask"),
    "video_vae": ("video_vae", "VideoVAETask"), "video_flow": ("video_flow", "VideoFlowTask"),
    "video_animate": ("video_animate", "AnimateTask"),
}  # fmt: skip
"""Stage -> module and class of its task."""


def run(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
):
    """Train what a config says.

    Args:
        config: a TOML file, or the name of a recipe ("fluent-image/vae").
        overrides: "section.key=value" each.
        steps, minutes: length of the run, in the place of the config's.
        resume: go on from the run's last checkpoint; start anew if there is none.

    Returns:
        `jdit.train.loop.Result`.

    Raises:
        ValueError: the config, the data or a checkpoint is not right; the message names the key or file.
        ImportError: optax is missing.
    """
    from jdit.train.config import read
    from jdit.train.loop import train

    if steps is not None:
        overrides = [*overrides, f"run.steps={steps}", "run.minutes=0.0"]
    if minutes is not None:
        overrides = [*overrides, f"run.minutes={float(minutes)}", "run.steps=0"]
    cfg = read(config, overrides)
    folder = Path(cfg.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = log.level
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):  # the file is the record of the run, whatever the caller shows
        log.setLevel(logging.INFO)
    try:
        (folder / "config.json").write_text(cfg.dumps(), encoding="utf-8")
        return train(_task, cfg, resume=resume)
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def _task(cfg: Any) -> Any:
    where, name = TASKS[cfg.stage]
    return getattr(importlib.import_module(f"jdit.train.{where}"), name)(cfg)
