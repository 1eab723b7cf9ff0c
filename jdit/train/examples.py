"""The training examples: which picture in which colour on which background, and what each may be called.

E examples, T captions an example, U different captions.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jdit.train.colour import BACKGROUNDS, COLOURS, background_table, composite, recolour_many
from jdit.train.data import Item

CHOICES = 8
"""Captions an example; shorter lists are repeated."""
GROUPS = ("plain", "colour", "background", "both")


def article(text: str) -> str:
    """The caption with "a" or "an", or as it is where the first noun phrase is a plural."""
    head = re.split(r", | with | of | in | on | and ", text)[0].split()[-1]
    if head.endswith("s") and not head.endswith(("ss", "us", "is")):
        return text
    return f"an {text}" if text[0] in "aeiou" and not text.startswith(("one", "uni", "euro", "ewe")) else f"a {text}"


class Examples(NamedTuple):
    """Examples in the order of `GROUPS`, with `start` and `size` of each group.

    colour: -1 is the picture's own. background: 0 is white.
    """

    picture: Int[np.ndarray, "E"]
    colour: Int[np.ndarray, "E"]
    background: Int[np.ndarray, "E"]
    caption: Int[np.ndarray, "E T"]
    texts: list[str]
    start: Int[np.ndarray, "4"]
    size: Int[np.ndarray, "4"]


class Draw(NamedTuple):
    """What `draw` needs on the device."""

    caption: Int[Array, "E T"]
    start: Int[Array, "4"]
    size: Int[Array, "4"]
    cumulative: Float[Array, "4"]


def read_held_out(file: str, beside: Path) -> frozenset[str]:
    """The "colour noun" lines of a file beside the config, or of a path.

    Raises:
        ValueError: no such file.
    """
    if not file:
        return frozenset()
    path = beside.parent / file if (beside.parent / file).is_file() else Path(file)
    if not path.is_file():
        raise ValueError(f"data.held_out = {file}: no such file, nor one beside {beside}")
    return frozenset(line.strip() for line in path.read_text().splitlines() if line.strip())


def build(items: Sequence[Item], *, held_out: frozenset[str] = frozenset(), backgrounds: int = 9, both: int = 3,
          seed: int = 0) -> Examples:  # fmt: skip
    """All examples of some pictures.

    Args:
        held_out: "colour noun" pairs to leave out.
        backgrounds: coloured backgrounds a picture. both: of these for each recoloured one.
    """
    rng = np.random.default_rng(seed)
    taken = {i.text for i in items}
    names = list(BACKGROUNDS)
    groups: dict[str, list[tuple[int, int, int, list[str]]]] = {g: [] for g in GROUPS}

    def some(n: int) -> list[int]:
        return sorted(rng.permutation(np.arange(1, len(names)))[:n].tolist())

    for p, item in enumerate(items):
        base = [*item.captions]
        groups["plain"].append((p, -1, 0, [*base, f"{base[0]} on a white background", *base, *base]))
        for b in some(backgrounds):
            groups["background"].append((p, -1, b, [f"{c} on a {names[b]} background" for c in base[:2]]))
        if not item.noun:
            continue
        for c, colour in enumerate(COLOURS):
            thing = f"{colour} {item.noun}"
            if thing in held_out or thing in taken:
                continue
            called = [article(thing), thing]
            groups["colour"].append((p, c, 0, called))
            for b in some(both):
                groups["both"].append((p, c, b, [f"{name} on a {names[b]} background" for name in called]))
    rows = [row for g in GROUPS for row in groups[g]]
    texts: dict[str, int] = {"": 0}
    caption = np.empty((len(rows), CHOICES), np.int32)
    for row, (_, _, _, called) in zip(caption, rows):
        row[:] = [texts.setdefault(called[i % len(called)], len(texts)) for i in range(CHOICES)]
    picture, colour, background = (np.asarray([r[i] for r in rows], np.int32) for i in range(3))
    size = np.asarray([len(groups[g]) for g in GROUPS], np.int32)
    return Examples(picture, colour, background, caption, list(texts), np.cumsum(size) - size, size)


def drawable(examples: Examples, mix: Sequence[float]) -> Draw:
    """For the device; groups that are empty get no share."""
    share = np.where(examples.size > 0, np.asarray(mix, np.float64), 0)
    cumulative = np.cumsum(share / share.sum())
    return Draw(
        *(jnp.asarray(a) for a in (examples.caption, examples.start, examples.size, cumulative.astype(np.float32)))
    )


def draw(d: Draw, key: PRNGKeyArray, n: int) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """`n` examples and a caption of each: a group by its share, then any of its examples."""
    u = jax.random.uniform(key, (3, n))
    group = jnp.searchsorted(d.cumulative, u[0] * d.cumulative[-1], side="right").clip(0, 3)
    within = jnp.minimum((u[1] * d.size[group]).astype(jnp.int32), d.size[group] - 1)
    example = d.start[group] + within
    choice = jnp.minimum((u[2] * CHOICES).astype(jnp.int32), CHOICES - 1)
    return example, d.caption[example, choice]


def render(rgba, colours, picture, colour, background) -> Float[Array, "B S S 3"]:
    """The pictures of some examples in [0, 1].

    Args:
        rgba: uint8 (N, S, S, 4), all pictures. colours: (N, 3), see `Pictures.colours`.
        picture, colour, background: (B,) indices as in `Examples`.
    """
    own = rgba[picture].astype(jnp.float32) / 255
    new = recolour_many(own, colours[picture, 0], colours[picture, 1], colour)
    return composite(new, jnp.asarray(background_table())[background])
