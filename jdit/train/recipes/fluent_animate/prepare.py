"""Prepare the data of fluent-animate from the folder of fluent-video's clips: who does the same motion as whom.

    python -m jdit.train.recipes.fluent_animate.prepare data/fluent_video data/fluent_animate

Writes metadata.jsonl only; its files are those of the other folder. A motion is what a caption says without skin tone
and with man, woman and person alike, as long as the figures move together; those of fewer than `LEAST` clips are left
out. Held out (`split` "val") are the characters that fluent-video holds out, and `MOTIONS` motions with all of theirs.
"""

import argparse
import json
import os
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from jdit.train.clips import load_whole
from jdit.train.drive import figure

WHO = re.compile(r"\b(?:man|woman|person|men|women|people|boy|girl|child)\b")
LEAST, MOTIONS, SEED = 5, 4, 29
ALIKE = 0.7
"""Least overlap of two figures, over all frames, that do the same motion."""
SIZE = 64


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two figures' masks."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def motions(rows: list[dict], masks: dict[str, np.ndarray]) -> dict[str, list[dict]]:
    """Motion -> its clips, those of at least `LEAST`. A figure that moves unlike the first is a motion of its own.

    Args:
        rows: lines of the metadata. masks: of each `group`, the figure of one of its clips.
    """
    firsts: dict[str, str] = {}
    out = defaultdict(list)
    for row in rows:
        name, own = WHO.sub("someone", row["group"]), row["group"]
        first = firsts.setdefault(name, own)
        out[name if overlap(masks[first], masks[own]) >= ALIKE else own].append(row)
    return {name: clips for name, clips in out.items() if len(clips) >= LEAST}


def prepare(source: Path, out: Path) -> tuple[int, int]:
    """Write the data folder; the numbers of motions and clips.

    Raises:
        ValueError: the source was not made by fluent-video's prepare.
    """
    meta = source / "metadata.jsonl"
    rows = [json.loads(line) for line in meta.read_text(encoding="utf-8").splitlines()] if meta.is_file() else []
    if not rows or "group" not in rows[0]:
        raise ValueError(f"{meta}: no lines with a group; make it with jdit.train.recipes.fluent_video.prepare")
    first = {row["group"]: row["file_name"] for row in reversed(rows)}
    found = motions(rows, {group: figure(load_whole(source / name, SIZE)) for group, name in first.items()})
    new = set(random.Random(SEED).sample(sorted(found), min(MOTIONS, len(found) - 1)))
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in sorted(found):
        for row in found[name]:
            split = "val" if name in new else row["split"]
            path = os.path.relpath(source / row["file_name"], out)
            lines.append(json.dumps({**row, "file_name": path, "group": name, "split": split}, ensure_ascii=False))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(found), len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder that fluent-video's prepare wrote")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print("{} motions, {} clips".format(*prepare(args.source, args.out)))


if __name__ == "__main__":
    main()
