"""A Gaussian mixture on the line: what a perfect network predicts of it, and where the exact flow takes a sample.

On the line the probability-flow ODE keeps quantiles: the solution that starts in x at one noise level is, at another,
the point with as much mass below it. So it is known without solving anything.
"""

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([-1.1, 0.3, 1.5])
STDS = np.array([0.35, 0.3, 0.25])


def x0(x, alpha, sigma):
    """E[x0 | x] at x = alpha x0 + sigma noise."""
    spread = alpha**2 * STDS**2 + sigma**2
    offset = x[..., None] - alpha * MEANS
    logits = jnp.log(WEIGHTS) - 0.5 * jnp.log(spread) - 0.5 * offset**2 / spread
    share = jnp.exp(logits - logits.max(-1, keepdims=True))
    return (share * (MEANS + alpha * STDS**2 / spread * offset)).sum(-1) / share.sum(-1)


def network(prediction):
    """The model (x, t, (alpha, sigma)) that predicts "epsilon", "v_prediction", "flow_prediction" or "sample"."""

    def model(x, t, levels):
        alpha, sigma = levels
        clean = x0(x, alpha, sigma)
        noise = (x - alpha * clean) / sigma
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow_prediction": noise - clean,
                "sample": clean}[prediction]  # fmt: skip

    return model


def below(x, alpha, sigma):
    """The mass below x at a noise level (host)."""
    spread = np.sqrt(alpha**2 * STDS**2 + sigma**2)
    return (WEIGHTS * ndtr((x[..., None] - alpha * MEANS) / spread)).sum(-1)


def quantile(mass, alpha, sigma):
    """The x with so much mass below it, by bisection (host)."""
    low, high = np.full_like(mass, -9.0), np.full_like(mass, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        less = below(middle, alpha, sigma) < mass
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return (low + high) / 2
