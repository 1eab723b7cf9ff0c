"""Colours by name: recolouring pictures for training, and telling the colour of a picture.

B batch, H rows, W columns. Pictures are RGBA in [0, 1]; hues are in turns [0, 1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Colour(NamedTuple):
    """rgb: what an object of this colour has as its mid tone. hues: the degrees that count as it."""

    rgb: tuple[int, int, int]
    hues: tuple[int, int]


COLOURS = {
    "red": Colour((225, 28, 32), (-14, 13)),
    "orange": Colour((255, 132, 10), (13, 41)),
    "yellow": Colour((250, 214, 20), (41, 68)),
    "green": Colour((48, 172, 62), (68, 165)),
    "blue": Colour((30, 108, 240), (165, 247)),
    "purple": Colour((140, 60, 215), (247, 292)),
    "pink": Colour((255, 92, 178), (292, 346)),
}
"""Object colours: those whose shadows and lights stay unmistakable. Brown, black and white are not among them."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (214, 58, 58),
    "orange": (250, 158, 66),
    "yellow": (250, 224, 100),
    "green": (92, 184, 104),
    "blue": (86, 150, 236),
    "purple": (158, 104, 218),
    "pink": (248, 154, 204),
    "black": (18, 18, 20),
    "gray": (150, 150, 154),
}
"""Flat background colours; white is the plain one."""

WORDS = frozenset([*COLOURS, *BACKGROUNDS, "brown", "grey", "golden", "silver", "colored", "coloured", "colorful"])
"""Words that make a caption unfit for a further colour."""


def hsv(rgb: Any) -> tuple[Any, Any, Any]:
    """Hue in turns, saturation and value, (*S) each, of colours (*S, 3), as NumPy or JAX arrays after the argument."""
    xp = np if isinstance(rgb, np.ndarray) else jnp
    high, low = rgb.max(-1), rgb.min(-1)
    delta = high - low
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = xp.maximum(delta, 1e-6)
    sector = xp.where(high == r, (g - b) / safe % 6, xp.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    return xp.where(delta > 1e-6, sector / 6, 0.0), delta / xp.maximum(high, 1e-6), high


class Dominant(NamedTuple):
    """The one colour of a picture: hue in turns, the share of the object that has it, its median value."""

    hue: float
    share: float
    value: float


SATURATED = 0.25
"""Saturation from which a pixel has a hue."""


def dominant(rgba: Float[np.ndarray, "H W 4"], width: float = 30 / 360) -> Dominant:
    """The hue that most of an object has, and the share of its opaque pixels within `width` turns of it."""
    opaque = rgba[..., 3] > 0.5
    h, s, v = (c[opaque] for c in hsv(np.asarray(rgba[..., :3], np.float32)))
    if not h.size:
        return Dominant(0.0, 0.0, 0.0)
    coloured = (s > SATURATED) & (v > 0.15)
    counts = np.histogram(h[coloured], bins=72, range=(0, 1), weights=s[coloured])[0]
    smooth = np.sum([np.roll(counts, i) for i in range(-3, 4)], axis=0)
    hue = (int(smooth.argmax()) + 0.5) / 72
    near = coloured & (np.abs((h - hue + 0.5) % 1 - 0.5) < width)
    return Dominant(hue, float(near.mean()), float(np.median(v[near])) if near.any() else 0.0)


def recolour(
    rgba: Float[Array, "H W 4"], hue: Float[Array, ""], value: Float[Array, ""], rgb: Float[Array, "3"]
) -> Float[Array, "H W 4"]:
    """Give the parts of dominant colour (hue, value) the colour `rgb`, keeping shadows, lights and other colours.

    Shadows are the colour times a factor (which keeps its hue), lights go towards white.
    """
    h, s, v = hsv(rgba[..., :3])
    distance = jnp.abs((h - hue + 0.5) % 1 - 0.5)
    mask = jnp.clip((55 / 360 - distance) / (15 / 360), 0, 1) * jnp.clip((s - 0.12) / 0.15, 0, 1)
    shade = (v / jnp.maximum(value, 0.2))[..., None]
    pale = jnp.clip((0.45 - s) / 0.45, 0, 1)[..., None] * 0.6  # what was washed out stays so
    shadow = rgb * jnp.clip(shade, 0.3, 1)
    light = jnp.maximum(jnp.clip((shade - 1) / 0.8, 0, 0.5), pale)
    new = shadow + (jnp.clip(shade, 0, 1) - shadow) * light
    out = rgba[..., :3] + (new - rgba[..., :3]) * mask[..., None]
    return jnp.concatenate([jnp.clip(out, 0, 1), rgba[..., 3:]], -1)


def composite(rgba: Float[Array, "... H W 4"], background: Float[Array, "... 3"]) -> Float[Array, "... H W 3"]:
    """Put a picture on a flat background."""
    return background[..., None, None, :] + (rgba[..., :3] - background[..., None, None, :]) * rgba[..., 3:]


def name_colour(rgb: Float[np.ndarray, "H W 3"]) -> tuple[str, dict[str, float]]:
    """The colour that most of an object on a flat light background has, and the share of each.

    Pixels without a hue (white, grey, black, the background) have no vote, nor have those that look like the border.
    """
    rgb = np.asarray(rgb, np.float32)
    border = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), 0)
    h, s, v = hsv(rgb)
    counts = (s > SATURATED) & (v > 0.2) & (np.abs(rgb - border).max(-1) > 0.1)
    weights = np.where(counts, s, 0)
    degrees = h * 360
    votes = {}
    for name, colour in COLOURS.items():
        low, high = colour.hues
        votes[name] = float(weights[(degrees - low) % 360 < high - low].sum())
    total = sum(votes.values()) or 1.0
    shares = {name: vote / total for name, vote in votes.items()}
    best = max(shares, key=shares.__getitem__)
    return (best if sum(votes.values()) > 0.005 * h.size else "none"), shares


def colour_table() -> Float[np.ndarray, "colours 3"]:
    """`COLOURS` in order, in [0, 1]."""
    return np.asarray([c.rgb for c in COLOURS.values()], np.float32) / 255


def background_table() -> Float[np.ndarray, "backgrounds 3"]:
    """`BACKGROUNDS` in order, in [0, 1]; entry 0 is white."""
    return np.asarray(list(BACKGROUNDS.values()), np.float32) / 255


def recolour_many(rgba, hue, value, colour) -> Float[Array, "B H W 4"]:
    """`recolour` of a batch; rows whose colour index is negative stay as they are."""
    table = jnp.asarray(colour_table())
    new = jax.vmap(recolour)(rgba, hue, value, table[jnp.maximum(colour, 0)])
    return jnp.where((colour >= 0)[:, None, None, None], new, rgba)
