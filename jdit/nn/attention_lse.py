"""Attention to some of the keys, with what is needed to merge it with attention to the others.

B batch, N query tokens, S key tokens, H heads, K head dim. The log-sum-exp of a query's scores is float32 whatever the
compute dtype: in bfloat16 its steps between 8 and 16 are 1/16, which is 3% in the weights that merge two parts.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdit.nn.attention import log_choice
from jdit.nn.attention_cudnn import Keys, Queries, apart, attention_to_filled, filled, takes

CHUNK = 1024
"""Query rows whose scores are in memory at once."""
MASKED = -1e30
"""The bias of a key that is not seen. Finite, so that a query that sees none of these keys has numbers, and merges with
weight 0."""

Partial = tuple[Float[Array, "B N H K"], Float[Array, "B N H"]]


def fill(q: Queries, k: Keys, v: Keys, seen: Int[Array, "B"], most: int | None = None) -> tuple[Queries, Keys, Keys]:
    """What `attention_to_first` takes, of queries and the first `seen` keys; once where keys are made, not by all who
    get them. `most` as of `filled`."""
    return (apart(q), *filled([k], [v], seen, most)) if takes(q, k) else (q, k, v)


def attention_to_first(q: Queries, k: Keys, v: Keys, seen: Int[Array, "B"]) -> Partial:
    """`attention_with_lse` to the first `seen` keys, which may be none, of those that `fill` gave: by cuDNN where it
    takes them. Its gradients are those of plain XLA, since cuDNN's know nothing of the log-sum-exp's."""
    name, attend = ("cudnn", _cudnn) if takes(q, k) else ("xla", _plain_to_first)
    log_choice(f"{name} with log-sum-exps", q.shape, k.shape, str(q.dtype))
    return attend(q, k, v, seen)


def _plain_to_first(q, k, v, seen) -> Partial:
    return attention_with_lse(q, k, v, jnp.where(jnp.arange(k.shape[1]) < seen[:, None], 0.0, MASKED))


@jax.custom_vjp
def _cudnn(q, k, v, seen) -> Partial:
    out, left, lse = attention_to_filled(q, k, v, seen)
    return out.astype(jnp.float32) / left[..., None], jnp.where((seen > 0)[:, None, None], lse, MASKED)


def _cudnn_forward(q, k, v, seen):
    return _cudnn(q, k, v, seen), (q, k, v, seen)


def _cudnn_backward(given, g):
    q, k, v, seen = given
    _, back = jax.vjp(functools.partial(_plain_to_first, seen=seen), q, k, v)
    return *back(g), None


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)


def attention_with_lse(
    q: Float[Array, "B N H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"], bias: Float[Array, "B|1 S"]
) -> Partial:
    """softmax(q k^T / sqrt(K) + bias) v, and the log of the softmax's denominator, both float32.

    Plain XLA, a chunk of queries at a time, and recomputed for gradients. On a GPU its scores cross memory, about 12
    bytes a score against 4 K flops: at K = 128 and an H100's 3 TB/s some 4 ps where cuDNN takes 0.9 ps (estimated, not
    measured). `bias`, which cuts padding by `MASKED` and counts keys, could ride on further head dims as in
    `attention`'s key_counts, for a kernel.
    """
    b, n, h, d = q.shape

    @jax.checkpoint
    def rows(q):
        logits = jnp.einsum("bnhk,bshk->bhns", q, k, preferred_element_type=jnp.float32) * d**-0.5
        logits = logits + bias[:, None, None]
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bhns,bshk->bnhk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out / total.transpose(0, 2, 1, 3), (top + jnp.log(total))[..., 0].swapaxes(1, 2)

    if n <= CHUNK:
        return rows(q)
    chunks = -(-n // CHUNK)
    split = jnp.pad(q, ((0, 0), (0, chunks * CHUNK - n), (0, 0), (0, 0)))
    split = split.reshape(b, chunks, CHUNK, h, d).swapaxes(0, 1)
    whole = lambda a: a.swapaxes(0, 1).reshape(b, chunks * CHUNK, *a.shape[3:])[:, :n]
    out, lse = jax.lax.map(rows, split)
    return whole(out), whole(lse)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both parts. Commutative and associative."""
    more = (a[1] - b[1])[..., None]
    return a[0] * jax.nn.sigmoid(more) + b[0] * jax.nn.sigmoid(-more), jnp.logaddexp(a[1], b[1])
