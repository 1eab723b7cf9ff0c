"""Sampling: noise schedules, solvers as tables, one scan, guidance."""

from jdit.sampling.combine import keep_norm, linear, projected, rescaled, zero_star
from jdit.sampling.config import dynamic_mu, from_config, start_index, with_solver
from jdit.sampling.guidance import (
    active_steps,
    away_from,
    classifier_free,
    dynamic_scale,
    embedded,
    embedded_scale,
    guided,
    one_batch,
    separate,
    skip_layer,
    step_range,
    two_passes,
    within,
    zero_init,
)
from jdit.sampling.multistep import dpmpp, unipc
from jdit.sampling.scan import Progress, State, Stateful, add_noise, denoised, init, iterate, run, solve, step
from jdit.sampling.solvers import ddim, euler
from jdit.sampling.table import Grid, Table, part, row, split

__all__ = [
    "Grid",
    "Progress",
    "State",
    "Stateful",
    "Table",
    "active_steps",
    "add_noise",
    "away_from",
    "classifier_free",
    "ddim",
    "denoised",
    "dpmpp",
    "dynamic_mu",
    "dynamic_scale",
    "embedded",
    "embedded_scale",
    "euler",
    "from_config",
    "guided",
    "init",
    "iterate",
    "keep_norm",
    "linear",
    "one_batch",
    "part",
    "projected",
    "rescaled",
    "row",
    "run",
    "separate",
    "skip_layer",
    "solve",
    "split",
    "start_index",
    "step",
    "step_range",
    "two_passes",
    "unipc",
    "with_solver",
    "within",
    "zero_init",
    "zero_star",
]
