"""A folder of clips with captions: `jdit.train.data`'s metadata.jsonl, whose files are videos, animations or strips.

A strip is one picture whose height is a multiple of its width: the frames one under another. N clips, T frames, S side.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from PIL import Image, ImageSequence

from jdit.train.data import Item, read_items
from jdit.train.examples import CHOICES

STRIPS = (".png", ".webp")


class Clips(NamedTuple):
    """A split, in memory."""

    items: list[Item]
    frames: UInt8[np.ndarray, "N T S S 3"]


class Texts(NamedTuple):
    """Different captions (the first is empty), and `CHOICES` of them for each clip."""

    texts: list[str]
    of: Int[np.ndarray, "N choices"]


def load_clip(file: Path, frames: int, size: int) -> UInt8[np.ndarray, "T S S 3"]:
    """`frames` frames of a clip, spread evenly; of each the middle square, on white where it is transparent.

    Raises:
        ValueError: a file that is no video, or too few frames.
    """
    clip = _frames(file)
    if len(clip) < frames:
        raise ValueError(f"{file}: {len(clip)} frames, {frames} are wanted")
    return _squares(clip[np.arange(frames) * len(clip) // frames], size)


def load_whole(file: Path, size: int) -> UInt8[np.ndarray, "T S S 3"]:
    """All frames of a clip, as `load_clip` gives them."""
    return _squares(_frames(file), size)


def _squares(clip: np.ndarray, size: int) -> UInt8[np.ndarray, "T S S 3"]:
    if clip.shape[1:3] == (size, size):
        return clip
    side = min(clip.shape[1:3])
    top, left = ((n - side) // 2 for n in clip.shape[1:3])
    square = clip[:, top : top + side, left : left + side]
    return np.stack([np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.LANCZOS)) for f in square])


def _frames(file: Path) -> np.ndarray:
    if (clip := _strip(file)) is not None:
        return clip
    if file.suffix.lower() == ".avif":
        return _avif(file)
    from jdit import video  # PyAV is needed for other files alone

    return video.video(file).frames


def _strip(file: Path) -> np.ndarray | None:
    if file.suffix.lower() not in STRIPS:
        return None
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1 or image.height < 2 * image.width or image.height % image.width:
                return None
            return np.asarray(image.convert("RGB")).reshape(-1, image.width, image.width, 3)
    except OSError as e:
        raise ValueError(f"{file}: {e}") from None


def _avif(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    except OSError as e:
        raise ValueError(f"{file}: {e} (Pillow reads AVIF from 11.3 on)") from None


def read(folder: str | Path, frames: int, size: int) -> tuple[Clips, Clips]:
    """The training and the validation split (the latter may be empty), decoded.

    Raises:
        ValueError: see `jdit.train.data.read_items` and `load_clip`.
    """
    items = read_items(folder)
    with ThreadPoolExecutor() as pool:
        clips = list(pool.map(lambda i: load_clip(i.file, frames, size), items))
    out = []
    for val in (False, True):
        rows = [n for n, i in enumerate(items) if (i.split == "val") == val]
        stack = np.stack([clips[n] for n in rows]) if rows else np.zeros((0, frames, size, size, 3), np.uint8)
        out.append(Clips([items[n] for n in rows], stack))
    if not out[0].items:
        raise ValueError(f"{folder}: every clip is for validation")
    return out[0], out[1]


def texts(items: list[Item]) -> Texts:
    """The captions of some clips; short lists are repeated."""
    index: dict[str, int] = {"": 0}
    of = [[index.setdefault(i.captions[n % len(i.captions)], len(index)) for n in range(CHOICES)] for i in items]
    return Texts(list(index), np.asarray(of, np.int32))


def shares(items: list[Item], balance: float) -> Float[np.ndarray, "N"] | None:
    """What `draw` wants: the cumulative share of each clip, see `data.balance`; None where all clips are equal."""
    if not balance:
        return None
    names = [i.group or str(i.file) for i in items]
    sizes = Counter(names)
    weights = np.asarray([float(sizes[n]) for n in names]) ** -balance
    return np.cumsum(weights / weights.sum()).astype(np.float32)


def draw(key: PRNGKeyArray, n: int, clips: int, cumulative: Float[Array, "N"] | None) -> Int[Array, "B"]:
    """`n` of `clips` clips, by their shares."""
    if cumulative is None:
        return jax.random.randint(key, (n,), 0, clips)
    rows = jnp.searchsorted(cumulative, jax.random.uniform(key, (n,)) * cumulative[-1], side="right")
    return jnp.minimum(rows, clips - 1)
