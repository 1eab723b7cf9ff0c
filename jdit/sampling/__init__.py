"""Sampling: noise schedules, solvers as tables, one scan, guidance."""

from jdit.sampling.config import dynamic_mu, from_config, start_index, with_solver
from jdit.sampling.guidance import active_steps, classifier_free, skip_layer, two_passes
from jdit.sampling.scan import Progress, State, Stateful, add_noise, denoised, init, iterate, run, solve, step
from jdit.sampling.solvers import euler, unipc
from jdit.sampling.table import Grid, Table, part, row, split

__all__ = [
    "Grid",
    "Progress",
    "State",
    "Stateful",
    "Table",
    "active_steps",
    "add_noise",
    "classifier_free",
    "denoised",
    "dynamic_mu",
    "euler",
    "from_config",
    "init",
    "iterate",
    "part",
    "row",
    "run",
    "skip_layer",
    "solve",
    "split",
    "start_index",
    "step",
    "two_passes",
    "unipc",
    "with_solver",
]
