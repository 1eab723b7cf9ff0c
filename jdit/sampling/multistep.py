"""Table builders of exponential integrators in log-SNR, of higher order: UniPC and DPM-Solver.

With lambda = log(alpha / sigma) and h the step's length, one step integrates e^(-lambda) x0 (or e^lambda noise), x0
extrapolated from past predictions by a polynomial; phi_k are the moments of that integral.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jdit.sampling.solvers import Levels, columns, extrapolated
from jdit.sampling.table import Corrector, Grid, Table

Weights = tuple[float, np.ndarray, float]  # on x, on (m_s, m_{s-1}, ...), on m_t or on noise


def _phi(k: int, z: float) -> float:
    """phi_k(z) = sum_n z^n / (n + k)!; by series for small z, where phi_{k+1} = (phi_k - 1/k!) / z cancels."""
    if abs(z) < 1:
        return sum(z**n / math.factorial(n + k) for n in range(20))
    if math.isinf(z):
        return 0.0 if z < 0 else math.inf
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def _log_snr(levels: Levels) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(levels[0]) - np.log(levels[1])


class _UniPC:
    """Weights of single UniPC updates on a grid (arXiv 2302.04867, equations 3, 8 and 9)."""

    def __init__(self, grid: Grid, predict_x0: bool, variant: str):
        self.lam = _log_snr((grid.alpha, grid.sigma))
        self.grid, self.predict_x0, self.variant = grid, predict_x0, variant

    def ratios(self, s: int, order: int, h: float) -> np.ndarray:
        """Places of the past predictions in units of the step; equal noise levels count once."""
        places = [0.0]
        for j in range(1, order):
            r = (self.lam[s - j] - self.lam[s]) / h
            if r in places:
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
    disable_corrector: Sequence[int] = (),
    threshold: tuple[float, float] | None = None,
    predictor: Table | None = None,
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
        threshold: quantile and ceiling of dynamic thresholding; extrapolated noise is left as it is.
        predictor: another solver's table of the same rows that predicts in UniP's place ("solver_p").
        begin: the first step to run; the order warms up from there.

    Raises:
        ValueError: pure noise (alpha 0, an infinite log-SNR) among the levels, or an unknown prediction.
    """
    steps = len(grid.sigma) - 1
    if not (grid.alpha[begin:] > 0).all():
        raise ValueError("UniPC needs every sigma below pure noise (flow: below 1)")
    threshold = threshold if predict_x0 else None
    common = columns(grid, begin, prediction, threshold)
    common |= extrapolated(grid, begin, prediction, predict_x0, threshold is not None)
    rows = steps - begin
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
    return Table(**common, pred_x=pred_x, pred_m=pred_m, corrector=corrector, predictor=predictor)


class _DPM:
    """Weights of single DPM-Solver updates from grid levels to `target` levels (arXiv 2211.01095, equations 9 to 13 and
    appendix; 2206.00927 where noise is extrapolated)."""

    def __init__(self, grid: Grid, target: Levels, predict_x0: bool, stochastic: bool, kind: str):
        self.alpha, self.sigma, self.target = grid.alpha, grid.sigma, target
        self.lam, self.lam_target = _log_snr((grid.alpha, grid.sigma)), _log_snr(target)
        self.predict_x0, self.stochastic, self.kind = predict_x0, stochastic, kind

    def update(self, i: int, order: int) -> Weights:
        """Step i with the predictions at i, i-1, ...; of a lower order where noise levels repeat."""
        alpha, sigma, h = self.target[0][i], self.target[1][i], self.lam_target[i] - self.lam[i]
        past = np.zeros(3)
        if h == 0:
            return 1.0, past, 0.0
        steps = np.diff(self.lam[i - order + 1 : i + 1])[::-1]  # lengths of the steps before, newest first
        order = 1 + int(np.cumprod(steps != 0).sum()) if order > 1 else 1
        z = (-h if self.predict_x0 else h) * (2 if self.stochastic and self.predict_x0 else 1)
        scale = (alpha if self.predict_x0 else sigma) * (2 if self.stochastic and not self.predict_x0 else 1)
        on_x = sigma / self.sigma[i] if self.predict_x0 else alpha / self.alpha[i]
        if self.stochastic and self.predict_x0:
            on_x *= math.exp(-h)
        past[0] = -scale * math.expm1(z)
        if order > 1:
            r0 = steps[0] / h
            slope = past[0] / 2 if self.kind == "midpoint" and order == 2 else self._moment(2, z, scale)
            if order == 2:  # slope (m0 - m1) / r0
                past[:2] += np.array([1, -1]) * slope / r0
            else:
                r1 = steps[1] / h
                first, second = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
                bend = (first - second) / (r0 + r1)
                past += slope * (first + r0 * bend) + self._moment(3, z, scale) * bend
        if not self.stochastic:
            return on_x, past, 0.0
        return on_x, past, sigma * math.sqrt(max(-math.expm1(-2 * h) if self.predict_x0 else math.expm1(2 * h), 0.0))

    def _moment(self, k: int, z: float, scale: float) -> float:
        """The integral of the (k-1)th power of the step, over (k-1)!."""
        if self.stochastic and self.predict_x0 and k == 3:
            return -scale * (_phi(2, z) + 0.5)  # the reference's sign; theory has z phi_3 = phi_2 - 1/2
        return scale * (1 / math.factorial(k - 1) - _phi(k - 1, z)) if math.isinf(z) else -scale * z * _phi(k, z)


def dpmpp(
    grid: Grid,
    *,
    order: int = 2,
    kind: Literal["midpoint", "heun"] = "midpoint",
    prediction: str = "epsilon",
    predict_x0: bool = True,
    stochastic: bool = False,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    orders: Sequence[int] | None = None,
    threshold: tuple[float, float] | None = None,
    target: Levels | None = None,
    begin: int = 0,
) -> Table:
    """DPM-Solver++ multistep (arXiv 2211.01095), as diffusers' DPMSolverMultistepScheduler runs it.

    The order grows from 1 with the history; the step to noise level 0 is of order 1. Steps between equal levels are the
    identity.

    Args:
        kind: what multiplies the slope in a step of order 2: half the step ("midpoint") or its exact moment ("heun").
        prediction: what the network gives, see `to_x0`.
        predict_x0: extrapolate clean samples (DPM-Solver++) rather than noise (DPM-Solver, arXiv 2206.00927).
        stochastic: the SDE form, with a noise column.
        lower_order_final: with fewer than 15 steps, the last is of order 1 and the one before at most 2.
        euler_at_final: the last step is of order 1.
        orders: the order of each step of the whole grid, instead of the three above.
        threshold: quantile and ceiling of dynamic thresholding.
        target: alpha and sigma that each step leads to; those of the next step by default.
        begin: the first step to run; the order warms up from there.

    Raises:
        ValueError: an order outside 1 to 3 or without a formula, an unknown kind or prediction.
    """
    steps = len(grid.sigma) - 1
    if kind not in ("midpoint", "heun"):
        raise ValueError(f"kind={kind!r} is unknown; there are midpoint, heun")
    if not 1 <= order <= 3 or (order == 3 and stochastic and not predict_x0):
        raise ValueError(f"order={order}: DPM-Solver has 1, 2 and 3, its SDE form that extrapolates noise 1 and 2")
    if not predict_x0 and not (grid.alpha[begin:] > 0).all():
        raise ValueError("extrapolated noise needs every sigma below pure noise (flow: below 1)")
    target = target or (grid.alpha[1:], grid.sigma[1:])
    if stochastic and (target[1] > grid.sigma[:-1] * (1 + 1e-6)).any():  # a final level may be rounded above the last
        raise ValueError("the SDE form needs noise levels that fall to the end")
    if orders is None:
        orders = [order] * steps
        if lower_order_final and steps < 15:
            orders[-2:] = [min(order, 2), 1][-steps:]
        if euler_at_final:
            orders[-1] = 1
    common = columns(grid, begin, prediction, threshold, predict_x0)
    common |= extrapolated(grid, begin, prediction, predict_x0, threshold is not None)
    solver = _DPM(grid, target, predict_x0, stochastic, kind)
    pred_x, noise, pred_m = np.zeros(steps - begin), np.zeros(steps - begin), np.zeros((steps - begin, 3))
    for k, i in enumerate(range(begin, steps)):
        p = min(orders[i], k + 1, 1 if target[1][i] == 0 else 3)
        pred_x[k], pred_m[k], noise[k] = solver.update(i, p)
    return Table(**common, pred_x=pred_x, pred_m=pred_m[:, :order], noise=noise if stochastic else None)
