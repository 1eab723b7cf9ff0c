"""What the devices that share a sequence do to attend to all of it, written for one of them (inside jax.shard_map).

Legend: B batch, H heads, K head dim; W devices, U of which exchange heads for tokens and R rotate keys and values, W =
U R. A sequence has parts (a picture, its text); a device holds a slice of each.

- Ulysses (arXiv 2309.14509), R = 1: one all-to-all gives every device all tokens of H/U heads, another takes the
  results back. In between, attention is that of one device, cuDNN included. Values, keys and queries of a long sequence
  have an all-to-all each, in this order: one is packed while the one before it travels, and what arrives is in order
  and need not be copied.
- Ring (arXiv 2310.01889), U = 1: queries stay, keys and values go round in R - 1 collective-permutes each, behind
  attention to those that are here, and the partial results are merged in float32. On the GPUs of one host, copy engines
  send them (`jdit.pipeline.executor.compiler_options`), which takes no processor from attention.
- Both (arXiv 2405.07719): groups of U neighbours exchange heads, and what a group holds goes round R groups. It is for
  heads that W does not divide: 38 heads on 4 devices are U = 2, R = 2.
- Gathered (arXiv 2407.21783, section 3.3.2), U = 1: keys and values of all devices come to each before attention, which
  is that of one device again. On two devices it sends as much as Ulysses, all of it while the projections run.

A ring's attention is cuDNN's for a sequence of one part without counted keys; other rings are plain XLA.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jdit.nn.attention import Lengths, attention, log_choice
from jdit.nn.attention_cudnn import TILE, apart, attention_to_all, filled, left_without, takes
from jdit.nn.attention_lse import MASKED, Partial, attention_with_lse, merge
from jdit.nn.layers import marked
from jdit.nn.pieces import Part, joined, padded, split
from jdit.target import target

Tokens = Float[Array, "B n H K"]
Sizes = tuple[tuple[int, ...], ...]
"""Tokens of each part's queries, keys and values on all devices together, without padding."""
LONG = 16384
"""Keys from which on queries, keys and values are sent apart, since the copies that it saves outlast two all-to-alls,
and from which on two GPUs are a ring or gather (`choose`)."""


class Form(NamedTuple):
    """How attention uses W = ulysses x ring devices; `heads` of a device, those of zeros included that were added;
    `gathered`: the ring's keys are all here already."""

    ulysses: int
    ring: int
    heads: int
    gathered: bool = False

    @property
    def rotated(self) -> bool:
        """All devices are one ring."""
        return self.ring > 1 == self.ulysses and not self.gathered

    def __str__(self) -> str:
        around = "gather" if self.gathered else "ring"
        return " x ".join(f"{name} over {n}" for name, n in (("ulysses", self.ulysses), (around, self.ring)) if n > 1)


def choose(heads: int, keys: int, ways: int, exchange: str, *, joint: bool = False) -> Form:
    """The form of attention with so many heads a device, to so many keys, over `ways` devices.

    Args:
        exchange: "auto": for long sequences (`LONG`) on two GPUs a ring if they are one host's, gathered if not, or if
            `joint`; else Ulysses over the largest divisor of `ways` that divides the heads, and a ring over what is
            left. "ulysses": over all; heads of zeros are added where `ways` does not divide them. "ring", "gather":
            over all. "ulysses_ring": Ulysses and a ring as of "auto", with more than one device in either.
        joint: the sequence has several parts, or its keys are counted, for which a ring does not have cuDNN.

    Raises:
        ValueError: "ulysses_ring" where no divisor of `ways`, neither 1 nor all, divides the heads.
    """
    if exchange == "auto" and ways == 2 and keys >= LONG and target().platform == "gpu":
        exchange = "gather" if joint or jax.process_count() > 1 else "ring"
    if exchange == "ulysses":
        return Form(ways, 1, -(-heads // ways) * ways)
    if exchange in ("ring", "gather"):
        return Form(1, ways, heads, exchange == "gather")
    divisors = [u for u in range(1, ways + 1) if ways % u == 0 and heads % u == 0]
    if exchange == "ulysses_ring":
        divisors = [u for u in divisors if 1 < u < ways]
        if not divisors:
            raise ValueError(
                f"exchange='ulysses_ring' cannot be had: {heads} heads a device over {ways} devices, and no number"
                f" between 1 and {ways} divides both; there are 'auto', 'ulysses', 'ring' and 'gather'"
            )
    return Form(divisors[-1], ways // divisors[-1], heads)


def attend_slices(
    sizes: Sizes, axes: tuple[str, ...], form: Form, parts: Sequence[Part], lengths: Lengths, counts
) -> list[Tokens]:
    """Attention of this device's slices to all tokens; the results a part.

    Args:
        axes: mesh axes that the tokens are spread over. parts: slices of equal length on all devices (padding last);
            keys and values that are gathered are whole.
        lengths, counts: as of `attention`, of all keys, the parts one after another.
    """
    heads, count = parts[0][0].shape[2], len(parts)
    pieces = [part[i] for i in range(3) for part in parts]
    if form.ulysses > 1:
        pieces = _to_heads(pieces, axes, form, apart=[count, 0] if sizes[1][0] >= LONG else [])
    q, k, v = (pieces[i * count : (i + 1) * count] for i in range(3))
    queries = sizes[0] if form.ring == 1 else [a.shape[1] for a in q]  # that are here
    if form.ring > 1 and not form.gathered:
        ring = Ring(sizes[1], tuple(a.shape[1] for a in k), axes, form)
        out = split(_ring(joined(q), joined(k), joined(v), ring, lengths, counts), queries)
    elif count == 1 and counts is None:  # all keys are here, in order: their padding, which is last, is not seen
        if lengths is None and k[0].shape[1] > sizes[1][0]:
            lengths = jnp.full(k[0].shape[0], sizes[1][0], jnp.int32)
        out = [attention(q[0], k[0], v[0], kv_lengths=lengths)]
    else:  # padding is between the parts: it is cut, and put back
        cut = lambda pieces, sizes: joined([a[:, :n] for a, n in zip(pieces, sizes)])
        seen = attention(*map(cut, (q, k, v), (queries, *sizes[1:])), kv_lengths=lengths, key_counts=counts)
        out = [padded(a, piece.shape[1]) for a, piece in zip(split(seen, queries), q)]
    return _to_tokens(out, axes, form, heads) if form.ulysses > 1 else out


def _to_heads(pieces: Sequence[Tokens], axes: tuple[str, ...], form: Form, apart: Sequence[int]) -> list[Tokens]:
    """Slices of all heads to the U devices' tokens of H/U heads: in one all-to-all, but for the pieces `apart`, which
    follow it with one each. XLA would pack all of them in one kernel, and send none before it ends."""
    groups = [[i for i in range(len(pieces)) if i not in apart], *([i] for i in apart)]
    out: dict[int, Tokens] = {}
    packed = None
    for group in groups:
        some = [pieces[i] if packed is None else pieces[i] + packed for i in group]
        given = _by_device(joined(some), form)
        if len(groups) > 1:
            given, packed = marked(given)
        x = jnp.moveaxis(_all_to_all(given, axes, form), 0, 1)  # B, devices that sent, n, H/U, K
        parts = split(x, [p.shape[1] for p in some], 2)
        out |= {i: a.reshape(a.shape[0], form.ulysses * a.shape[2], *a.shape[3:]) for i, a in zip(group, parts)}
    return [out[i] for i in range(len(pieces))]


def _by_device(x: Tokens, form: Form) -> Float[Array, "U B n h K"]:
    """Heads, zeros included, in the order in which they are sent."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, form.heads - x.shape[2]), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], form.ulysses, -1, x.shape[-1]), 2, 0)


def _to_tokens(pieces: Sequence[Tokens], axes: tuple[str, ...], form: Form, heads: int) -> list[Tokens]:
    """`_to_heads` backwards, to as many heads as there were."""
    u, sizes = form.ulysses, [p.shape[1] // form.ulysses for p in pieces]
    x = joined([p.reshape(p.shape[0], u, n, *p.shape[2:]) for p, n in zip(pieces, sizes)], 2)
    x = jnp.moveaxis(_all_to_all(jnp.moveaxis(x, 1, 0), axes, form), 0, 2)  # B, n, devices that sent, H/U, K
    return split(x.reshape(*x.shape[:2], form.heads, x.shape[-1])[:, :, :heads], sizes)


def _all_to_all(x: Float[Array, "U ..."], axes: tuple[str, ...], form: Form) -> Float[Array, "U ..."]:
    """x[i] goes to the i-th of U neighbours; the result is what they sent."""
    groups = [[g * form.ulysses + i for i in range(form.ulysses)] for g in range(form.ring)]
    return jax.lax.all_to_all(x, axes, 0, 0, axis_index_groups=groups if form.ring > 1 else None)


class Ring(NamedTuple):
    """What a device knows of a ring. keys: tokens of each part, without padding. held: those of each part that a group
    of devices has."""

    keys: tuple[int, ...]
    held: tuple[int, ...]
    axes: tuple[str, ...]
    form: Form

    def source(self, step: int) -> Int[Array, ""]:
        """The group whose keys are here after so many steps."""
        return (jax.lax.axis_index(self.axes) // self.form.ulysses - step) % self.form.ring

    def turn(self, a: Array) -> Array:
        """To the next group, from the one before."""
        u, ways = self.form.ulysses, self.form.ulysses * self.form.ring
        return jax.lax.ppermute(a, self.axes, [(i, (i + u) % ways) for i in range(ways)])


def _ring(q: Tokens, k: Tokens, v: Tokens, ring: Ring, lengths: Lengths, counts: Float[Array, "S"] | None) -> Tokens:
    """Attention to all keys, those of one group of devices after another."""
    by_cudnn = len(ring.keys) == 1 and counts is None and takes(q, k)
    log_choice(f"{'cudnn' if by_cudnn else 'xla'} with log-sum-exps", q.shape, k.shape, str(q.dtype))
    return _cudnn_ring(q, k, v, lengths, ring) if by_cudnn else _plain_ring(q, k, v, lengths, counts, ring)


def _plain_ring(q: Tokens, k: Tokens, v: Tokens, lengths: Lengths, counts, ring: Ring) -> Tokens:
    keys, held = ring.keys, ring.held
    starts = [sum(keys[:i]) for i in range(len(keys))]

    def bias(step: int) -> Float[Array, "#B S"]:
        """Of the keys that are here after so many steps."""
        within = [ring.source(step) * n + jnp.arange(n) for n in held]
        seen: Bool[Array, "#B S"] = jnp.concatenate([at < n for at, n in zip(within, keys)])[None]
        place = jnp.concatenate([jnp.minimum(at, n - 1) + start for at, n, start in zip(within, keys, starts)])
        if lengths is not None:
            seen = seen & (place < lengths[:, None])
        weights = 0.0 if counts is None else jnp.log(counts.astype(jnp.float32))[place]
        return jnp.where(seen, weights, MASKED)

    out = attention_with_lse(q, k, v, bias(0))
    for step in range(1, ring.form.ring):
        k, v = ring.turn(k), ring.turn(v)
        out = merge(out, attention_with_lse(q, k, v, bias(step)))
    return out[0].astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cudnn_ring(q: Tokens, k: Tokens, v: Tokens, lengths: Lengths, ring: Ring) -> Tokens:
    """`_plain_ring` of one part by cuDNN, without a mask (`jdit.nn.attention_cudnn`). Its gradients are the plain ones,
    since cuDNN's know nothing of the log-sum-exp's."""
    (keys,), (held,), groups = ring.keys, ring.held, ring.form.ring
    ends = jnp.full(k.shape[0], keys, jnp.int32) if lengths is None else jnp.minimum(lengths, keys)
    seen = lambda group: jnp.clip(ends - group * held, 0, held).astype(jnp.int32)
    padding = groups * held - keys
    in_last = lengths is None and padding < held and held % TILE == 0
    k, v = filled([k], [v], seen(ring.source(0)), min(held, padding) if lengths is None else None)
    q, total = apart(q), k.shape[1]

    def attended(step: int, k: Tokens, v: Tokens) -> Partial:
        """Where the last group alone has padding, it stays in."""
        out, lse = attention_to_all(q, k, v)
        if in_last:
            return out, lse
        some = seen(ring.source(step))
        left = left_without(jnp.where(some > 0, total - some, 0), k[:, :1], q, lse)
        lse = jnp.where((some > 0)[:, None, None], lse + jnp.log(left), MASKED)
        return out.astype(jnp.float32) / left[..., None], lse

    out, first = attended(0, k, v), k[:, :1]
    for step in range(1, groups):
        k, v = ring.turn(k), ring.turn(v)
        out = merge(out, attended(step, k, v))
        first = jnp.where(ring.source(step) == groups - 1, k[:, :1], first)
    if in_last and padding:
        out = out[0] / left_without(jnp.full(k.shape[0], padding), first, q, out[1])[..., None], out[1]
    return out[0].astype(q.dtype)


def _cudnn_ring_forward(q, k, v, lengths, ring):
    return _cudnn_ring(q, k, v, lengths, ring), (q, k, v, lengths)


def _cudnn_ring_backward(ring, given, g):
    *qkv, lengths = given
    _, back = jax.vjp(lambda q, k, v: _plain_ring(q, k, v, lengths, None, ring), *qkv)
    return *back(g), None


_cudnn_ring.defvjp(_cudnn_ring_forward, _cudnn_ring_backward)
