"""Attention by cuDNN's flash kernels, on NVIDIA GPUs.

B batch, N query tokens, S key tokens, H heads, K head dim.

cuDNN takes a mask for padding, and a number of keys that is no multiple of `TILE` is a mask to it; without one it is
7% faster (benchmarks/NOTES.md). So the padding of long sequences is seen, as something whose share of each query's sum
is known: its keys are copies of the first key, its values zeros (`filled`), and what is left of a sum without it is 1 -
share, by which the result is divided (`attention_to_filled`). The first key's own share is as large as each copy's: of
P keys of padding no more than P / (P + 1) is taken away, and what a score is wrong by (in float32 1e-6 to 2e-5,
for scores up to 50) is so of the result P + 1 times at most, for a query that sees nothing else. Zeros for keys would
have no such bound: a query may score far below 0 with every real key.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    least = FILL_FROM if q.shape[-1] > 64 else 2 * FILL_FROM
    if padding and not causal and min(q.shape[1], k.shape[1]) >= least:
        if lengths is None:
            return _without_mask(q, k, v, jnp.full(q.shape[0], k.shape[1], jnp.int32), 0)
        return _without_mask(q, k, v, lengths, None)
    return _masked(q, k, v, lengths, causal)


def filled(q: Queries, k: Keys, v: Keys, seen: Int[Array, "B"], most: int | None = None) -> tuple[Queries, Keys, Keys]:
    """What `attention_to_filled` takes: behind the first `seen` keys, and up to a multiple of `TILE`, the first key,
    with values of zero. `most`: how many are not seen at most, where that is known; all others then stay in place."""
    first, start = k[:, :1], 0 if most is None else k.shape[1] - most
    k, v = (_pad_tokens(a, TILE) for a in (k, v))
    real = (jnp.arange(start, k.shape[1]) < seen[:, None])[..., None, None]
    if start == 0:
        k, v = jnp.where(real, k, first), jnp.where(real, v, 0)
    elif start < k.shape[1]:
        # XLA writes the ends in place if it finds them apart from the rest; else its kernels go through everything
        k, v, *ends, first = jax.lax.optimization_barrier((k, v, k[:, start:], v[:, start:], first))
        ends = [jnp.where(real, end, fill) for end, fill in zip(ends, (first, 0))]
        k, v = (jax.lax.dynamic_update_slice_in_dim(a, end, start, 1) for a, end in zip((k, v), ends))
    # the kernel that makes the queries would sum their scores too, ten times as slow, and an early look at the first
    # key would have all keys copied
    return jax.lax.optimization_barrier((q, k, v))


def attention_to_filled(
    q: Queries, k: Keys, v: Keys, seen: Int[Array, "B"]
) -> tuple[Float[Array, "B N H K"], Float[Array, "B N H"]]:
    """Attention to the first `seen` keys of what `filled` gave, and the log of the softmax's denominator, both float32.
    To no keys at all the result is zero, and its log-sum-exp that of the first key.

    Through a function that is JAX's own, because the public one rounds the log-sum-exp to the outputs' dtype.
    """
    # here, so that a JAX that has moved it breaks long sequences on GPUs, by name, and nothing else
    from jax._src.cudnn import fused_attention_stablehlo as fused

    scale = q.shape[-1] ** -0.5
    given = q, k, v, None, None, None, None
    out, lse = fused.dot_product_attention(  # pyright: ignore (its annotations say less than it gives)
        *given, scale=scale, mask_type=fused.MaskType.NO_MASK, return_residual=True
    )
    lse = lse.swapaxes(1, 2)
    first = (q.astype(jnp.float32) * k[:, :1].astype(jnp.float32)).sum(-1) * scale
    padding = jnp.where(seen > 0, k.shape[1] - seen, 0)[:, None, None]
    left = 1 - padding * jnp.exp(first - lse)
    return out.astype(jnp.float32) / left[..., None], lse + jnp.log(left)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _without_mask(q, k, v, lengths, most):
    out, _ = attention_to_filled(*filled(_pad_tokens(q, TILE), k, v, lengths, most), lengths)
    return out[:, : q.shape[1]].astype(q.dtype)


def _without_mask_forward(q, k, v, lengths, most):
    return jax.vjp(lambda q, k, v: _masked(q, k, v, lengths, False), q, k, v)


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
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


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
