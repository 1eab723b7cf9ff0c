"""Table builders: noise levels in, float64 weights out. Nothing here sees a sample. Solvers of first order."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jdit.sampling.table import Grid, Table, Threshold, to_noise, to_x0

Levels = tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]  # alpha, sigma


def columns(
    grid: Grid, begin: int, prediction: str, threshold: tuple[float, float] | None = None, predict_x0: bool = True
) -> dict[str, Any]:
    """The columns that do not depend on the solver, from row `begin` on.

    Args:
        threshold: quantile and ceiling of dynamic thresholding, see `Threshold`; of an x0 that comes by way of the
            noise where that is extrapolated (it differs for v on a flow).

    Raises:
        ValueError: a `begin` that is no row.
    """
    if not 0 <= begin < len(grid.timestep):
        raise ValueError(f"begin={begin}: must be from 0 to {len(grid.timestep) - 1}, the rows of this schedule")
    alpha, sigma = grid.alpha[begin:-1], grid.sigma[begin:-1]
    x0_x, x0_out = to_x0(prediction, alpha, sigma)
    if threshold is not None and not predict_x0:
        noise_x, noise_out = to_noise(prediction, alpha, sigma)
        x0_x, x0_out = (1 - sigma * noise_x) / alpha, -sigma * noise_out / alpha
    index = np.arange(len(sigma), dtype=np.int32)
    timestep = np.asarray(grid.timestep[begin:], np.float32)
    by = None if threshold is None else Threshold(*(np.full(len(sigma), value) for value in threshold))
    return {"index": index, "timestep": timestep, "alpha": alpha, "sigma": sigma, "x0_x": x0_x, "x0_out": x0_out,
            "threshold": by}  # fmt: skip


def extrapolated(grid: Grid, begin: int, prediction: str, predict_x0: bool, thresholded: bool) -> dict[str, Any]:
    """The columns that make m, the clean sample or the noise, of the network's output (or of the thresholded x0)."""
    convert = to_x0 if predict_x0 else to_noise
    m_x, m_out = convert("sample" if thresholded else prediction, grid.alpha[begin:-1], grid.sigma[begin:-1])
    return {"m_x": m_x, "m_out": m_out}


def euler(grid: Grid, *, begin: int = 0, stochastic: bool = False) -> Table:
    """Euler's method on a flow, x + (sigma' - sigma) v (arXiv 2210.02747).

    Args:
        grid: noise levels with alpha = 1 - sigma.
        begin: the first step to run.
        stochastic: jump to x0 and renoise to the next level instead (consistency sampling, arXiv 2303.01469).
    """
    common = columns(grid, begin, "flow_prediction")
    sigma, following = grid.sigma[begin:-1], grid.sigma[begin + 1 :]
    one, zero = np.ones_like(sigma), np.zeros_like(sigma)
    if stochastic:
        x0_x, x0_out = common["x0_x"], common["x0_out"]
        keep = grid.alpha[begin + 1 :, None]
        return Table(**common, m_x=x0_x, m_out=x0_out, pred_x=zero, pred_m=keep, noise=following)
    return Table(**common, m_x=zero, m_out=one, pred_x=one, pred_m=(following - sigma)[:, None])


def ddim(grid: Grid, *, prediction: str = "v_prediction", target: Levels | None = None, begin: int = 0) -> Table:
    """DDIM without noise (arXiv 2010.02502, equation 12 with sigma_t = 0): x' = alpha' x0 + sigma' noise.

    Args:
        grid: noise levels at which the network is asked.
        prediction: what the network gives, see `to_x0`.
        target: alpha and sigma that each step leads to; those of the next step by default. CogVideoX's schedulers count
            them in training steps, which are not always the next step's.
        begin: the first step to run.

    Raises:
        ValueError: an unknown prediction, or noise predicted for a level where x has no part of the sample.
    """
    common = columns(grid, begin, prediction)
    alpha, sigma = (level[begin:] for level in target or (grid.alpha[1:], grid.sigma[1:]))
    keep = sigma / common["sigma"]
    pred_m = (alpha - common["alpha"] * keep)[:, None]
    return Table(**common, **extrapolated(grid, begin, prediction, True, False), pred_x=keep, pred_m=pred_m)
