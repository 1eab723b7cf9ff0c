"""Table builders: noise levels in, float64 weights out. Nothing here sees a sample."""

import math
from typing import Any

import numpy as np

from jdit.sampling.table import Corrector, Grid, Table, to_noise, to_x0

Weights = tuple[float, np.ndarray, float]  # on x, on (m_s, m_{s-1}, ...), on m_t


def _columns(grid: Grid, begin: int, prediction: str) -> dict[str, Any]:
    """The columns that do not depend on the solver, from row `begin` on."""
    alpha, sigma = grid.alpha[begin:-1], grid.sigma[begin:-1]
    x0_x, x0_out = to_x0(prediction, alpha, sigma)
    index = np.arange(len(sigma), dtype=np.int32)
    timestep = np.asarray(grid.timestep[begin:], np.float32)
    return {"index": index, "timestep": timestep, "alpha": alpha, "sigma": sigma, "x0_x": x0_x, "x0_out": x0_out}


def euler(grid: Grid, *, begin: int = 0, stochastic: bool = False) -> Table:
    """Euler's method on a flow, x + (sigma' - sigma) v (arXiv 2210.02747).

    Args:
        grid: noise levels with alpha = 1 - sigma.
        begin: the first step to run.
        stochastic: jump to x0 and renoise to the next level instead (consistency sampling, arXiv 2303.01469).
    """
    columns = _columns(grid, begin, "flow_prediction")
    sigma, following = grid.sigma[begin:-1], grid.sigma[begin + 1 :]
    one, zero = np.ones_like(sigma), np.zeros_like(sigma)
    if stochastic:
        x0_x, x0_out = columns["x0_x"], columns["x0_out"]
        keep = grid.alpha[begin + 1 :, None]
        return Table(**columns, m_x=x0_x, m_out=x0_out, pred_x=zero, pred_m=keep, noise=following)
    return Table(**columns, m_x=zero, m_out=one, pred_x=one, pred_m=(following - sigma)[:, None])


def _phi(k: int, z: float) -> float:
    """phi_k(z) = sum_n z^n / (n + k)!; by series for small z, where phi_{k+1} = (phi_k - 1/k!) / z cancels."""
    if abs(z) < 1:
        return sum(z**n / math.factorial(n + k) for n in range(20))
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value


class _UniPC:
    """Weights of single UniPC updates on a grid (arXiv 2302.04867, equations 3, 8 and 9)."""

    def __init__(self, grid: Grid, predict_x0: bool, variant: str):
        with np.errstate(divide="ignore"):
            self.lam = np.log(grid.alpha) - np.log(grid.sigma)
        self.grid, self.predict_x0, self.variant = grid, predict_x0, variant

    def ratios(self, s: int, order: int, h: float) -> np.ndarray:
        """Places of the past predictions in units of the step; equal noise levels count once."""
        places = [0.0]
        for j in range(1, order):
            r = (self.lam[s - j] - self.lam[s]) / h
            if r >= places[-1]:
                break
            places.append(r)
        return np.array(places[1:])

    def update(self, s: int, t: int, order: int, corrector: bool) -> Weights:
        """From noise level s to t = s + 1 with predictions at s, s-1, ... and, for the corrector, at t."""
        alpha, sigma = self.grid.alpha, self.grid.sigma
        past = np.zeros(order)
        if sigma[t] == sigma[s]:
            return 1.0, past, 0.0
        if sigma[t] == 0:  # h is infinite: the limit is the prediction itself
            past[0] = alpha[t] if self.predict_x0 else -alpha[t] * sigma[s] / alpha[s]
            return (0.0 if self.predict_x0 else alpha[t] / alpha[s]), past, 0.0
        h = self.lam[t] - self.lam[s]
        z, scale = (-h, alpha[t]) if self.predict_x0 else (h, sigma[t])
        on_x = sigma[t] / sigma[s] if self.predict_x0 else alpha[t] / alpha[s]
        b_h = z if self.variant == "bh1" else math.expm1(z)
        r = self.ratios(s, order, h)
        n = len(r)  # past differences
        if corrector:
            r = np.append(r, 1.0)
        size = len(r)
        if size == 1:  # the reference's simplification: half of the only difference
            rho = np.array([0.5])
        else:
            powers = r[None] ** np.arange(size)[:, None]
            rho = np.linalg.solve(powers, [math.factorial(k) * z * _phi(k + 1, z) / b_h for k in range(1, size + 1)])
        differences = -scale * b_h * rho / r  # weights on m_j - m_s
        past[1 : n + 1] = differences[:n]
        past[0] = -scale * math.expm1(z) - differences.sum()
        return on_x, past, float(differences[n]) if corrector else 0.0


def unipc(
    grid: Grid,
    *,
    order: int = 2,
    variant: str = "bh2",
    prediction: str = "flow_prediction",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: tuple[int, ...] = (),
    begin: int = 0,
) -> Table:
    """UniPC of any order (arXiv 2302.04867), as diffusers' UniPCMultistepScheduler runs it.

    The order grows from 1 with the history, and with `lower_order_final` falls to 1 at the last step. Steps between
    equal noise levels are the identity.

    Args:
        variant: "bh1" (B(h) = h) or "bh2" (B(h) = e^h - 1).
        prediction: what the network gives, see `to_x0`.
        predict_x0: extrapolate clean samples rather than noise.
        disable_corrector: steps of the whole grid after which the corrector is left out.
        begin: the first step to run; the order warms up from there.

    Raises:
        ValueError: pure noise (alpha 0, an infinite log-SNR) among the levels, or an unknown prediction.
    """
    steps = len(grid.sigma) - 1
    if not (grid.alpha[begin:] > 0).all():
        raise ValueError("UniPC needs every sigma below pure noise (flow: below 1)")
    columns = _columns(grid, begin, prediction)
    rows = steps - begin
    m_x, m_out = (to_x0 if predict_x0 else to_noise)(prediction, grid.alpha[begin:-1], grid.sigma[begin:-1])
    pred_x, pred_m = np.zeros(rows), np.zeros((rows, order))
    corrector = Corrector(np.ones(rows), np.zeros(rows), np.zeros(rows), np.zeros((rows, order)))
    solver = _UniPC(grid, predict_x0, variant)
    p = 0
    for k, i in enumerate(range(begin, steps)):
        if k and i - 1 not in disable_corrector and grid.sigma[i] > 0:
            corrector.x[k] = 0.0
            corrector.last[k], corrector.m[k, :p], corrector.new[k] = solver.update(i - 1, i, p, corrector=True)
        p = min(order, k + 1, steps - i if lower_order_final else order)
        pred_x[k], pred_m[k, :p], _ = solver.update(i, i + 1, p, corrector=False)
    return Table(**columns, m_x=m_x, m_out=m_out, pred_x=pred_x, pred_m=pred_m, corrector=corrector)
