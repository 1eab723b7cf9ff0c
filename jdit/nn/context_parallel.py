"""Attention on a mesh: tokens spread over devices that must come by one another's keys.

Legend: B batch, N query tokens, S key tokens, H heads, K head dim, D = H K; W devices that the tokens are spread over
(the mesh axes of `rules.seq`), of which U exchange heads for tokens and R rotate keys and values, W = U R.

Each device holds one slice of every part of the sequence (a picture, its text) and H of the heads (`rules.heads`).

- Ulysses (arXiv 2309.14509), R = 1: one all-to-all gives every device all tokens of H/U heads, another takes the results
  back. Inside, attention is that of one device, cuDNN included.
- Ring (arXiv 2310.01889), U = 1: queries stay, keys and values go round in R - 1 collective-permutes, and the partial
  results are merged in float32.
- Both (arXiv 2405.07719): groups of U neighbours exchange heads, and what they hold goes round R groups. It is for
  heads that W does not divide: 38 heads on 4 devices are U = 2, R = 2.
- Neither where keys are whole on each device (cross-attention to text): queries stay, nothing is sent.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jdit.nn.attention import Lengths, attention
from jdit.nn.attention_lse import MASKED, attention_with_lse, merge
from jdit.sharding import Rules, shard

log = logging.getLogger("jdit")

Tokens = Float[Array, "B N H K"]
Part = tuple[Tokens, Float[Array, "B S H K"], Float[Array, "B S H K"]]
"""Queries, keys and values of one part of a sequence; their numbers of tokens may differ."""


class Plan(NamedTuple):
    """How the ways of the sequence are used: `heads` are those a device computes, padding included."""

    ulysses: int
    ring: int
    heads: int

    def __str__(self) -> str:
        if self.ring == 1:
            return f"ulysses over {self.ulysses}"
        return f"ring over {self.ring}" if self.ulysses == 1 else f"ulysses over {self.ulysses} x ring over {self.ring}"


def plan(heads: int, ways: int, exchange: str) -> Plan:
    """The form of attention for `heads` a device over `ways` devices.

    "auto" exchanges heads over the largest divisor of `ways` that divides them, and rotates over what is left. "ulysses"
    adds heads of zeros where `ways` does not divide them.

    Raises:
        ValueError: "ulysses_ring" where no part of the devices, more than one and fewer than all, divides the heads.
    """
    divisors = [u for u in range(1, ways + 1) if ways % u == 0 and heads % u == 0]
    if exchange == "ulysses":
        return Plan(ways, 1, -(-heads // ways) * ways)
    if exchange == "ring":
        return Plan(1, ways, heads)
    if exchange == "ulysses_ring":
        between = [u for u in divisors if 1 < u < ways]
        if not between:
            raise ValueError(
                f"exchange='ulysses_ring' cannot be had: no divisor of {ways} devices between 1 and {ways} divides"
                f" {heads} heads a device; there are 'auto', 'ulysses' and 'ring'"
            )
        return Plan(between[-1], ways // between[-1], heads)
    return Plan(divisors[-1], ways // divisors[-1], heads)


def attend(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    rules: Rules,
    kv_lengths: Lengths = None,
    key_counts: Float[Array, "S"] | None = None,
    whole_keys: bool = False,
) -> Float[Array, "B N D"]:
    """`attention` among tokens that are spread over the mesh; the heads come back side by side.

    Args:
        whole_keys: keys and values are whole on each device (text, a picture): queries attend where they are.
        kv_lengths, key_counts: as of `attention`.

    Raises:
        ValueError: `rules.exchange` asks for a form that cannot be had.
    """
    return attend_parts(
        [(q, k, v)], rules=rules, kv_lengths=kv_lengths, key_counts=key_counts, whole_keys=whole_keys
    )[0]  # fmt: skip


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
    """`attention` of sequences that each device holds whole (text encoders): the heads alone are spread, by `rules.attn`."""
    q, k, v = (shard(a, "batch", None, "attn", None, rules=rules) for a in (q, k, v))
    out = attention(q, k, v, kv_lengths=kv_lengths, key_counts=key_counts, causal=causal)
    return out.reshape(*q.shape[:2], -1)


def attend_parts(
    parts: Sequence[Part],
    *,
    rules: Rules,
    kv_lengths: Lengths = None,
    key_counts: Float[Array, "S"] | None = None,
    whole_keys: bool = False,
) -> list[Float[Array, "B N D"]]:
    """`attend` among the tokens of all parts, each of which is spread by itself; the results a part.

    Args:
        kv_lengths, key_counts: of the joined sequence, the parts one after another. So lengths cut the last part.

    Raises:
        ValueError: as of `attend`.
    """
    ways, most = rules.ways("seq"), max(a.shape[1] for part in parts for a in part)
    if ways == 1 or most < ways:  # shard() leaves so few tokens whole
        joined = (a[0] if len(a) == 1 else jnp.concatenate(a, 1) for a in zip(*parts))
        out = attend_whole(*joined, rules=rules, kv_lengths=kv_lengths, key_counts=key_counts)
        return _split(out, [q.shape[1] for q, _, _ in parts])
    b, _, heads, d = parts[0][0].shape
    tensor = rules.ways("heads")
    form = Plan(1, 1, -(-heads // tensor)) if whole_keys else plan(-(-heads // tensor), ways, rules.exchange)
    sizes = tuple(tuple(a.shape[1] for a in some) for some in zip(*parts))
    _log_choice(str(form) if not whole_keys else "local, keys are whole", ways, sizes[0], sizes[1], heads, form.heads * tensor)
    batch, seq, head, _ = rules.spec(("batch", "seq", "heads", None))
    tokens = P(batch if b % rules.ways("batch") == 0 else None, seq, head, None)
    whole = P(tokens[0], None, head, None)
    fill = lambda a, to: jnp.pad(a, ((0, 0), (0, -a.shape[1] % to), (0, -heads % tensor), (0, 0)))
    padded = [(fill(q, ways), *(fill(a, 1 if whole_keys else ways) for a in kv)) for q, *kv in parts]
    keys = whole if whole_keys else tokens
    run = functools.partial(_local, sizes, rules.axes("seq"), form)
    out = jax.shard_map(
        run, in_specs=([(tokens, keys, keys)] * len(parts), P(tokens[0]), P()), out_specs=[tokens] * len(parts),
        check_vma=False,
    )(padded, kv_lengths, key_counts)  # fmt: skip
    return [o[:, :n, :heads].reshape(b, n, heads * d) for o, n in zip(out, sizes[0])]


@functools.lru_cache(maxsize=64)
def _log_choice(form: str, ways: int, queries: tuple, keys: tuple, heads: int, computed: int):
    padded = f", {computed - heads} of zeros added" if computed > heads else ""
    log.info(
        "attention on %d devices: %s, for queries %s, keys %s, %d heads%s", ways, form, queries, keys, heads, padded
    )  # fmt: skip


def _local(sizes: tuple, axes: tuple[str, ...], form: Plan, parts: list, lengths: Lengths, counts) -> list[Tokens]:
    """What each device does with its slices (B, N/W, H, K) of the parts. sizes: tokens of each part's queries, keys and
    values on all devices, without padding."""
    queries, keys, _ = sizes
    q, k, v = ([part[i] for part in parts] for i in range(3))
    count = len(parts)
    if form.ulysses > 1:
        pieces = _to_heads([*q, *k, *v], axes, form)
        q, k, v = pieces[:count], pieces[count : 2 * count], pieces[2 * count :]
    if form.ring > 1:
        out = _split(_ring(*(_joined(a) for a in (q, k, v)), keys, [a.shape[1] for a in k], axes, form, lengths, counts),
                     [a.shape[1] for a in q])  # fmt: skip
    elif form.ulysses > 1:  # all tokens, in order: cut the padding
        cut = lambda pieces, sizes: _joined([a[:, :n] for a, n in zip(pieces, sizes)])
        seen = attention(cut(q, queries), cut(k, keys), cut(v, keys), kv_lengths=lengths, key_counts=counts)
        back = lambda a, like: jnp.pad(a, ((0, 0), (0, like.shape[1] - a.shape[1]), (0, 0), (0, 0)))
        out = [back(a, like) for a, like in zip(_split(seen, queries), q)]
    else:
        seen = attention(_joined(q), _joined(k), _joined(v), kv_lengths=lengths, key_counts=counts)
        out = _split(seen, [a.shape[1] for a in q])
    return _to_tokens(out, axes, form, parts[0][0].shape[2]) if form.ulysses > 1 else out


def _to_heads(pieces: Sequence[Tokens], axes: tuple[str, ...], form: Plan) -> list[Tokens]:
    """Slices of all heads to the group's tokens of some heads, in one all-to-all."""
    x, u = _joined(pieces), form.ulysses
    b, n, heads, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, form.heads - heads), (0, 0)))
    x = jnp.moveaxis(x.reshape(b, n, u, form.heads // u, d), 2, 0)
    x = jnp.moveaxis(_all_to_all(x, axes, form), 0, 1)  # B, devices that sent, n, H/U, K
    return [a.reshape(b, u * a.shape[2], *a.shape[3:]) for a in _split(x, [p.shape[1] for p in pieces], 2)]


def _to_tokens(pieces: Sequence[Tokens], axes: tuple[str, ...], form: Plan, heads: int) -> list[Tokens]:
    """`_to_heads` backwards, to as many heads as there were."""
    u, sizes = form.ulysses, [p.shape[1] // form.ulysses for p in pieces]
    x = _joined([p.reshape(len(p), u, n, *p.shape[2:]) for p, n in zip(pieces, sizes)], 2)
    x = jnp.moveaxis(_all_to_all(jnp.moveaxis(x, 1, 0), axes, form), 0, 2)  # B, n, devices that sent, H/U, K
    return _split(x.reshape(*x.shape[:2], form.heads, x.shape[-1])[:, :, :heads], sizes)


def _all_to_all(x: Float[Array, "U ..."], axes: tuple[str, ...], form: Plan) -> Float[Array, "U ..."]:
    """x[i] goes to the i-th of U neighbours; the result is what they sent."""
    groups = [[g * form.ulysses + i for i in range(form.ulysses)] for g in range(form.ring)]
    return jax.lax.all_to_all(x, axes, 0, 0, axis_index_groups=groups if form.ring > 1 else None)


def _ring(
    q: Tokens, k: Tokens, v: Tokens, keys: Sequence[int], held: Sequence[int], axes: tuple[str, ...], form: Plan,
    lengths: Lengths, counts: Float[Array, "S"] | None,
) -> Tokens:  # fmt: skip
    """Attention to all keys, those of the groups of devices one after another.

    keys: tokens of each part, without padding. held: of each part in k and v, which are one group's.
    """
    ways, u, group = form.ulysses * form.ring, form.ulysses, jax.lax.axis_index(axes) // form.ulysses
    starts = [sum(keys[:i]) for i in range(len(keys))]
    logs = None if counts is None else jnp.log(counts.astype(jnp.float32))

    def bias(step: int) -> Float[Array, "B|1 S"]:
        """Of the keys that are here after so many steps: which they are follows from where they came from."""
        first = (group - step) % form.ring
        within = [first * n + jnp.arange(n) for n in held]
        real = jnp.concatenate([at < n for at, n in zip(within, keys)])[None]
        place = jnp.concatenate([jnp.minimum(at, n - 1) + start for at, n, start in zip(within, keys, starts)])
        if lengths is not None:
            real = real & (place < lengths[:, None])
        return jnp.where(real, 0.0 if logs is None else logs[place], MASKED)

    kv = jnp.stack([k, v])
    seen = attention_with_lse(q, *kv, bias(0))
    for step in range(1, form.ring):
        kv = jax.lax.ppermute(kv, axes, [(i, (i + u) % ways) for i in range(ways)])
        seen = merge(seen, attention_with_lse(q, *kv, bias(step)))
    return seen[0].astype(q.dtype)


def _joined(pieces: Sequence[Any], axis: int = 1):
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis)


def _split(x, sizes: Sequence[int], axis: int = 1) -> list:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [jax.lax.slice_in_dim(x, end - n, end, axis=axis) for n, end in zip(sizes, ends)]
