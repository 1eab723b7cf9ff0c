"""Holding the colours of one video to those of another, by their statistics (Reinhard et al. 2001, "Color transfer
between images"; along its decorrelated axes, but of the values as they are instead of their logarithms, so that a shift
that is affine stays so).

B batch, T frames, H W pixel rows and columns. Values in any range, [-1, 1] or [0, 1], neither rounded nor clipped.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AXES = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
"""Rows: brightness, yellow to blue, red to green; orthonormal (Ruderman et al. 1998)."""
FLAT = 1e-4
"""Standard deviation below which a channel is flat: it has no contrast to match."""
MOST_GAIN = 2.0
"""Contrast is at most doubled or halved: what differs more than that differs in what it shows."""


class Statistics(NamedTuple):
    """Of each video, along `AXES`."""

    mean: Float[Array, "B 3"]
    std: Float[Array, "B 3"]


def statistics(video: Float[Array, "B T H W 3"]) -> Statistics:
    """Mean and standard deviation over all frames and pixels, float32."""
    x = jnp.matmul(video.astype(jnp.float32), AXES.T.astype(np.float32), precision="highest")
    mean = x.mean((1, 2, 3))
    return Statistics(mean, jnp.sqrt(jnp.square(x - mean[:, None, None, None]).mean((1, 2, 3))))


def transfer(
    video: Float[Array, "B T H W 3"], own: Statistics, wanted: Statistics, strength: Float[Array, ""] | float = 1.0
) -> Float[Array, "B T H W 3"]:
    """The video, changed as takes statistics `own` to `wanted`; `strength` 0 leaves it as it is, 1 does all of it."""
    gain = wanted.std / jnp.maximum(own.std, FLAT)
    gain = jnp.where(jnp.minimum(own.std, wanted.std) < FLAT, 1.0, jnp.clip(gain, 1 / MOST_GAIN, MOST_GAIN))
    axes = AXES.astype(np.float32)
    matrix = jnp.matmul(
        axes.T * (gain - 1)[:, None], axes, precision="highest"
    )  # what is added: 0 where nothing differs
    offset = jnp.matmul(wanted.mean - gain * own.mean, axes, precision="highest")[:, None, None, None]
    x = video.astype(jnp.float32)
    change = jnp.matmul(x, matrix[:, None, None], precision="highest") + offset
    return (x + strength * change).astype(video.dtype)


def match(
    video: Float[Array, "B T H W 3"],
    own: Float[Array, "B t H W 3"],
    wanted: Float[Array, "B u H W 3"],
    strength: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B T H W 3"]:
    """The video, changed as gives `own`, a part of it, the statistics of `wanted`: a segment, its overlap, and those
    frames of the segment before that the overlap repeats. `strength` in [0, 1] is dynamic."""
    return transfer(video, statistics(own), statistics(wanted), strength)
