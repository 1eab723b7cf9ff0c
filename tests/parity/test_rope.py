"""Rotary positions against diffusers' tables and both layouts of its application."""

import jax
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

from jdit.nn.rope import apply_rope, grid_positions, grid_rope, rope_table

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize("theta", [256.0, 10000.0])
def test_three_axes(layout, theta):
    sizes, dims = (3, 5, 7), (4, 8, 12)
    positions = grid_positions(*sizes)
    theirs = [get_1d_rotary_pos_embed(d, torch.from_numpy(p), theta, use_real=True, freqs_dtype=torch.float64)
              for d, p in zip(dims, positions)]  # fmt: skip
    cos, sin = (torch.cat([t[i] for t in theirs], -1).float() for i in range(2))
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 105, 2, 24)))
    given = torch.from_numpy(x.copy()).transpose(1, 2)
    if layout == "pairs":
        want = apply_rotary_emb(given, (cos, sin)).transpose(1, 2).numpy()
    else:
        half = lambda t: torch.cat([t[:, ::2], t[:, ::2]], -1)
        want = apply_rotary_emb(given, (half(cos), half(sin)), use_real_unbind_dim=-2).transpose(1, 2).numpy()
    got = apply_rope(x, rope_table(positions, dims, theta), layout)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-6


def test_scores_depend_on_distance_alone():
    q, k = np.asarray(jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 16)))
    score = lambda i, j: float(
        (apply_rope(q, rope_table([np.array([i])], [16])) * apply_rope(k, rope_table([np.array([j])], [16]))).sum()
    )
    assert score(3, 10) == pytest.approx(score(103, 110), abs=1e-4)
    assert score(3, 10) != pytest.approx(score(3, 11), abs=1e-2)


def test_refusals():
    with pytest.raises(ValueError, match="must be even"):
        rope_table([np.arange(3)], [5])
    with pytest.raises(ValueError, match="'pairs' and 'halves'"):
        apply_rope(np.zeros((1, 3, 1, 4)), rope_table([np.arange(3)], [4]), "rows")  # type: ignore[arg-type]


def test_grid_is_the_table_of_its_cells():
    axes, dims = [np.arange(3) + 0.5, np.arange(5), np.linspace(0, 9, 7)], (4, 8, 12)
    cells = [a.reshape(-1) for a in np.meshgrid(*axes, indexing="ij")]
    for got, want in zip(grid_rope(axes, dims, 256.0), rope_table(cells, dims, 256.0)):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="one for each of the 3 axes"):
        grid_rope(axes, (4, 8))
