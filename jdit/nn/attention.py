"""Scaled dot-product attention with a backend switch.

B batch, N query tokens, S key tokens, H heads, K head dim. Backends are tried in order; each may decline with
NotImplementedError (the shape of tokamax's switch). The first choice for a set of shapes is logged once. Networks call
it through `jdit.nn.context_parallel`, which knows of meshes.
"""

import functools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdit.nn.attention_cudnn import Lengths, cudnn
from jdit.nn.splash import splash

log = logging.getLogger("jdit")

CHUNK = 1024
"""Query rows a chunk of the chunked backend: bounds its score matrix to CHUNK x S."""
DENSE_LIMIT = 2048
"""Longest query for which the dense S x S backend is taken."""


def _dense(q, k, v, lengths: Lengths, causal: bool, start=0):
    """Queries are those from `start` on, which counts where a query sees no later key."""
    logits = jnp.einsum("bnhk,bshk->bhns", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if lengths is not None:
        logits = jnp.where(jnp.arange(k.shape[1]) < lengths[:, None, None, None], logits, -jnp.inf)
    if causal:
        seen = jnp.arange(k.shape[1]) <= start + jnp.arange(q.shape[1])[:, None]
        logits = jnp.where(seen, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhns,bshk->bnhk", weights, v)


def _xla(q, k, v, lengths: Lengths, causal: bool):
    """Plain products, S x S scores in memory: short sequences only."""
    if q.shape[1] > DENSE_LIMIT:
        raise NotImplementedError(f"{q.shape[1]} query tokens are over the dense limit of {DENSE_LIMIT}")
    return _dense(q, k, v, lengths, causal)


def _chunked(q, k, v, lengths: Lengths, causal: bool):
    """`_xla` over chunks of queries: any length, on any device."""
    b, n, h, d = q.shape
    chunks = -(-n // CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, chunks * CHUNK - n), (0, 0), (0, 0)))
    rows = padded.reshape(b, chunks, CHUNK, h, d).swapaxes(0, 1)
    starts = jnp.arange(chunks) * CHUNK
    out = jax.lax.map(lambda c: _dense(c[0], k, v, lengths, causal, c[1]), (rows, starts))
    return out.swapaxes(0, 1).reshape(b, chunks * CHUNK, h, v.shape[-1])[:, :n]


BACKENDS: dict[str, Callable] = {"cudnn": cudnn, "splash": splash, "xla": _xla, "chunked": _chunked}


@functools.lru_cache(maxsize=64)
def log_choice(name: str, q_shape, k_shape, dtype):
    log.info("attention: %s for queries %s, keys %s, %s", name, q_shape, k_shape, dtype)


def attention(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    kv_lengths: Lengths = None,
    key_counts: Float[Array, "S"] | None = None,
    causal: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H K"]:
    """softmax(q k^T / sqrt(K)) v.

    Args:
        kv_lengths: keys from this index on are padding and get no weight.
        key_counts: key j stands for key_counts[j] equal keys (padding that a reference attends to is sent once).
        causal: query i sees keys 0 to i only. Padding that is last is then seen by padding alone.
        implementation: a backend's name, or several in order; None tries all of `BACKENDS`.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: no backend takes these inputs; the message has each one's reason.
    """
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation or BACKENDS)
    if unknown := [n for n in names if n not in BACKENDS]:
        raise ValueError(f"unknown attention backends {unknown}; there are {list(BACKENDS)}")
    head_dim = q.shape[-1]
    if key_counts is not None:
        q, k, v = _count_keys(q, k, v, key_counts)
    reasons = []
    for name in names:
        try:
            out = BACKENDS[name](q, k, v, kv_lengths, causal)
        except NotImplementedError as e:
            reasons.append(f"{name}: {e}")
            continue
        log_choice(name, q.shape, k.shape, str(q.dtype))
        return out[..., :head_dim]
    raise NotImplementedError(f"no attention backend takes queries {q.shape} {q.dtype}: " + "; ".join(reasons))


def _count_keys(q, k, v, counts):
    """Add log(count) to each key's scores through 8 further head dims, which every backend understands.

    The log is split into two parts so that bfloat16 keeps it to 16 bits; K grows, so q is rescaled to keep 1/sqrt(K).
    """
    d, extra = q.shape[-1], 8
    grow = ((d + extra) / d) ** 0.5
    bias = jnp.log(counts.astype(jnp.float32)) * (d + extra) ** 0.5
    high = bias.astype(q.dtype)
    low = (bias - high.astype(jnp.float32)).astype(q.dtype)
    columns = jnp.stack([high, low], -1)[None, :, None]  # 1 S 1 2
    wide = lambda x, fill: jnp.concatenate([x, jnp.broadcast_to(fill, (*x.shape[:-1], fill.shape[-1]))], -1)
    zeros = jnp.zeros(extra, q.dtype)
    q = wide((q * grow).astype(q.dtype), zeros.at[:2].set(1))
    k = wide(k, jnp.concatenate([columns, jnp.zeros((1, k.shape[1], 1, extra - 2), k.dtype)], -1))
    return q, k, wide(v, zeros)
