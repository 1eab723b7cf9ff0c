"""What cuDNN's attention is given, and what is made of its results, without a GPU (the fixture `as_cudnn`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import draw, formula
from util_random import error

from jdit.nn import attention_cudnn as module
from jdit.nn.attention import attention
from jdit.nn.attention_cudnn import attention_to_all, filled, left_without
from jdit.nn.context_parallel import attend_parts
from jdit.sharding import Rules
from jdit.target import Target, compiling_for


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
        assert error(got[row], formula(q, k, v, lengths)[row]) < 1e-2


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
    """Queries far from every key, queries near one of them, the first included, which is the padding's; in float32.

    As exact as attention itself (1e-5), or as its scores, which are sums of 64 terms: float32 rounds them by about 8
    roundings of all terms. Where padding was seen this counts more often: with a weight w of the first key, P copies of
    it had P w times what is left.
    """
    q, k, v = draw(6, 300, d=64)
    k = 4 * k / jnp.linalg.norm(k[..., 1:], axis=-1, keepdims=True)
    for row in range(3):
        q = q.at[:, row].set(12 * k[:, 100 * row])
    k, q = k.at[..., 0].set(4.0), q.at[..., 0].set(offset)
    seen = np.array([296, 300])

    @jax.jit
    def taken_out(q, k, v):
        k, v = filled([k], [v], seen, most)
        out, lse = attention_to_all(q, k, v)
        left = left_without(k.shape[1] - seen, k[:, :1], q, lse)
        return out / left[..., None], lse + jnp.log(left)

    out, lse = taken_out(q, k, v)
    scores = np.einsum("bnhk,bshk->bnhs", *(np.asarray(a, np.float64) for a in (q, k))) / 8
    sums = np.stack([np.log(np.exp(row[..., :n]).sum(-1)) for row, n in zip(scores, seen)])
    first = np.exp(scores[..., 0] - sums)
    assert first[0, 0].min() > 0.99 and first[0, 1:3].max() < 0.01  # both kinds are here
    terms = np.einsum("bnhk,bhk->bnh", *(np.abs(np.asarray(a, np.float64)) for a in (q, k[:, 0]))) / 8
    bound = np.maximum(1e-5, 8 * 2.0**-24 * terms) * (1 + (384 - seen)[:, None, None] * first)
    want = formula(q, k, v, seen)
    assert (np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1) <= bound).all()
    assert (np.abs(lse - sums) <= bound).all()


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
        assert error(a, b) < 1e-2


@pytest.mark.parametrize("lengths", [None, (140, 151)])
def test_parts_are_written_behind_the_first(few, as_cudnn, lengths):
    """Padding behind either part, no queries of the last one, and gradients."""
    keys = jax.random.split(jax.random.key(3), 6)
    given = [jax.random.normal(key, (2, n, 2, 16), jnp.bfloat16) for key, n in zip(keys, (136, 136, 136, 24, 24, 24))]
    tokens, kv_lengths = (131, 20), None if lengths is None else jnp.array(lengths)

    def results(q, k, v, q2, k2, v2):
        parts = [(q, k, v), (q2, k2, v2)]
        out = attend_parts(parts, rules=Rules(), kv_lengths=kv_lengths, tokens=tokens)
        none = attend_parts([parts[0], (q2[:, :0], k2, v2)], rules=Rules(), kv_lengths=kv_lengths, tokens=tokens)
        return *out, none[0]

    want = [np.concatenate([np.asarray(a[:, :n], np.float64) for a, n in zip((given[i], given[3 + i]), tokens)], 1)
            for i in range(3)]  # fmt: skip
    want = formula(*want, lengths)
    got = jax.jit(results)(*given)
    assert as_cudnn == [(False, (2, 256, 2, 16), (2, 256, 2, 16))] * 2
    for out, part in zip(got, (want[:, :131], want[:, 131:], want[:, :131])):
        assert error(out[:, : part.shape[1]], part.reshape(*part.shape[:2], -1)) < 1e-2
    assert [a.shape[1] for a in got] == [136, 24, 136] and not np.asarray(got[0][:, 131:], np.float32).any()
    loss = lambda *a: sum((out.astype(jnp.float32) ** 2).sum() for out in results(*a))
    got = jax.jit(jax.grad(loss, range(6)))(*given)
    with compiling_for(Target("cpu")):
        wanted = jax.jit(jax.grad(loss, range(6)))(*given)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < 1e-2


def test_causality_is_told(as_cudnn):
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(131, 131, d=128))
    got = attention(q, k, v, causal=True, implementation="cudnn")
    assert as_cudnn and error(got, formula(q, k, v, causal=True)) < 1e-2


@pytest.mark.parametrize("d", [16, 128])
@pytest.mark.parametrize("lengths", [None, [9, 131]])
def test_gradients_are_of_even_lengths(as_cudnn, d, lengths):
    """jax refuses cuDNN's at odd ones."""
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(135, 131, d=d))
    kv_lengths = None if lengths is None else jnp.array(lengths)
    gradient = lambda name: jax.grad(
        lambda *a: (attention(*a, kv_lengths=kv_lengths, implementation=name).astype(jnp.float32) ** 2).sum(), (0, 1, 2)
    )
    got = jax.jit(gradient("cudnn"))(q, k, v)
    assert as_cudnn and all(q[1] % 2 == k[1] % 2 == 0 for _, q, k in as_cudnn)
    for a, b in zip(got, gradient("xla")(q, k, v), strict=True):
        assert error(a, b) < 1e-2
    as_cudnn.clear()
    attention(q, k, v, kv_lengths=kv_lengths, implementation="cudnn")
    n, s = (135, 131) if d == 16 else (256, 256)  # no gradient, nothing to make even
    assert as_cudnn == [(True, (2, n, 2, d), (2, s, 2, d))]
