"""Attention backends against a direct formula in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util_random import error

from jdit.nn import attention as module
from jdit.nn.attention import attention


def formula(q, k, v, lengths=None, causal=False):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bnhk,bshk->bhns", q, k) / np.sqrt(q.shape[-1])
    if lengths is not None:
        scores = np.where(np.arange(k.shape[1]) < np.asarray(lengths)[:, None, None, None], scores, -np.inf)
    if causal:
        scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhns,bshk->bnhk", weights / weights.sum(-1, keepdims=True), v)


def draw(n, s, h=2, d=16, b=2):
    keys = jax.random.split(jax.random.key(n), 3)
    shape = lambda tokens: (b, tokens, h, d)
    return [jax.random.normal(k, shape(t)) for k, t in zip(keys, (n, s, s))]


@pytest.mark.parametrize("name", ["xla", "chunked"])
@pytest.mark.parametrize("lengths", [None, [5, 9]])
@pytest.mark.parametrize("causal", [False, True])
def test_backends(name, lengths, causal):
    q, k, v = draw(7, 9)
    lengths = None if lengths is None else jnp.array(lengths)
    got = attention(q, k, v, kv_lengths=lengths, causal=causal, implementation=name)
    np.testing.assert_allclose(got, formula(q, k, v, lengths, causal), rtol=1e-5, atol=1e-6)


def test_chunks_cover_a_sequence_that_is_no_multiple():
    q, k, v = draw(module.CHUNK + 3, 5)
    np.testing.assert_allclose(attention(q, k, v, implementation="chunked"), formula(q, k, v), rtol=1e-5, atol=1e-6)


def test_a_causal_chunk_knows_where_it_starts():
    q, k, v = draw(n := module.CHUNK + 3, n, h=1, b=1)
    got = attention(q, k, v, causal=True, implementation="chunked")
    np.testing.assert_allclose(got, formula(q, k, v, causal=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_counted_key_stands_for_equal_keys(dtype):
    q, k, v = (a.astype(dtype) for a in draw(6, 5))
    repeat = lambda a: jnp.concatenate([a[:, :4], jnp.repeat(a[:, 4:], 256, axis=1)], 1)
    got = attention(q, k, v, key_counts=jnp.array([1.0, 1, 1, 1, 256]))
    assert error(got, formula(q, repeat(k), repeat(v))) < (1e-6 if dtype == jnp.float32 else 1e-2)


def test_choice_and_refusals():
    q, k, v = draw(4, 4)
    with pytest.raises(ValueError, match="unknown attention backends"):
        attention(q, k, v, implementation="flash9")
    with pytest.raises(NotImplementedError, match="cudnn: cuDNN attention needs an NVIDIA GPU"):
        attention(q, k, v, implementation="cudnn")
    long = jnp.zeros((1, module.DENSE_LIMIT + 1, 1, 8))
    with pytest.raises(NotImplementedError, match="dense limit"):
        attention(long, q[:1, :, :1, :8], v[:1, :, :1, :8], implementation="xla")
    text = str(jax.make_jaxpr(attention)(long, q[:1, :, :1, :8], v[:1, :, :1, :8]))
    assert f"{module.CHUNK},4]" in text and f"{module.DENSE_LIMIT + 1},4]" not in text
