"""Colour matching: closed forms of what it must do to affine shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdit import colour


def frames(batch=2, time=3, seed=0):
    rng = np.random.default_rng(seed)
    mix = np.array([[0.5, 0.3, 0.2], [0.1, 0.4, 0.2], [0.0, 0.2, 0.3]])  # channels that go together, as in pictures
    return jnp.asarray(rng.uniform(-1, 1, (batch, time, 9, 11, 3)) @ mix + (0.1, -0.2, 0.05), jnp.float32)


def shift(x, gain, offset):
    """A gain and an offset along brightness, yellow to blue, and red to green, in plain formulas."""
    r, g, b = (x[..., i] for i in range(3))
    light, blue, red = (
        (r + g + b) / 3 * gain[0] + offset[0],
        (r + g - 2 * b) * gain[1] + offset[1],
        (r - g) * gain[2] + offset[2],
    )
    r_and_g = 2 * light + blue / 3
    return jnp.stack([(r_and_g + red) / 2, (r_and_g - red) / 2, light - blue / 3], -1)


def far(a, b):
    return float(jnp.abs(a - b).max())


def test_nothing_to_do():
    x = frames()
    assert far(colour.match(x, x, x), x) < 1e-6
    assert far(colour.match(x, x[:, :2], x[:, :2][:, ::-1, ::-1]), x) < 1e-6  # other places, equal statistics
    assert (colour.match(x, x, 3 * x + 1, 0.0) == x).all()
    assert far(shift(x, (1, 1, 1), (0, 0, 0)), x) < 1e-6


@pytest.mark.parametrize("gain", [(1.0, 1.0, 1.0), (1.2, 1.2, 1.2), (1.3, 0.8, 0.9)])
def test_an_affine_shift_is_undone(gain):
    """Known from the overlap alone, it is taken out of the whole segment."""
    x = frames()
    drifted = shift(x, gain, (0.1, -0.2, 0.05))
    assert far(colour.match(drifted, drifted[:, :1], x[:, :1]), x) < 2e-6
    half = colour.match(drifted, drifted[:, :1], x[:, :1], 0.5)
    assert far(half, (x + drifted) / 2) < 2e-6


def test_statistics_become_the_wanted():
    x, y = frames(), frames(seed=1) * 0.8 + 0.1
    got, want = colour.statistics(colour.match(x, x, y)), colour.statistics(y)
    assert far(got.mean, want.mean) < 1e-6 and far(got.std, want.std) < 1e-6


def test_each_of_a_batch_is_its_own():
    x, y = frames(), frames(seed=1)
    both = colour.match(x, x[:, :1], y)
    for i in range(2):
        assert far(both[i], colour.match(x[i : i + 1], x[i : i + 1, :1], y[i : i + 1])[0]) < 1e-6


def test_strength_is_dynamic():
    x, y = frames(), frames(seed=1)
    traced = []

    @jax.jit
    def run(strength):
        traced.append(strength)
        return colour.match(x, x, y, strength)

    assert far(run(jnp.float32(0.3)), colour.match(x, x, y, 0.3)) < 1e-6
    assert far(run(jnp.float32(0.9)), colour.match(x, x, y, 0.9)) < 1e-6
    assert len(traced) == 1


def test_flat_pictures_and_far_ones():
    """A flat picture only moves; contrast is at most doubled."""
    x, flat = frames(), jnp.full((2, 1, 9, 11, 3), 0.3)
    assert far(colour.match(flat, flat, flat + 0.2), flat + 0.2) < 1e-6
    means = x.mean((1, 2, 3))[:, None, None, None]
    assert far(colour.match(x, x, flat), x - means + 0.3) < 1e-6
    assert far(colour.match(x, x, 5 * x), 2 * (x - means) + 5 * means) < 1e-5


def test_bfloat16_stays():
    x = frames().astype(jnp.bfloat16)
    assert colour.match(x, x, x).dtype == jnp.bfloat16
