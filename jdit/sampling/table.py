"""A solver as data: the table of weights that one linear step reads, a row a step.

Every update of a multistep solver is linear in the sample, the previous sample and past predictions, and its weights
depend on the noise levels alone (docs/sampling.md derives them). They are computed on the host in float64 (`solvers`,
`multistep`), and `scan.step` applies them.
Axis S is steps, K the predictions that a predictor sees (the new one first), H the older ones that the state carries.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

Numbers = Any  # NumPy on the host, JAX arrays in a trace
PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction", "sample")


class Grid(NamedTuple):
    """Noise levels: x = alpha x0 + sigma noise. One entry more than there are steps; the network sees `timestep`."""

    alpha: Float[np.ndarray, "S+1"]
    sigma: Float[np.ndarray, "S+1"]
    timestep: Float[np.ndarray, "S"]


class Corrector(NamedTuple):
    """Weights of x = x x + last x' + sum_j m[j] m_{j+1} + new m; (1, 0, 0, 0) leaves x alone."""

    x: Float[Numbers, "S"]
    last: Float[Numbers, "S"]
    new: Float[Numbers, "S"]
    m: Float[Numbers, "S H"]


class Threshold(NamedTuple):
    """Dynamic thresholding (arXiv 2205.11487, section 2.3): a sample's x0 is cut at the `ratio` quantile of its
    magnitudes, itself kept between 1 and `most`, and divided by it."""

    ratio: Float[Numbers, "S"]
    most: Float[Numbers, "S"]


class Table(NamedTuple):
    """Weights of a solver, leading axis S; a row of it (`row`) has scalars and (K,) vectors.

    One step, for a sample x, the previous corrected sample x', older predictions m1, m2, ... and a network output:

        m = m_x x + m_out out
        x = corrector.x x + corrector.last x' + corrector.m[0] m1 + corrector.m[1] m2 + ... + corrector.new m
        next = pred_x x + pred_m[0] m + pred_m[1] m1 + ... + noise z

    where the corrector line or the noise is left out if it is None. m is whatever the solver extrapolates: clean
    sample, noise or velocity. With `threshold`, `out` stands for the thresholded x0. With `predictor` the last line is
    another solver's whole step from the corrected x, run with a state of its own. Being None is part of the structure,
    hence of a jit key; numbers never are.
    """

    index: Int[Numbers, "S"]  # position in the run
    timestep: Float[Numbers, "S"]  # what the network is given, float32 as the reference rounds it
    alpha: Float[Numbers, "S"]  # x = alpha x0 + sigma noise at the start of the step
    sigma: Float[Numbers, "S"]
    x0_x: Float[Numbers, "S"]  # x0 = x0_x x + x0_out out
    x0_out: Float[Numbers, "S"]
    m_x: Float[Numbers, "S"]
    m_out: Float[Numbers, "S"]
    pred_x: Float[Numbers, "S"]
    pred_m: Float[Numbers, "S K"]
    corrector: Corrector | None = None
    noise: Float[Numbers, "S"] | None = None
    threshold: Threshold | None = None
    predictor: "Table | None" = None

    @property
    def stochastic(self) -> bool:
        """Whether a step takes noise."""
        return self.noise is not None or (self.predictor is not None and self.predictor.stochastic)

    @property
    def steps(self) -> int:
        return self.timestep.shape[0]

    @property
    def history(self) -> int:
        """H: the older predictions that the state carries."""
        return self.pred_m.shape[-1] - 1 if self.corrector is None else self.corrector.m.shape[-1]


def row(table: Table, i) -> Table:
    """The weights of step i."""
    return jax.tree.map(lambda a: a[i], table)


def part(table: Table, start: int, stop: int | None = None) -> Table:
    """Rows [start, stop) of a table, to be run from the state that the rows before left."""
    return jax.tree.map(lambda a: a[start:stop], table)


def split(table: Table, boundary: float) -> tuple[Table, Table]:
    """The rows with timestep >= boundary and the others (host): one network each, as Wan 2.2's two experts."""
    n = int(np.sum(np.asarray(table.timestep) >= boundary))
    return part(table, 0, n), part(table, n)


def to_x0(prediction: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (a, b) of x0 = a x + b out, by what the network predicts: noise, v = alpha noise - sigma x0
    (arXiv 2202.00512), the flow velocity noise - x0, or x0 itself.

    Raises:
        ValueError: an unknown prediction.
    """
    one, zero = np.ones_like(sigma), np.zeros_like(sigma)
    match prediction:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "v_prediction":
            return alpha, -sigma
        case "flow_prediction":
            return one, -sigma
        case "sample":
            return zero, one
    raise ValueError(f"prediction_type={prediction!r} is unknown; there are {', '.join(PREDICTIONS)}")


def to_noise(prediction: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (a, b) of noise = a x + b out; from noise = (x - alpha x0) / sigma.

    Raises:
        ValueError: an unknown prediction.
    """
    if prediction == "epsilon":
        return np.zeros_like(sigma), np.ones_like(sigma)
    if prediction == "v_prediction":
        return sigma, alpha
    x0_x, x0_out = to_x0(prediction, alpha, sigma)
    return (1 - alpha * x0_x) / sigma, -alpha * x0_out / sigma
