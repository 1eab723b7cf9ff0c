"""What cuDNN's attention is given, and what is made of its results, without a GPU (the fixture `as_cudnn`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import draw, formula

from jdit.nn import attention_cudnn as module
from jdit.nn.attention import attention
from jdit.nn.attention_cudnn import attention_to_filled, filled


def relative(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "FILL_FROM", 64)


@pytest.mark.parametrize("d", [16, 128])
@pytest.mark.parametrize("lengths", [None, [1, 300], [131, 256]])
def test_long_sequences_have_no_mask(few, as_cudnn, d, lengths):
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(135, 300, d=d))
    kv_lengths = None if lengths is None else jnp.array(lengths)
    got = jax.jit(lambda *a: attention(*a, kv_lengths=kv_lengths, implementation="cudnn"))(q, k, v)
    assert as_cudnn == [(False, (2, 256, 2, d), (2, 384, 2, d))]
    assert got.shape == q.shape and got.dtype == q.dtype
    for row in range(2):
        assert relative(got[row], formula(q, k, v, lengths)[row]) < 1e-2


def test_a_mask_stays_where_it_costs_less(few, as_cudnn):
    """Few queries or keys, more where heads are small, a query that sees no later key; and none is needed for whole
    tiles of keys."""
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(131, 131, d=128))
    small = [a[:, :127, :, :64] for a in (q, k, v)]
    attention(q[:, :63], k, v, implementation="cudnn")
    attention(q, k[:, :63], v[:, :63], implementation="cudnn")
    attention(q, k, v, causal=True, implementation="cudnn")
    attention(q[..., :64], *small[1:], implementation="cudnn")
    attention(small[0], k[..., :64], v[..., :64], implementation="cudnn")
    assert [masked for masked, *_ in as_cudnn] == [True] * 5
    as_cudnn.clear()
    attention(q, k[:, :128], v[:, :128], implementation="cudnn")
    assert as_cudnn == [(False, (2, 131, 2, 128), (2, 128, 2, 128))]


@pytest.mark.parametrize("most", [None, 4, 9])
@pytest.mark.parametrize("offset", [-60.0, 0.0, 60.0])
def test_padding_is_taken_out_whatever_the_scores(as_cudnn, offset, most):
    """Queries far from every key, queries near one of them, the first included, which is the padding's; in float32."""
    q, k, v = draw(6, 300, d=16)
    k = 4 * k / jnp.linalg.norm(k[..., 1:], axis=-1, keepdims=True)
    for row in range(3):
        q = q.at[:, row].set(12 * k[:, 100 * row])
    k, q = k.at[..., 0].set(4.0), q.at[..., 0].set(offset)
    seen = jnp.array([296, 300])
    out, lse = jax.jit(lambda q, k, v: attention_to_filled(*filled(q, k, v, seen, most), seen))(q, k, v)
    want = formula(q, k, v, seen)
    assert np.abs(want[0, 0] - np.asarray(v, np.float64)[0, 0]).max() < 1e-2  # the first key is all it sees
    np.testing.assert_allclose(out, want, rtol=2e-3, atol=1e-3)
    scores = np.einsum("bnhk,bshk->bnhs", *(np.asarray(a, np.float64) for a in (q, k))) / 4
    sums = [np.log(np.exp(row[..., :n]).sum(-1)) for row, n in zip(scores, seen)]
    np.testing.assert_allclose(lse, np.stack(sums), rtol=1e-5, atol=1e-3)


def test_what_the_padding_holds_does_not_matter(few, as_cudnn):
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(130, 300))
    lengths = jnp.array([200, 150])
    call = lambda k, v: attention(q, k, v, kv_lengths=lengths, implementation="cudnn")
    other = lambda a: jnp.where((jnp.arange(300) < lengths[:, None])[..., None, None], a, 50.0).astype(a.dtype)
    np.testing.assert_array_equal(call(k, v), call(other(k), other(v)))


def test_gradients_are_those_of_the_mask(few, as_cudnn):
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(130, 132, d=128))
    lengths = jnp.array([132, 40])
    gradient = lambda name: jax.grad(
        lambda *a: (attention(*a, kv_lengths=lengths, implementation=name).astype(jnp.float32) ** 2).sum(), (0, 1, 2)
    )
    got = jax.jit(gradient("cudnn"))(q, k, v)
    assert as_cudnn and all(masked for masked, *_ in as_cudnn)
    for a, b in zip(got, gradient("xla")(q, k, v), strict=True):
        assert relative(a, b) < 1e-2
