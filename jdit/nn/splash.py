"""Splash attention, JAX's flash attention for TPUs in Pallas (jax.experimental.pallas.ops.tpu.splash_attention).

B batch, N query tokens, S key tokens, H heads, K head dim. Softmax statistics and sums are float32. Any number of
tokens: they are padded to whole blocks, and padded keys are cut by segment ids.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jdit.target import target

LANES = 128
"""Tokens of a block, and head dims over 64, are padded to multiples of it."""
SHORTEST = 128
"""Below as many tokens plain products are as fast."""
STEP = 512
"""Blocks of long sequences are multiples of it, so that their parts are large."""
BACKWARD = 512
"""The longest block of the gradients' kernel."""


class Blocks(NamedTuple):
    """Most tokens of a block: queries and keys that are in fast memory at once, and keys of one product."""

    queries: int
    keys: int
    products: int


BLOCKS = {
    "TPU v6 lite": Blocks(3072, 2048, 1024),
    "TPU v5": Blocks(1536, 1024, 512),
    "TPU v5 lite": Blocks(1536, 1024, 512),
}
"""By kind of chip, for bfloat16 and head dims up to 128; float32 and wider heads take less. v6e: maxdiffusion's for Wan
(configs/base_wan_14b.yml: 3024, 2048, 1024; a multiple of 128 here). On v5p (TPU v5) and v5e maxdiffusion raises the
limit of fast memory (xla_tpu_scoped_vmem_limit_kib) for as much; these compile without. None was timed here."""
OTHERS = Blocks(512, 512, 512)
"""maxdiffusion's for chips that it has not tuned."""


def splash(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    lengths: Int[Array, "B"] | None,
    causal: bool,
) -> Float[Array, "B N H K"]:
    """A backend of `jdit.nn.attention`.

    A kernel cannot be partitioned by the compiler, so on the mesh axes that the caller left to it this does it itself:
    batch over data, heads over the other axes, and queries over those that neither divides by.

    Raises:
        NotImplementedError: what is compiled is no TPU's, or these inputs are not for it.
    """
    chip = target()
    if chip.platform != "tpu":
        raise NotImplementedError(f"splash attention needs a TPU; this is compiled for {chip.platform}")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"splash attention takes bfloat16 and float32, not {q.dtype}")
    if max(q.shape[1], k.shape[1]) < SHORTEST:
        raise NotImplementedError(f"below {SHORTEST} tokens ({q.shape[1]} x {k.shape[1]}) plain products are as fast")
    run = functools.partial(kernel, causal=causal, blocks=BLOCKS.get(chip.kind, OTHERS))
    mesh = jax.sharding.get_abstract_mesh()
    free = {a: n for a, n in mesh.shape.items() if a not in mesh.manual_axes}  # those of one device, too
    if not free:
        return run(q, k, v, lengths)
    batch, tokens, heads = _spread(q.shape, free, causal)
    n, ways = q.shape[1], math.prod(free[a] for a in tokens)
    q = jnp.pad(q, ((0, 0), (0, -n % ways), (0, 0), (0, 0)))
    spec = lambda tokens: P(batch or None, tokens or None, heads or None, None)
    out = jax.shard_map(
        run, in_specs=(spec(tokens), spec(None), spec(None), P(batch or None)), out_specs=spec(tokens),
        axis_names=set(free), check_vma=False,
    )(q, k, v, lengths)  # fmt: skip
    return out[:, :n]


def kernel(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    lengths: Int[Array, "B"] | None = None,
    *,
    causal: bool = False,
    blocks: Blocks = OTHERS,
    interpret: bool = False,
) -> Float[Array, "B N H K"]:
    """The padded call on one device; `interpret` runs the kernel's steps as plain operations, on any device."""
    # imported here: it takes a second, and only TPUs need it
    from jax.experimental.pallas.ops.tpu import splash_attention as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    (_, n, heads, d), s = q.shape, k.shape[1]
    wide = d if d <= 64 else -(-d // LANES) * LANES
    narrower = max(1, wide // LANES * q.dtype.itemsize // 2)  # wide heads and dtypes take the memory of more tokens
    most = Blocks(*(max(size // narrower, LANES) for size in blocks))
    block_q = _block(n, most.queries)
    block_kv = _block(s, most.keys)
    products = _part(block_kv, most.products)
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)
    ready = lambda x, block: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, wide - d)))
    q, k, v = ready(q, block_q), ready(k, block_kv), ready(v, block_kv)
    shape = q.shape[2], k.shape[2]
    backward: dict[str, Any] = dict(
        block_q_dkv=_part(block_q, BACKWARD), block_kv_dkv=_part(block_kv, BACKWARD), use_fused_bwd_kernel=True
    )
    make = functools.partial(
        library.make_splash_mha_single_device, interpret=interpret,
        block_sizes=library.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=products, **backward),
    )  # fmt: skip
    if causal:
        run: Any = make(library.MultiHeadMask([library.CausalMask(shape)] * heads))
    else:  # no map of blocks, which takes the host minutes to make at 100,000 tokens and is all ones: that of one block
        one = make(library.MultiHeadMask([library.FullMask((block_q, block_kv))] * heads))
        nothing = info.MaskInfo(None, None, None, None, None)
        run = type(one)(nothing, None, nothing, **one.kwargs)
    if lengths is None and shape[1] == s:
        return jax.vmap(run)(q, k, v).swapaxes(1, 2)[:, :n, :, :d]
    seen = jnp.arange(shape[1]) < (jnp.minimum(lengths, s)[:, None] if lengths is not None else s)
    ids = library.SegmentIds(jnp.ones(shape[0], jnp.int32), seen.astype(jnp.int32))
    axes = library.SegmentIds(None, 0 if lengths is not None else None)  # pyright: ignore[reportArgumentType]
    call = lambda q, k, v, ids: run(q, k, v, segment_ids=ids)
    return jax.vmap(call, in_axes=(0, 0, 0, axes))(q, k, v, ids).swapaxes(1, 2)[:, :n, :, :d]


def _block(tokens: int, most: int) -> int:
    """The block, a multiple of `STEP` between `most` and half of it, that serves so many tokens with the least work, if
    each takes that of 64 tokens more (a guess, which decides where padding is about equal). Fewer tokens are one block.
    """
    if tokens <= most:
        return -(-tokens // LANES) * LANES
    step = min(STEP, most)
    sizes = range(max(most // 2 // step, 1) * step, most + 1, step)
    return min(sizes, key=lambda size: -(-tokens // size) * (size + 64))


def _part(block: int, most: int) -> int:
    """The largest part of a block, a multiple of `LANES`, that divides it."""
    return block if block <= most else max(size for size in range(LANES, most + 1, LANES) if block % size == 0)


def _spread(shape: tuple[int, ...], free: dict[str, int], causal: bool) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of batch, queries and heads."""
    axes: dict[int, tuple[str, ...]] = {0: (), 1: (), 2: ()}
    for axis, size in free.items():
        ways = lambda dim: math.prod(free[a] for a in axes[dim])
        divides = [dim for dim in ((0, 2) if axis == "data" else (2, 0)) if shape[dim] % (ways(dim) * size) == 0]
        if divides:
            axes[divides[0]] += (axis,)
        elif not causal:  # a causal kernel counts its queries from 0; it stays whole on this axis
            axes[1] += (axis,)
    return tuple(axes.values())
