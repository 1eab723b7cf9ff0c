"""Attention on a mesh, where tokens are spread over devices (context or sequence parallelism).

Legend: B batch, N query tokens, S key tokens, T frames, H heads, K head dim, D = H K.

Each device has a slice of the tokens (`rules.seq`) of some of the samples and heads (`rules.batch`, `rules.heads`).
Which function is called says where the keys are: spread like the queries (`attend`, `attend_parts`), or whole on each
device, so that nothing is sent (`attend` with whole_keys, `attend_frames`). `attend_whole` is for sequences that are
whole altogether. Outside of a mesh, or where it does not spread tokens, all are plain `attention`.
"""

import functools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jdit.nn.attention import Lengths, attention
from jdit.nn.attention_cudnn import attention_among_parts, takes_parts
from jdit.nn.exchange import Form, Tokens, attend_slices, choose
from jdit.nn.layers import marked, some_parts
from jdit.nn.pieces import Part, joined, padded, split
from jdit.sharding import Rules, shard
from jdit.target import target

log = logging.getLogger("jdit")

Turn = Callable[[Float[Array, "B N D"]], Tokens]
"""What a projection goes through: a norm, a split into heads, rotary positions."""


def attend(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    rules: Rules,
    kv_lengths: Lengths = None,
    key_counts: Float[Array, "S"] | None = None,
    tokens: int | None = None,
    whole_keys: bool = False,
) -> Float[Array, "B N D"]:
    """`attention` of tokens that are spread; the heads come back side by side.

    Args:
        kv_lengths, key_counts: as of `attention`.
        tokens: how many there are, where padding follows them (`whole_tiles`); not with whole_keys, where queries may
            be padding.
        whole_keys: keys and values are whole on each device (text, a picture): queries attend where they are.

    Raises:
        ValueError: `rules.exchange` asks for a form that cannot be had.
    """
    if not whole_keys:
        few = None if tokens is None else (tokens,)
        return attend_parts([(q, k, v)], rules=rules, kv_lengths=kv_lengths, key_counts=key_counts, tokens=few)[0]
    if _whole(q.shape[1], rules):
        return attend_whole(q, k, v, rules=rules, kv_lengths=kv_lengths, key_counts=key_counts)
    _log_choice("local, keys are whole", rules.ways("seq"), (q.shape[1],), (k.shape[1],), q.shape[2], 0)

    def local(q: Tokens, k: Tokens, v: Tokens, lengths: Lengths, counts) -> Tokens:
        return attention(q, k, v, kv_lengths=lengths, key_counts=counts)

    return _local(local, q, (k, v), (kv_lengths, key_counts), rules)


def attend_parts(
    parts: Sequence[Part],
    *,
    rules: Rules,
    kv_lengths: Lengths = None,
    key_counts: Float[Array, "S"] | None = None,
    tokens: Sequence[int] | None = None,
) -> list[Float[Array, "B N D"]]:
    """`attend` among the tokens of all parts of a sequence, each part spread by itself; the results a part.

    Args:
        parts: queries, keys and values (B, tokens, H, K); a part may have no queries.
        kv_lengths, key_counts: of the joined sequence, the parts one after another, so that lengths cut the last.
        tokens: of each part, where padding follows them; the results have it again.

    Raises:
        ValueError: as of `attend`.
    """
    q, tokens = parts[0][0], tokens or [part[1].shape[1] for part in parts]
    sizes = tuple(tuple(min(a.shape[1], n) for a, n in zip(some, tokens)) for some in zip(*parts))
    if _whole(max(map(max, sizes)), rules):
        cut = [(q[:, :n], k[:, :m], v[:, :m]) for (q, k, v), n, m in zip(parts, *sizes[:2])]
        if len(parts) > 1 and key_counts is None and takes_parts(cut):
            whole = lambda a: shard(a, "batch", None, "attn", None, rules=rules)
            out = attention_among_parts([(whole(q), whole(k), whole(v)) for q, k, v in cut], kv_lengths)
            return [_cut(padded(o, q.shape[1]), q.shape[1], q.shape[2]) for o, (q, _, _) in zip(out, parts)]
        q, k, v = (joined(some) for some in zip(*cut))
        out = split(attend_whole(q, k, v, rules=rules, kv_lengths=kv_lengths, key_counts=key_counts), sizes[0])
        return [padded(o, part[0].shape[1]) for o, part in zip(out, parts)]
    ways, tensor, heads = rules.ways("seq"), rules.ways("heads"), q.shape[2]
    form = _form(heads, sum(sizes[1]), rules, len(parts) > 1 or key_counts is not None)
    _log_choice(str(form), ways, sizes[0], sizes[1], heads, form.heads * tensor - heads)
    spread, head, batch = _specs(q.shape[0], rules)
    keys, slices = (P(*batch, None, head, None), 1) if form.gathered else (spread, ways)
    run = functools.partial(attend_slices, sizes, rules.axes("seq"), form)
    fit = [(_pad(q, ways, tensor), _pad(k, slices, tensor), _pad(v, slices, tensor)) for q, k, v in parts]
    out = _shard_map(run, ([(spread, keys, keys)] * len(parts), batch, P()), [spread] * len(parts))(
        fit, kv_lengths, key_counts
    )  # fmt: skip
    return [_cut(o, part[0].shape[1], heads) for o, part in zip(out, parts)]


def project(
    fused: nnx.LinearGeneral, x: Float[Array, "B N C"], turn_q: Turn, turn_k: Turn, heads: int, rules: Rules,
    *, joint: bool = False,
) -> Part:  # fmt: skip
    """Queries, keys and values of a layer whose first three parts they are, values (B, N, D) as they come. `joint`:
    they are of one part of a sequence that has several.

    Where keys and values are gathered, each of the three has a product of its own: values are sent while that of the
    keys runs, keys while that of the queries does, and both are whole on each device in the end. The part's own tokens
    decide: weights are copied for it (`some_parts`), which for a text costs more than its sending.
    """
    part = lambda i, *sent: some_parts(fused, x, slice(i, i + 1), rules, *sent)[:, :, 0]
    if rules.ways("seq") == 1 or not _form(heads, x.shape[1], rules, joint).gathered:
        qkv = some_parts(fused, x, slice(3), rules)
        return turn_q(qkv[:, :, 0]), turn_k(qkv[:, :, 1]), qkv[:, :, 2]
    v, sent = marked(part(2))
    k, here = marked(turn_k(part(1, sent)))
    v, came = marked(_gather(v, rules))  # before the queries' product, behind which XLA would hide both
    return turn_q(part(0, here + came)), _gather(k, rules), v


def beside_products(heads: int, tokens: int, rules: Rules) -> bool:
    """Whether products run while what attention among so many tokens needs is sent: a ring is sent behind attention."""
    return rules.ways("seq") > 1 and not _form(heads, tokens, rules, joint=False).rotated


def attend_frames(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B T S H K"],
    v: Float[Array, "B T S H K"],
    *,
    rules: Rules,
    tokens: int | None = None,
) -> Float[Array, "B N D"]:
    """`attention` of each frame's N/T tokens to the keys of that frame, which are whole on each device.

    Frames end where no slice of the tokens does: a device puts its slice into the frames that it touches. `tokens` as
    of `attend`: how many the frames have together, where padding follows.
    """
    (b, held, heads, d), frames = q.shape, k.shape[1]
    total = tokens or held
    n = total // frames
    fold = lambda a, tokens: a.reshape(-1, tokens, *a.shape[-2:])
    if _whole(total, rules):
        q = shard(q[:, :total], "batch", None, "attn", None, rules=rules)
        out = attend_whole(fold(q, n), *(fold(a, a.shape[2]) for a in (k, v)), rules=rules)
        return padded(out.reshape(b, total, heads * d), held)

    def local(q: Tokens, k, v) -> Tokens:
        held = q.shape[1]
        start = jax.lax.axis_index(rules.axes("seq")) * held
        first, offset, some = start // n, start % n, (held + n - 2) // n + 1
        rows = jnp.zeros((q.shape[0], some * n, *q.shape[2:]), q.dtype)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, q, offset, 1)
        past = lambda a: jnp.pad(a, ((0, 0), (0, some), *((0, 0),) * 3))
        own = lambda a: fold(jax.lax.dynamic_slice_in_dim(past(a), first, some, 1), a.shape[2])
        out = attention(fold(rows, n), own(k), own(v)).reshape(rows.shape)
        return jax.lax.dynamic_slice_in_dim(out, offset, held, 1)

    return _local(local, q, (k, v), (), rules)


def whole_tiles(x: Float[Array, "B N D"], rules: Rules) -> Float[Array, "B N_or_more D"]:
    """Zeros behind the tokens, to a multiple of 8 on each device, on a GPU: XLA otherwise pads what each product is
    given, and cuts what it gives, with kernels of their own."""
    if target().platform != "gpu":
        return x
    return padded(x, x.shape[1] + -x.shape[1] % (8 * rules.ways("seq")))


def attend_whole(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    rules: Rules,
    kv_lengths: Lengths = None,
    key_counts: Float[Array, "S"] | None = None,
    causal: bool = False,
) -> Float[Array, "B N D"]:
    """`attention` of sequences that are whole on each device (text encoders): heads alone are spread (`rules.attn`)."""
    q, k, v = (shard(a, "batch", None, "attn", None, rules=rules) for a in (q, k, v))
    out = attention(q, k, v, kv_lengths=kv_lengths, key_counts=key_counts, causal=causal)
    return out.reshape(*q.shape[:2], -1)


def _form(heads: int, keys: int, rules: Rules, joint: bool) -> Form:
    return choose(-(-heads // rules.ways("heads")), keys, rules.ways("seq"), rules.exchange, joint=joint)


def _gather(a: Float[Array, "B N ..."], rules: Rules) -> Float[Array, "B N ..."]:
    """Tokens that are spread, (B, N, D) or (B, N, H, K), to all devices that share them."""
    n, ways = a.shape[1], rules.ways("seq")
    tokens, head, batch = _specs(a.shape[0], rules)
    rest = (head if a.shape[2] % rules.ways("heads") == 0 else None, *(None,) * (a.ndim - 3))
    run = functools.partial(jax.lax.all_gather, axis_name=rules.axes("seq"), axis=1, tiled=True)
    out = _shard_map(run, P(*batch, tokens[1], *rest), P(*batch, None, *rest))(padded(a, n + -n % ways))
    return out[:, :n]


def _whole(tokens: int, rules: Rules) -> bool:
    """Nothing spreads so many tokens (`shard` leaves fewer than there are devices whole)."""
    return rules.ways("seq") == 1 or tokens < rules.ways("seq")


def _local(fn, q: Tokens, kv: Sequence[Array], given: Sequence, rules: Rules) -> Float[Array, "B N D"]:
    """`fn` of a device's slice of queries, whole keys and values (B, ..., H, K), and `given`: lengths and counts."""
    ways, tensor = rules.ways("seq"), rules.ways("heads")
    tokens, head, batch = _specs(q.shape[0], rules)
    whole = lambda a: P(*batch, *(None,) * (a.ndim - 3), head, None)
    run = _shard_map(fn, (tokens, *map(whole, kv), *(batch, P())[: len(given)]), tokens)
    out = run(_pad(q, ways, tensor), *(_pad(a, 1, tensor) for a in kv), *given)
    return _cut(out, q.shape[1], q.shape[2])


def _specs(samples: int, rules: Rules):
    """(PartitionSpec of tokens (B, N, H, K), what its heads are spread over, PartitionSpec of samples)."""
    batch, seq, head, _ = rules.spec(("batch", "seq", "heads", None))
    batch = batch if samples % rules.ways("batch") == 0 else None
    return P(batch, seq, head, None), head, P(batch)


def _shard_map(fn, in_specs, out_specs):
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _pad(a: Array, tokens: int, heads: int) -> Array:
    """(B, N, ..., H, K) to multiples of tokens and heads, which shard_map wants."""
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % tokens), *((0, 0),) * (a.ndim - 4), (0, -a.shape[-2] % heads), (0, 0)))


def _cut(out: Tokens, tokens: int, heads: int) -> Float[Array, "B N D"]:
    return out[:, :tokens, :heads].reshape(out.shape[0], tokens, heads * out.shape[-1])


@functools.lru_cache(maxsize=64)
def _log_choice(form: str, ways: int, queries: tuple[int, ...], keys: tuple[int, ...], heads: int, added: int):
    zeros = f" and {added} of zeros" if added else ""
    log.info("attention over %d devices: %s; queries %s, keys %s, heads %d%s", ways, form, queries, keys, heads, zeros)
