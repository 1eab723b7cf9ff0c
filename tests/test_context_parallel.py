"""Attention of tokens that are spread over devices equals that of one device, whatever they exchange."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import formula
from util_random import error

from jdit.nn import attention_lse, context_parallel, layers
from jdit.nn.attention import attention
from jdit.nn.attention_lse import MASKED, attention_with_lse, merge
from jdit.nn.context_parallel import attend, attend_frames, attend_parts, attend_whole, project
from jdit.nn.exchange import Form, choose
from jdit.nn.pieces import joined, split
from jdit.sharding import Rules, make_mesh
from jdit.target import Target, compiling_for

IMAGE, TEXT = 21, 9
LENGTHS, COUNTS = jnp.array([24, 30]), jnp.ones(IMAGE + TEXT).at[25].set(40.0)


def draw(seed, *tokens, heads, b=2, d=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    return tuple(jax.random.normal(k, (b, n, heads, d), dtype) for k, n in zip(keys, tokens))


def flat(a):
    return a.reshape(*a.shape[:2], -1)


def run(sizes, fn, *args):
    with jax.set_mesh(make_mesh(**sizes)):
        return jax.block_until_ready(jax.jit(fn)(*args))


@pytest.mark.parametrize(
    "heads, ways, exchange, form",
    [
        (24, 2, "auto", Form(2, 1, 24)),
        (24, 8, "auto", Form(8, 1, 24)),
        (38, 4, "auto", Form(2, 2, 38)),
        (38, 8, "auto", Form(2, 4, 38)),
        (12, 8, "auto", Form(4, 2, 12)),
        (5, 8, "auto", Form(1, 8, 5)),
        (38, 4, "ulysses", Form(4, 1, 40)),
        (24, 8, "ring", Form(1, 8, 24)),
        (24, 8, "ulysses_ring", Form(4, 2, 24)),
        (24, 2, "gather", Form(1, 2, 24, True)),
    ],
)
def test_choice(heads, ways, exchange, form):
    assert choose(heads, 16384, ways, exchange) == form


@pytest.mark.parametrize(
    "heads, keys, ways, exchange, form",
    [
        (40, 32760, 2, "auto", Form(1, 2, 40)),
        (5, 16384, 2, "auto", Form(1, 2, 5)),
        (40, 16383, 2, "auto", Form(2, 1, 40)),
        (40, 32760, 4, "auto", Form(4, 1, 40)),
        (40, 32760, 2, "ulysses", Form(2, 1, 40)),
    ],
)
def test_choice_on_gpus(heads, keys, ways, exchange, form):
    """Two of them are a ring for a long sequence."""
    with compiling_for(Target("gpu")):
        assert choose(heads, keys, ways, exchange) == form


@pytest.mark.parametrize("joint, processes", [(True, 1), (False, 2)])
def test_what_two_gpus_gather(joint, processes, monkeypatch):
    """Keys and values of parts, and what copy engines do not reach."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with compiling_for(Target("gpu")):
        assert choose(40, 32760, 2, "auto", joint=joint) == Form(1, 2, 40, True)


@pytest.mark.parametrize("counted", [False, True])
def test_a_ring_on_two_gpus_is_of_keys_that_are_not_counted(counted, monkeypatch):
    monkeypatch.setattr("jdit.nn.exchange.LONG", 13)
    q, k, v = draw(14, 13, 13, 13, heads=2)
    counts = jnp.arange(1.0, 14.0) if counted else None
    call = lambda *a: attend(*a, rules=Rules(), key_counts=counts)
    with compiling_for(Target("gpu")), jax.set_mesh(make_mesh(sequence=2, data=4)):
        sent = str(jax.make_jaxpr(call)(q, k, v))
    assert ("ppermute" in sent) == (not counted) and "all_to_all" not in sent


def test_what_cannot_be_had():
    with pytest.raises(
        ValueError, match=r"5 heads a device over 8 devices.*there are 'auto', 'ulysses', 'ring' and 'gather'"
    ):
        choose(5, 64, 8, "ulysses_ring")
    with pytest.raises(ValueError, match="exchange='flash'; there are auto, ulysses, ring, ulysses_ring, gather"):
        Rules(exchange="flash")
    with pytest.raises(ValueError, match="'exchange' is not a logical axis"):
        Rules().spec(("exchange",))


@functools.cache
def joint(heads, queries):
    """Parts of a joint sequence, whose text has so many queries, and attention among them."""
    parts = [draw(0, *(IMAGE,) * 3, heads=heads), draw(1, queries, TEXT, TEXT, heads=heads)]
    q, k, v = (jnp.concatenate(a, 1) for a in zip(*parts))
    return parts, flat(attention(q, k, v, kv_lengths=LENGTHS, key_counts=COUNTS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, heads, queries, exchange, said",
    [
        (dict(sequence=8), 8, TEXT, "auto", "ulysses over 8;"),
        (dict(sequence=8), 8, 0, "auto", "ulysses over 8;"),
        (dict(sequence=8), 6, TEXT, "auto", "ulysses over 2 x ring over 4;"),
        (dict(sequence=8), 6, TEXT, "ulysses", "ulysses over 8;.* heads 6 and 2 of zeros"),
        (dict(sequence=8), 3, TEXT, "auto", "ring over 8;"),
        (dict(sequence=8), 3, TEXT, "gather", "gather over 8;"),
        (dict(data=2, sequence=2, tensor=2), 6, 0, "gather", "gather over 2;"),
        (dict(data=2, sequence=4), 6, 0, "auto", "ulysses over 2 x ring over 2;"),
        (dict(data=2, sequence=2, tensor=2), 8, TEXT, "auto", "ulysses over 2;"),
        (dict(data=2, sequence=2, tensor=2), 6, 0, "auto", "ring over 2;"),
        (dict(data=2, sequence=2, tensor=2), 3, TEXT, "auto", "ulysses over 2;.* heads 3 and 1 of zeros"),
    ],
)
def test_parts_of_odd_lengths(sizes, heads, queries, exchange, said, caplog):
    """Text is cut by lengths, and one of its tokens counts 40 times; nobody reads the text in a last block."""
    parts, want = joint(heads, queries)
    context_parallel._log_choice.cache_clear()
    rules = Rules(exchange=exchange)
    with caplog.at_level(logging.INFO, "jdit"):
        got = run(
            sizes, lambda p, n, c: attend_parts(p, rules=rules, kv_lengths=n, key_counts=c), parts, LENGTHS, COUNTS
        )  # fmt: skip
    assert [g.shape[1] for g in got] == [IMAGE, queries]
    assert error(jnp.concatenate(got, 1), want) < 1e-5
    said_all = [r.message for r in caplog.records if "devices" in r.message]
    assert len(said_all) == 1 and re.search(said, said_all[0])


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ulysses", "ring", "ulysses_ring", "gather"])
@pytest.mark.parametrize("tokens", [16, 13, 9])
def test_one_sequence(tokens, exchange):
    """The last devices have fewer tokens than the others, or none (9 tokens over 8 devices are 2, 2, 2, 2 and 1)."""
    q, k, v = draw(2, tokens, tokens, tokens, heads=6)
    got = run(dict(sequence=8), lambda *a: attend(*a, rules=Rules(exchange=exchange)), q, k, v)
    np.testing.assert_allclose(got, flat(formula(q, k, v)), rtol=1e-4, atol=1e-5)


def test_queries_keys_and_values_apart(monkeypatch):
    """Each of a long sequence's is sent by itself; what an exchange or a caller pads with is not attended to."""
    monkeypatch.setattr("jdit.nn.exchange.LONG", 13)
    q, k, v = draw(2, 13, 13, 13, heads=8)
    padded = [jnp.pad(a, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=5.0) for a in (q, k, v)]
    for some in ((q, k, v), padded):
        got = run(dict(sequence=8), lambda *a: attend(*a, rules=Rules(), tokens=13), *some)
        assert got.shape[1] == some[0].shape[1]
        np.testing.assert_allclose(got[:, :13], flat(formula(q, k, v)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads, queries", [(8, TEXT), (8, 0), (6, TEXT)])
def test_parts_of_a_long_sequence(heads, queries, monkeypatch):
    """Values and all text, then keys, then queries: each is made once the one before can be sent."""
    parts, want = joint(heads, queries)
    call = lambda p, n, c: attend_parts(p, rules=Rules(), kv_lengths=n, key_counts=c)
    monkeypatch.setattr("jdit.nn.exchange.LONG", IMAGE)
    got = run(dict(sequence=8), call, parts, LENGTHS, COUNTS)
    assert [g.shape[1] for g in got] == [IMAGE, queries]
    assert error(jnp.concatenate(got, 1), want) < 1e-5
    with jax.set_mesh(make_mesh(sequence=8)):
        waits = lambda: str(jax.make_jaxpr(lambda *a: call(*a))(parts, LENGTHS, COUNTS)).count("optimization_barrier")
        assert waits() == 3
        monkeypatch.setattr("jdit.nn.exchange.LONG", IMAGE + 1)
        assert waits() == 0


def test_keys_and_values_are_sent_beside_products():
    """Each product that hides a sending waits for what is sent; the last waits for values to have come."""
    fused = layers.fused_linear(16, 3, 16, ("embed", "heads"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    turn = lambda a: a.reshape(*a.shape[:2], 2, 8)
    call = lambda x: project(fused, x, turn, turn, 2, Rules(exchange="gather"))
    with jax.set_mesh(make_mesh(sequence=8)):
        steps = jax.make_jaxpr(call)(jnp.zeros((1, 16, 16))).eqns
    behind: dict = {}  # of a value: the products and sendings that it waits for
    seen = []
    for i, step in enumerate(steps):
        past = set().union(*(behind.get(a, set()) for a in step.invars if not hasattr(a, "val")))
        name = str(step.primitive)
        if name in ("dot_general", "shard_map"):
            seen.append((name, len([p for p in past if p[1] == "dot_general"]), len(past)))
            past = past | {(i, name)}
        behind |= dict.fromkeys(step.outvars, past)
    # in order of products: values; keys, which wait for them; queries, which wait for both and for values to have come
    assert [s[1:] for s in seen if s[0] == "dot_general"] == [(0, 0), (1, 1), (2, 3)]
    assert sorted(s[1:] for s in seen if s[0] == "shard_map") == [(1, 1), (2, 2)]


SPREAD = [dict(sequence=8), dict(data=2, sequence=2, tensor=2)]


@pytest.mark.parametrize("sizes", SPREAD, ids=["sequence8", "2x2x2"])
@pytest.mark.parametrize("tokens", [21, 5])
def test_keys_that_are_whole(sizes, tokens):
    """Fewer tokens than devices are not spread."""
    q, k, v = draw(3, tokens, 9, 9, heads=3)
    lengths, counts = jnp.array([5, 9]), jnp.ones(9).at[2].set(3.0)
    call = lambda *a: attend(*a[:3], rules=Rules(), whole_keys=True, kv_lengths=a[3], key_counts=a[4])
    want = flat(attention(q, k, v, kv_lengths=lengths, key_counts=counts))
    assert error(run(sizes, call, q, k, v, lengths, counts), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SPREAD, ids=["sequence8", "2x2x2"])
@pytest.mark.parametrize("frames, tokens", [(5, 9), (13, 3), (2, 40)])
def test_frames_that_end_within_a_slice(sizes, frames, tokens):
    (q,) = draw(4, frames * tokens, heads=6)
    k, v = (jax.random.normal(jax.random.key(i), (2, frames, 4, 6, 8)) for i in (5, 6))
    want = [formula(q[:, f * tokens : (f + 1) * tokens], k[:, f], v[:, f]) for f in range(frames)]
    call = lambda *a: attend_frames(*a, rules=Rules())
    assert error(run(sizes, call, q, k, v), flat(np.concatenate(want, 1))) < 1e-5
    assert error(call(q, k, v), flat(np.concatenate(want, 1))) < 1e-5


@pytest.mark.parametrize("sizes", SPREAD, ids=["sequence8", "2x2x2"])
def test_causal_sequences_stay_whole(sizes):
    q, k, v = draw(7, 11, 11, 11, heads=8)
    got = run(sizes, lambda *a: attend_whole(*a, rules=Rules(), causal=True), q, k, v)
    assert error(got, flat(formula(q, k, v, causal=True))) < 1e-5


@pytest.mark.parametrize("sizes, heads", [(dict(sequence=8), 6), (dict(data=2, sequence=2, tensor=2), 4)])
def test_gradients(sizes, heads):
    """Through all-to-all, ring, merging and, added to it, attention to keys that are whole."""
    parts, _ = joint(heads, TEXT)
    text = draw(8, 7, 7, heads=heads)

    def loss(parts, text, seen, across):
        q = parts[0][0]
        out = jnp.concatenate(seen(parts), 1)
        return (jnp.sin(out) * jnp.arange(out.shape[-1])).sum() + jnp.cos(3 * across(q, *text)).sum()

    one = lambda parts: [flat(attention(*(jnp.concatenate(a, 1) for a in zip(*parts)), kv_lengths=LENGTHS))]
    alone = jax.grad(functools.partial(loss, seen=one, across=lambda *a: flat(attention(*a))), (0, 1))
    rules = Rules()
    seen = lambda parts: attend_parts(parts, rules=rules, kv_lengths=LENGTHS)
    across = lambda *a: attend(*a, rules=rules, whole_keys=True)
    got = run(sizes, jax.grad(functools.partial(loss, seen=seen, across=across), (0, 1)), parts, text)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(alone)(parts, text)), strict=True):
        assert error(a, b) < 1e-5


def test_ring_in_bfloat16_is_as_exact_as_plain_attention():
    q, k, v = draw(9, 40, 40, 40, heads=3, d=32, dtype=jnp.bfloat16)
    want = flat(formula(q, k, v))
    plain = error(flat(attention(q, k, v)), want)
    ring = error(run(dict(sequence=8), lambda *a: attend(*a, rules=Rules(exchange="ring")), q, k, v), want)
    assert 0 < ring <= 1.2 * plain < 1e-2


RINGS = [
    (dict(sequence=8), 1100, 1100, (1099, 70)),  # of a short sample some devices have nothing at all
    (dict(sequence=8), 1100, 1100, None),  # slices are padded, the last ones with more
    (dict(data=2, sequence=4), 1100, 1100, (1099, 70)),
    (dict(sequence=8), 1024, 600, None),  # devices that have padding alone
    (dict(sequence=8), 1024, 1000, None),  # whole tiles: padding of the last device is taken out in the end
    (dict(data=2, sequence=4), 1024, 1000, None),
    (dict(sequence=8), 1024, 1024, None),
]


# on newer versions of Python and jax one ring is enough
@pytest.mark.parametrize(
    "sizes, held, tokens, lengths",
    [pytest.param(*ring, marks=[pytest.mark.slow] if i else []) for i, ring in enumerate(RINGS)],
)
def test_a_ring_of_cudnn(sizes, held, tokens, lengths, as_cudnn):
    """Queries near a key see little else: the first key of the last slice, which its padding repeats, and the first."""
    q, k, v = draw(13, held, held, held, heads=2, dtype=jnp.bfloat16)
    for row, of in enumerate((0, tokens - 1, 896, 768)):
        q = q.at[:, row].set(4 * k[:, min(of, tokens - 1)])
    kv_lengths = None if lengths is None else jnp.array(lengths)
    call = lambda *a: attend(*a, rules=Rules(exchange="ring"), kv_lengths=kv_lengths, tokens=tokens)
    want = flat(attention(q[:, :tokens], k[:, :tokens], v[:, :tokens], kv_lengths=kv_lengths, implementation="xla"))
    got = run(sizes, call, q, k, v)[:, :tokens]
    assert len(as_cudnn) == sizes["sequence"] and error(got, want) < 1e-2
    assert max(error(got[:, row], want[:, row]) for row in range(8)) < 1e-2

    def gradients(q, k, v):
        weights = jnp.cos(jnp.arange(tokens * 16.0)).reshape(tokens, 16)
        return jax.grad(lambda *a: (call(*a)[:, :tokens] * weights).sum(), (0, 1, 2))(q, k, v)

    got = run(sizes, gradients, q, k, v)
    with compiling_for(Target("cpu")):
        wanted = run(sizes, gradients, q, k, v)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("chunk", [4, 1024])
def test_log_sum_exp(chunk, monkeypatch):
    monkeypatch.setattr(attention_lse, "CHUNK", chunk)
    q, k, v = draw(10, 11, 7, 7, heads=2)
    bias = jnp.array([[0.0, 1, MASKED, 0, 2, MASKED, MASKED], [0.0, 0, 0, 0, 0, 0, MASKED]])
    out, lse = attention_with_lse(q, k, v, bias)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bnhk,bshk->bnhs", q, k) / np.sqrt(8) + np.asarray(bias, np.float64)[:, None, None]
    total = np.exp(scores).sum(-1)
    np.testing.assert_allclose(lse, np.log(total), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        out, np.einsum("bnhs,bshk->bnhk", np.exp(scores) / total[..., None], v), rtol=1e-5, atol=1e-6
    )


def test_keys_that_nobody_sees_have_no_weight():
    q, k, v = draw(11, 3, 4, 4, heads=1)
    seen, unseen = (attention_with_lse(q, k, v, jnp.full((1, 4), bias)) for bias in (0.0, MASKED))
    for both in (merge(seen, unseen), merge(unseen, seen)):
        assert all(np.array_equal(a, b) for a, b in zip(both, seen))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(5)), st.integers(1, 4), st.floats(0.1, 30))
def test_parts_merge_in_any_order_and_grouping(seed, order, first, scale):
    rng = np.random.default_rng(seed)
    numbers = lambda scale, *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    parts = [(numbers(1, 1, 2, 3, 4), numbers(scale, 1, 2, 3)) for _ in order]
    want = functools.reduce(merge, parts)
    shuffled = [parts[i] for i in order]
    got = merge(functools.reduce(merge, shuffled[:first]), functools.reduce(merge, shuffled[first:]))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_joining_is_concatenation(axis):
    shape = lambda n: tuple(n if i == axis else 3 for i in range(3))
    pieces = [np.random.default_rng(n).normal(size=shape(n)).astype(np.float32) for n in (2, 0, 4, 1)]
    whole = joined([jnp.asarray(p) for p in pieces], axis)
    np.testing.assert_array_equal(whole, np.concatenate(pieces, axis))
    for got, want in zip(split(whole, [2, 0, 4, 1], axis), pieces, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("sizes", [None, dict(data=8), dict(data=4, tensor=2)], ids=["one", "data8", "4x2"])
def test_nothing_is_exchanged_where_tokens_are_not_spread(sizes):
    parts, _ = joint(8, TEXT)
    call = lambda parts: attend_parts(parts, rules=Rules(exchange="ring"), kv_lengths=LENGTHS, key_counts=COUNTS)
    trace = lambda: str(jax.make_jaxpr(call)(parts))
    if sizes is None:
        text = trace()
    else:
        with jax.set_mesh(make_mesh(**sizes)):
            text = trace()
    assert "shard_map" not in text
    with jax.set_mesh(make_mesh(sequence=2)):
        assert "shard_map" in trace()


def test_the_axis_may_have_another_name_and_be_several():
    """W = 4 of two mesh axes, U = 2 and R = 2 across them."""
    q, k, v = draw(12, 13, 13, 13, heads=6)
    rules = dataclasses.replace(Rules(), batch=None, seq=("data", "sequence"), attn="tensor")
    got = run(dict(data=2, sequence=2, tensor=1), lambda *a: attend(*a, rules=rules), q, k, v)
    assert error(got, flat(formula(q, k, v))) < 1e-5
