"""Skeletons against OpenCV's pictures of them, made from its own ellipses, lines and discs."""

import colorsys
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jdit import pose

PICTURE = Path(__file__).parent / "pose_opencv.png"
"""What `opencv` below gives with OpenCV 5.0: size 240 x 320 on the left, 400 x 240 on the right."""
SIZES = ((240, 320), (400, 240))
LIMBS = "2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18 14-19 11-20"
HUES = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220, 240, 260, 280, 300, 320, 340]


def wild(height, width):
    """One frame of COCO-WholeBody with no anatomy, well inside of the picture."""
    rng = np.random.default_rng(height)
    at = rng.uniform(0.15, 0.85, (133, 2))
    for hand in (91, 112):
        at[hand : hand + 21] = rng.uniform(0.2, 0.8, 2) + rng.uniform(-0.15, 0.15, (21, 2))
    return np.concatenate([at * (width, height), rng.uniform(0.4, 1, (133, 1))], -1)[None]


def opencv(cv2, points, height, width):
    """The release's skeleton, body points numbered from 1 as its papers do, by OpenCV."""
    image, radius = np.zeros((height, width, 3), np.uint8), max(min(height, width) // 200 - 1, 1)
    halves = lambda a, b: (points[a] + points[b]) / 2
    body = [points[0], halves(5, 6), *points[[6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]]]
    body += [halves(17, 18), halves(20, 21)]
    colours = [np.round(255 * np.array(colorsys.hsv_to_rgb(h / 360, 1, 1))) for h in HUES]
    colours += [np.array((200, 200, 0)), np.array((100, 100, 0))]
    for limb, colour in zip(LIMBS.split(), colours):
        a, b = (body[int(i) - 1] for i in limb.split("-"))
        if min(a[2], b[2]) >= 0.5:
            turn, reach = math.degrees(math.atan2(a[1] - b[1], a[0] - b[0])), math.dist(a[:2], b[:2]) / 2
            centre = (int((a[0] + b[0]) / 2), int((a[1] + b[1]) / 2))
            shape = cv2.ellipse2Poly(centre, (int(reach), radius), int(turn), 0, 360, 1)
            cv2.fillConvexPoly(image, shape, [int(c * 0.6) for c in colour])
    for point, colour in zip(body, colours):
        if point[2] >= 0.5:
            cv2.circle(image, (int(point[0]), int(point[1])), radius, colour.tolist(), -1)
    radius = max(radius // 2, 1)
    for hand in (points[91:112], points[112:133]):
        at = [(int(x), int(y)) for x, y, _ in hand]
        for i in range(20):
            a, b = (0 if i % 4 == 0 else i), i + 1
            if min(hand[a, 2], hand[b, 2]) >= 0.5:
                cv2.line(image, at[a], at[b], [255 * c for c in colorsys.hsv_to_rgb(i / 20, 1, 1)], radius)
        for x, score in zip(at, hand[:, 2]):
            if score >= 0.5:
                cv2.circle(image, x, radius, (0, 0, 255), -1)
    return image


def test_equals_the_stored_picture():
    stored = np.asarray(Image.open(PICTURE).convert("RGB"))
    for height, width, left in ((*SIZES[0], 0), (*SIZES[1], 320)):
        ours = pose.draw(wild(height, width), height, width)
        np.testing.assert_array_equal(ours[0], stored[:height, left : left + width])


@pytest.mark.parametrize("size, share", [((240, 320), 0), ((720, 1280), 0), ((1088, 1920), 0.02)], ids=str)
def test_equals_opencv(size, share):
    """To the pixel below 1000 rows; from there on hands have lines two pixels wide, whose rims OpenCV places between
    pixels: they may differ."""
    cv2 = pytest.importorskip("cv2")
    want = opencv(cv2, wild(*size)[0], *size)
    far = (pose.draw(wild(*size), *size)[0] != want).any(-1).sum()
    assert far <= share * want.any(-1).sum()
