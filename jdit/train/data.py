"""A folder of pictures with captions.

Either metadata.jsonl with a line a picture, {"file_name", "text"}, optionally "captions" (a list: all that it may be
called), "split" ("train" or "val"), "group", "noun", "hue", "value" (see recipes/fluent_image/prepare.py); or NAME.txt
beside NAME.png, each line of which is a caption.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Item(NamedTuple):
    """One picture's record.

    group: of those that `data.balance` counts together; "" is a group of its own.
    noun: what a recoloured copy is called, "" for none. hue (turns) and value: its main colour.
    """

    file: Path
    text: str
    captions: tuple[str, ...]
    split: str
    noun: str
    hue: float
    value: float
    group: str = ""


class Pictures(NamedTuple):
    """A split, in memory."""

    items: list[Item]
    rgba: UInt8[np.ndarray, "B S S 4"]

    @property
    def colours(self) -> Float[np.ndarray, "B 3"]:
        """Hue, value, and 1 where the picture may be recoloured."""
        return np.asarray([(i.hue, i.value, bool(i.noun)) for i in self.items], np.float32)


def read_items(folder: str | Path) -> list[Item]:
    """The records of a data folder.

    Raises:
        ValueError: no such folder, no captions, broken lines or missing files; all of them at once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such data folder")
    meta = folder / "metadata.jsonl"
    items, problems = _from_metadata(meta) if meta.is_file() else _from_text_files(folder)
    problems += [f"{i.file}: no such file" for i in items if not i.file.is_file()]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{folder}: " + "; ".join(problems[:10]) + more)
    if not items:
        raise ValueError(f"{folder}: neither metadata.jsonl nor pictures with a NAME.txt beside them")
    return items


def _from_metadata(meta: Path) -> tuple[list[Item], list[str]]:
    items, problems = [], []
    for number, line in enumerate(meta.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            captions = tuple(row.get("captions") or (text,))
            items.append(
                Item(
                    meta.parent / row["file_name"], text, captions, row.get("split", "train"), row.get("noun", ""),
                    float(row.get("hue", 0)), float(row.get("value", 0)), row.get("group", ""),
                )
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as e:
            problems.append(f"line {number} of {meta.name}: {type(e).__name__} {e}")
    return items, problems


def _from_text_files(folder: Path) -> tuple[list[Item], list[str]]:
    items, problems = [], []
    for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        note = file.with_suffix(".txt")
        lines = (
            [s.strip() for s in note.read_text(encoding="utf-8").splitlines() if s.strip()] if note.is_file() else []
        )
        if lines:
            items.append(Item(file, lines[0], tuple(lines), "train", "", 0.0, 0.0))
        else:
            problems.append(f"{file.name}: no caption in {note.name}")
    return items, problems


def load_picture(file: Path, size: int) -> UInt8[np.ndarray, "S S 4"]:
    """A picture as RGBA, its middle square at `size` pixels.

    Raises:
        ValueError: a file that is no picture.
    """
    try:
        with Image.open(file) as image:
            picture = image.convert("RGBA")
    except OSError as e:
        raise ValueError(f"{file}: {e}") from None
    if picture.size != (size, size):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).convert("RGBa")
        picture = square.resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(picture)


def read(folder: str | Path, size: int) -> tuple[Pictures, Pictures]:
    """The training and the validation split (the latter may be empty), decoded.

    Raises:
        ValueError: see `read_items`.
    """
    items = read_items(folder)
    out = []
    for val in (False, True):
        part = [i for i in items if (i.split == "val") == val]
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(lambda i: load_picture(i.file, size), part))
        out.append(Pictures(part, np.stack(pictures) if pictures else np.zeros((0, size, size, 4), np.uint8)))
    if not out[0].items:
        raise ValueError(f"{folder}: every picture is for validation")
    return out[0], out[1]
