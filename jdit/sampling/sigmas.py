"""Noise schedules on the host. Functions keep the float width that they are given, as the references' rounding asks."""

import itertools
import logging
import math

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv

from jdit.sampling.table import Grid

log = logging.getLogger("jdit")

Sigmas = Float[np.ndarray, "S"]
SHIFTS = ("exponential", "linear")


def static_shift(sigmas: Sigmas, shift: float) -> Sigmas:
    """s sigma / (1 + (s - 1) sigma): the flow schedule for s times the noise (arXiv 2403.03206, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(sigmas: Sigmas, mu: float, kind: str = "exponential") -> Sigmas:
    """The same shift by a factor that follows the resolution: e^mu ("exponential") or mu ("linear").

    Raises:
        ValueError: another kind, or a linear mu that is not positive.
    """
    if kind not in SHIFTS:
        raise ValueError(f"time_shift_type={kind!r} is unknown; there are {', '.join(SHIFTS)}")
    if kind == "linear" and not mu > 0:
        raise ValueError(f"mu={mu} must be positive with time_shift_type='linear'")
    if kind == "exponential" and not abs(mu) < 80:
        raise ValueError(f"mu={mu} must lie within (-80, 80): the shift is its exponential")
    factor = math.exp(mu) if kind == "exponential" else mu
    with np.errstate(divide="ignore"):
        return factor / (factor + (1 / sigmas - 1))


def stretch_to(sigmas: Sigmas, terminal: float) -> Sigmas:
    """Stretch 1 - sigma so that the last sigma is `terminal` (LTX-Video's schedule).

    Raises:
        ValueError: the last sigma is 1, which no stretch moves.
    """
    rest = 1 - sigmas
    if rest[-1] == 0:
        raise ValueError(f"shift_terminal={terminal} cannot be reached: the last sigma is 1 (take more steps)")
    return 1 - rest / (rest[-1] / (1 - terminal))


def karras(first: float, last: float, steps: int, rho: float = 7.0) -> Sigmas:
    """Evenly spaced in sigma^(1/rho) (arXiv 2206.00364, equation 5)."""
    ramp = np.linspace(0, 1, steps)
    return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho


def exponential(first: float, last: float, steps: int) -> Sigmas:
    """Evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(first), math.log(last), steps))


def uniform_log_snr(first: float, last: float, steps: int) -> Sigmas:
    """Evenly spaced in lambda (arXiv 2206.00927, section 3.3): `exponential`, of logarithms rounded to float32."""
    return np.exp(np.linspace(float(np.log(np.float32(first))), float(np.log(np.float32(last))), steps))


def beta(first: float, last: float, steps: int, a: float = 0.6, b: float = 0.6) -> Sigmas:
    """Quantiles of a Beta(a, b) distribution (arXiv 2407.12173)."""
    return last + betaincinv(a, b, 1 - np.linspace(0, 1, steps)) * (first - last)


SPACINGS = {"use_karras_sigmas": karras, "use_exponential_sigmas": exponential, "use_beta_sigmas": beta,
            "use_lu_lambdas": uniform_log_snr}  # fmt: skip


def betas(kind: str, first: float, last: float, n: int, *, wide: bool = False) -> Sigmas:
    """Noise added by each of n training steps, float32: "linear", "scaled_linear" (linear in the root) or
    "squaredcos_cap_v2" (cosine, arXiv 2102.09672, at most 0.999). `wide` keeps "scaled_linear" in float64.

    Raises:
        ValueError: another kind.
    """
    if kind == "linear":
        return _linspace32(first, last, n)
    if kind == "scaled_linear" and wide:
        return np.linspace(first**0.5, last**0.5, n) ** 2
    if kind == "scaled_linear":
        return _linspace32(first**0.5, last**0.5, n) ** 2
    if kind == "squaredcos_cap_v2":
        bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)], np.float32)
    raise ValueError(f"beta_schedule={kind!r} is unknown; there are linear, scaled_linear, squaredcos_cap_v2")


def _linspace32(first: float, last: float, n: int) -> Sigmas:
    """Evenly spaced, each half counted from its own end with a float32 step, as torch does."""
    a, b = np.float32(first), np.float32(last)
    step, i = (b - a) / np.float32(max(n - 1, 1)), np.arange(n)
    # one rounding: torch's kernel fuses the product and the sum
    up, down = a + np.float64(step) * i, b - np.float64(step) * (n - 1 - i)
    return np.where(i < n / 2, up, down).astype(np.float32)


def _cumprod32(x: Sigmas) -> Sigmas:
    return np.cumprod(x, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(bar: Sigmas) -> Sigmas:
    """alpha^2 of every training step, shifted and stretched so that the last is 0 (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(bar)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def zero_terminal_snr(betas: Sigmas) -> Sigmas:
    """Betas of which the last training step is pure noise."""
    bar = _zero_terminal_snr(_cumprod32(1 - betas))
    return 1 - np.append(bar[:1], bar[1:] / bar[:-1])


def shifted_levels(betas: Sigmas, snr_shift: float, *, zero_snr: bool = False) -> Float[np.ndarray, "T"]:
    """alpha^2 of every training step of CogVideoX (arXiv 2408.06072): the signal-to-noise ratio is divided by
    `snr_shift`, then the last level is brought to 0. Keeps the float width of `betas`."""
    bar = np.cumprod(1 - betas) if betas.dtype == np.float64 else _cumprod32(1 - betas)
    bar = bar / (snr_shift + (1 - snr_shift) * bar)
    return _zero_terminal_snr(bar) if zero_snr else bar


def training_sigmas(betas: Sigmas, *, zero_snr: bool = False) -> Sigmas:
    """sigma / alpha of every training step, rising, float32. With `zero_snr` the last is large instead of infinite."""
    bar = _cumprod32(1 - (zero_terminal_snr(betas) if zero_snr else betas))
    if zero_snr:
        bar[-1] = 2**-24
    return np.sqrt((1 - bar) / bar)


def spaced_timesteps(
    spacing: str, n: int, steps: int, offset: int = 0, *, last: int | None = None, to_zero: bool = False
) -> Float[np.ndarray, "S"]:
    """Training steps to visit, falling whole numbers (arXiv 2305.08891, table 2).

    For a few counts (61, 103, 121 and 122 of 1000) "trailing" rounds one step more through, at timestep -1, as the
    reference does: that is logged.

    Args:
        spacing: "linspace", "leading" or "trailing".
        n: number of training steps.
        offset: added with "leading".
        last: begin below this training step instead of n.
        to_zero: "linspace" and "leading" visit training step 0, as DDIM does; multistep solvers stop before it.

    Raises:
        ValueError: an unknown spacing, more steps than there are training steps, or an offset beyond them.
    """
    last = n if last is None else last
    count = steps if to_zero else steps + 1
    if steps + (spacing == "leading" and not to_zero) > last:
        raise ValueError(f"steps={steps}: too many for {last} training steps and timestep_spacing={spacing!r}")
    if spacing == "linspace":
        return np.linspace(0, last - 1, count).round()[::-1][:steps]
    if spacing == "leading":
        timesteps = (np.arange(count) * (last // count))[::-1][:steps] + float(offset)
        if not 0 <= timesteps[-1] <= timesteps[0] < n:
            raise ValueError(f"steps_offset={offset}: leads out of the {n} training steps")
        return timesteps
    if spacing == "trailing":
        timesteps = np.arange(last, 0, -n / steps).round() - 1
        if len(timesteps) > steps:
            log.warning("steps=%d: rounding adds a step at timestep -1; one step more or less avoids it", steps)
        return timesteps
    raise ValueError(f"timestep_spacing={spacing!r} is unknown; there are linspace, leading, trailing")


def timestep_of(sigmas: Sigmas, training: Sigmas) -> Sigmas:
    """Fractional training steps of noise levels: linear in log sigma between the training sigmas."""
    log_training, log_sigma = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    reached = log_sigma[:, None] >= log_training
    # the last one reached: with zero terminal SNR the levels before the last can lie above it, so no binary search
    low = np.where(reached.any(1), len(training) - 1 - reached[:, ::-1].argmax(1), 0)
    low = np.minimum(low, len(training) - 2)
    a, b = log_training[low], log_training[low + 1]
    w = np.clip((a - log_sigma) / (a - b), 0, 1)
    return (1 - w) * low + w * (low + 1)


def diffusion_grid(sigmas: Float[np.ndarray, "S+1"], timesteps: Sigmas) -> Grid:
    """Variance-preserving grid, alpha^2 + sigma^2 = 1, from sigma / alpha rounded to float32. Levels may rise: with
    zero terminal SNR the last training level, cut at 4096, lies below some before it.

    Raises:
        ValueError: sigmas that are negative or not finite.
    """
    s = np.asarray(sigmas, np.float32).astype(np.float64)
    if not (np.isfinite(s) & (s >= 0)).all():
        raise ValueError(f"sigmas must be finite and at least 0: {excerpt(s)}")
    alpha = 1 / np.sqrt(s**2 + 1)
    return Grid(alpha, s * alpha, np.asarray(timesteps, np.float32))


def flow_grid(sigmas: Float[np.ndarray, "S+1"], timesteps: Sigmas, *, inverted: bool = False) -> Grid:
    """Grid of a flow, alpha = 1 - sigma, sigmas rounded to float32 before anything is computed from them.

    Args:
        sigmas: noise levels, the final one included.
        timesteps: what the network sees.
        inverted: `sigmas` count from noise (0) to sample (1).

    A shift rounded to float32 can pass 1 by an ulp, and the final level, where it is the smallest training sigma, can
    lie above the one before: both stay as the reference has them.

    Raises:
        ValueError: sigmas that are not finite.
    """
    s = np.asarray(sigmas, np.float32).astype(np.float64)
    if not np.isfinite(s).all():
        raise ValueError(f"sigmas must be finite: {excerpt(s)}")
    alpha, sigma = (s, 1 - s) if inverted else (1 - s, s)
    return Grid(alpha, sigma, np.asarray(timesteps, np.float32))


def given_sigmas(sigmas, steps: int) -> Sigmas:
    """A user's noise levels of a flow, checked. float32 stays so: the reference's rounding depends on it.

    Raises:
        ValueError: another number of them than steps, values outside [0, 1], or rising ones.
    """
    s = np.asarray(sigmas)
    s = s if s.dtype == np.float32 else s.astype(np.float64)
    if s.shape != (steps,):
        raise ValueError(f"sigmas has shape {s.shape}: {steps} steps need {steps} numbers")
    if not ((s >= 0) & (s <= 1)).all():
        raise ValueError(f"sigmas must lie in [0, 1]: {excerpt(s)}")
    if (np.diff(s) > 0).any():
        raise ValueError(f"sigmas must not rise: {excerpt(s)}")
    return s


def excerpt(s: np.ndarray) -> str:
    return np.array2string(s, precision=6, threshold=8, edgeitems=3)
