"""Attention by cuDNN's flash kernels, on NVIDIA GPUs.

B batch, N query tokens, S key tokens, H heads, K head dim.

cuDNN takes a mask for padding, and a number of keys that is no multiple of `TILE` is a mask to it; without one it is
7% faster (benchmarks/NOTES.md). So the padding of long sequences is seen, as something whose share of each query's sum
is known: its keys are copies of the first key, its values zeros (`filled`), and what is left of a sum without it is 1 -
share, by which the result is divided (`left_without`). The first key's own share is as large as each copy's: of
P keys of padding no more than P / (P + 1) is taken away, and what a score is wrong by (in float32 1e-6 to 2e-5,
for scores up to 50) is so of the result P + 1 times at most, for a query that sees nothing else. Zeros for keys would
have no such bound: a query may score far below 0 with every real key.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdit.nn.pieces import Part, padded, split
from jdit.target import target

TILE = 128
"""Keys that cuDNN's kernels take at a time."""
FILL_FROM = 4096
"""Queries and keys from which on a mask costs more than to take the padding out of the results, above head dim 64,
where a mask has all tokens padded (`_masked`). Up to 64 it is twice as many: SD3.5-large's 4,429 would gain 0.07 ms a
layer in the kernel, and pay more for their padding and for two passes over the results."""

Keys = Float[Array, "B S H K"]
Queries = Float[Array, "B N H K"]
Lengths = Int[Array, "B"] | None


def check(q: Queries, k: Keys):
    """Whether cuDNN is for these.

    Raises:
        NotImplementedError: what it does not take, or is not for.
    """
    if target().platform != "gpu":
        raise NotImplementedError("cuDNN attention needs an NVIDIA GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN attention takes bfloat16 and float16, not {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise NotImplementedError(
            f"cuDNN attention takes head dims that are multiples of 8 up to 128, not {q.shape[-1]}"
        )
    n, s = q.shape[1], k.shape[1]
    if max(n, s) < 128:
        raise NotImplementedError(f"below 128 tokens ({n} x {s}) plain products are as fast")


def cudnn(q: Queries, k: Keys, v: Keys, lengths: Lengths, causal: bool) -> Queries:
    """The backend of `jdit.nn.attention`; `lengths` as its kv_lengths."""
    check(q, k)
    padding = lengths is not None or k.shape[1] % TILE > 0
    if padding and not causal and _long(q, k):
        return attention_among_parts([(q, k, v)], lengths)[0]
    return _masked(q, k, v, lengths, causal)


def _long(q: Queries, k: Keys) -> bool:
    return min(q.shape[1], k.shape[1]) >= FILL_FROM * (1 if q.shape[-1] > 64 else 2)


def takes(q: Queries, k: Keys) -> bool:
    """`check`, as a question."""
    try:
        check(q, k)
    except NotImplementedError:
        return False
    return True


def takes_parts(parts: Sequence[Part]) -> bool:
    """Whether `attention_among_parts` is for these: the first of them is long, and cuDNN takes it."""
    q, k, _ = parts[0]
    return takes(q, k) and _long(q, k)


def attention_among_parts(parts: Sequence[Part], lengths: Lengths) -> list[Queries]:
    """Attention among the tokens of all parts of a sequence, the results a part. It is never joined as such: the first
    part is made where all have room, and the others are written behind it.

    Args:
        lengths: as kv_lengths of the joined sequence; of several parts all keys of the first are seen.
    """
    (q, _, _), keys = parts[0], sum(k.shape[1] for _, k, _ in parts)
    seen = jnp.full(q.shape[0], keys, jnp.int32) if lengths is None else lengths
    return _without_mask(list(parts), seen, 0 if lengths is None else None)


def filled(
    keys: Sequence[Keys], values: Sequence[Keys], seen: Int[Array, "B"], most: int | None = None
) -> tuple[Keys, Keys]:
    """Keys and values of all parts of a sequence one behind the other: behind the first `seen`, and up to a multiple of
    `TILE`, the first key, with values of zero.

    Args:
        most: of a sequence of one part, how many are not seen at most, where that is known.
    """
    first, held, parts = keys[0][:, :1], keys[0].shape[1], len(keys)
    (k, k_ends), (v, v_ends) = (_with_room(some) for some in (keys, values))
    start = held if parts > 1 else 0 if most is None else held - most
    real = (jnp.arange(start, k.shape[1]) < seen[:, None])[..., None, None]
    if start == 0:
        k, v = jnp.where(real, k, first), jnp.where(real, v, 0)
    elif start < k.shape[1]:
        ends = (k_ends, v_ends) if parts > 1 else (k[:, start:], v[:, start:])
        (k, v), ends, first = jax.lax.optimization_barrier(((k, v), ends, first))
        k, v = (_put(a, jnp.where(real, end, fill), start) for a, end, fill in zip((k, v), ends, (first, 0)))
    # an early look at the first key would have all keys copied
    return jax.lax.optimization_barrier((k, v))


def _queries(parts: Sequence[Queries]) -> Queries:
    """As `filled`, with what there is behind them left to chance."""
    q, ends = _with_room(parts)
    if len(parts) > 1:
        q, ends = jax.lax.optimization_barrier((q, ends))
        q = _put(q, ends, parts[0].shape[1])
    return apart(q)


def apart(q: Queries) -> Queries:
    """The kernel that makes the queries would sum their scores with the first key, too, ten times as slow."""
    return jax.lax.optimization_barrier(q)


def _with_room(parts: Sequence[Array]) -> tuple[Array, Array | None]:
    """The first part with room for the others, up to a multiple of `TILE`, and what goes there."""
    n, held = sum(a.shape[1] for a in parts), parts[0].shape[1]
    n += -n % TILE
    return padded(parts[0], n), padded(jnp.concatenate(parts[1:], 1), n - held) if len(parts) > 1 else None


def _put(a: Array, end: Array, start: int) -> Array:
    """In place, if XLA finds both behind a barrier; else its kernel goes through everything."""
    return jax.lax.dynamic_update_slice_in_dim(a, end, start, 1)


def attention_to_all(q: Queries, k: Keys, v: Keys) -> tuple[Queries, Float[Array, "B N H"]]:
    """Attention to all keys, and the log of the softmax's denominator in float32. It has no gradients.

    Through a function that is JAX's own, because the public one rounds the log-sum-exp to the outputs' dtype.
    """
    # here, so that a JAX that has moved it breaks long sequences on GPUs, by name, and nothing else
    from jax._src.cudnn import fused_attention_stablehlo as fused

    given = q, k, v, None, None, None, None
    out, lse = fused.dot_product_attention(  # pyright: ignore (its annotations say less than it gives)
        *given, scale=q.shape[-1] ** -0.5, mask_type=fused.MaskType.NO_MASK, return_residual=True
    )
    return out, lse.swapaxes(1, 2)


def left_without(
    padding: Int[Array, "B"], first: Float[Array, "B 1 H K"], q: Queries, lse: Float[Array, "B N H"]
) -> Float[Array, "B N H"]:
    """The share that is left of each query's sum without so many copies of the key `first`, float32."""
    # the scores in a kernel that does nothing else: with the weights of a merge in it, it took eight times as long
    lse = jax.lax.optimization_barrier(lse.swapaxes(1, 2)).swapaxes(1, 2)
    score = (q.astype(jnp.float32) * first.astype(jnp.float32)).sum(-1) * q.shape[-1] ** -0.5
    return 1 - padding[:, None, None] * jnp.exp(score - lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _without_mask(parts: list[Part], lengths, most):
    queries, keys, values = ([part[i] for part in parts] for i in range(3))
    q, (k, v) = _queries(queries), filled(keys, values, lengths, most)
    out, lse = attention_to_all(q, k, v)
    # to no keys at all the result is zero, as it is
    left = left_without(jnp.where(lengths > 0, k.shape[1] - lengths, 0), k[:, :1], q, lse)
    # cut first: what is divided as a whole is written, and read again for each part
    cut = zip(*(split(a, [some.shape[1] for some in queries]) for a in (out, left[..., None])))
    return [(out.astype(jnp.float32) / left).astype(out.dtype) for out, left in cut]


def _without_mask_forward(parts, lengths, most):
    def masked(parts):
        q, k, v = (jnp.concatenate([part[i] for part in parts], 1) for i in range(3))
        return split(_masked(q, k, v, lengths, False), [some.shape[1] for some, _, _ in parts])

    return jax.vjp(masked, parts)


_without_mask.defvjp(_without_mask_forward, lambda most, vjp, g: (*vjp(g), None))


def _masked(q, k, v, lengths: Lengths, causal: bool):
    """Above head dim 64, tokens are padded to a multiple of `TILE` where there is a mask anyway: 9% faster at 32,760
    tokens of 128 on an H100. At 64 it is 3% slower (4,429 tokens on an H200: 0.634 against 0.617 ms), and padding costs
    besides."""
    b, n, s = q.shape[0], q.shape[1], k.shape[1]
    if q.shape[-1] > 64 and (lengths is not None or s % TILE):
        lengths = jnp.full((b,), s, jnp.int32) if lengths is None else lengths
        q, k, v = (_pad_tokens(x, TILE) for x in (q, k, v))
    q_lengths = None if lengths is None else jnp.full((b,), n, jnp.int32)
    return _flash(q, k, v, q_lengths, lengths, causal)[:, :n]


def _pad_tokens(x, multiple: int):
    return padded(x, x.shape[1] + -x.shape[1] % multiple)


def _fused(q, k, v, q_lengths: Lengths, lengths: Lengths, causal: bool):
    return jax.nn.dot_product_attention(
        q, k, v, implementation="cudnn", query_seq_lengths=q_lengths, key_value_seq_lengths=lengths, is_causal=causal
    )


def _fused_forward(q, k, v, q_lengths: Lengths, lengths: Lengths, causal: bool):
    """JAX differentiates cuDNN's attention for even numbers of tokens only; without a gradient, padding is a waste."""
    b, n, s = q.shape[0], q.shape[1], k.shape[1]
    if n % 2 or s % 2:
        q_lengths, lengths = (jnp.full((b,), m, jnp.int32) if of is None else of
                              for m, of in ((n, q_lengths), (s, lengths)))  # fmt: skip

    def even(q, k, v):
        q, k, v = (_pad_tokens(x, 2) for x in (q, k, v))
        return _fused(q, k, v, q_lengths, lengths, causal)[:, :n]

    return jax.vjp(even, q, k, v)


_flash = jax.custom_vjp(_fused, nondiff_argnums=(5,))
_flash.defvjp(_fused_forward, lambda causal, vjp, g: (*vjp(g), None, None))
