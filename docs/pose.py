"""Draws docs/images/pose.png: a made-up person who waves, as `jdit.pose` draws it, and the numbers of the body points.

python docs/pose.py
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from jdit import pose  # noqa: E402

BODY = {0: (0, -100), 1: (0, -68), 2: (-33, -66), 3: (-52, -20), 4: (-44, 28), 5: (33, -66), 8: (-20, 30), 9: (-25, 88),
        10: (-27, 146), 11: (20, 30), 12: (25, 88), 13: (27, 146), 14: (-8, -108), 15: (8, -108), 16: (-18, -103),
        17: (18, -103), 18: (42, 154), 19: (-42, 154)}  # fmt: skip
"""Of the release's 20 points, from the middle of the person; the left arm is added."""


def hand(wrist: np.ndarray, towards: float) -> np.ndarray:
    """21 points: four of each finger, fanned out around a direction (radians, clockwise from the right)."""
    angles = towards + np.linspace(-0.75, 0.6, 5)[:, None, None]
    reach = np.array([7, 13, 17, 21])[None, :, None] * np.array([0.8, 1, 1.05, 1, 0.85])[:, None, None]
    fingers = wrist + reach * np.concatenate([np.cos(angles), np.sin(angles)], -1)
    return np.concatenate([wrist[None], fingers.reshape(20, 2)])


def person(lift: float) -> np.ndarray:
    """Body and hands (62, 3) around (0, 0) with the left forearm turned by `lift` radians."""
    body = np.zeros((20, 2))
    body[list(BODY)] = list(BODY.values())
    body[6] = body[5] + (42, -12)
    body[7] = body[6] + 48 * np.array((np.cos(lift), np.sin(lift)))
    points = np.concatenate([body, hand(body[7], lift), hand(body[4], 1.5)])
    return np.concatenate([points, np.ones((62, 1))], -1)


def waving(frames: int, height: int, width: int) -> np.ndarray:
    """(T, 62, 3) in pixels of a picture of height x width."""
    lifts = -1.5 + 0.6 * np.sin(2 * np.pi * np.arange(frames) / max(frames, 2))
    scale = height / 340
    return np.stack([person(lift) for lift in lifts]) * (scale, scale, 1) + (width / 2, height / 2, 0)


def main():
    height, width = 400, 260
    points = waving(8, height, width)[[6, 0, 2]]
    frames = list(pose.draw(points, height, width))
    numbered = Image.fromarray(frames[0] // 2)
    pen = ImageDraw.Draw(numbered)
    for i, (x, y, _) in enumerate(points[0, :20]):
        pen.text((x + 3, y - 6), str(i), fill="white")
    sheet = Image.fromarray(np.concatenate([*frames, np.asarray(numbered)], 1))
    sheet.quantize(64, dither=Image.Dither.NONE).save(ROOT / "docs" / "images" / "pose.png", optimize=True)


if __name__ == "__main__":
    main()
