"""Pose and face videos for Wan-Animate, drawn and cut from keypoints as the release's preprocessing does (Wan-Video/Wan2.2,
wan/modules/animate/preprocess: human_visualization.py, pose2d_utils.py, utils.py, process_pipepline.py), on the host.

Any pose estimator's output serves. T frames, K keypoints, H W pixel rows and columns; RGB, uint8.

A keypoint is (x, y, confidence): x to the right and y down from the upper left corner, in pixels, or as shares of the width
and the height where `normalized` says so. One that is not finite counts as not seen. Keypoints are (T, K, 3) arrays of one
person, left and right being the person's own; K tells which layout they have:

| K | layout |
|---|---|
| 17 | COCO: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, each left then right |
| 133 | COCO-WholeBody: COCO's 17, feet 6 (big toe, small toe, heel; left then right), face 68, left hand 21, right hand 21 |
| 18 | OpenPose: nose, neck, right shoulder elbow wrist, left the same, right hip knee ankle, left the same, right eye, left eye, right ear, left ear |
| 134 | OpenPose's 18, then feet, face and hands as COCO-WholeBody has them (DWPose) |
| 25 | OpenPose BODY_25 |
| 20 | the release's own: OpenPose's 18, left toes, right toes |
| 59, 60, 67, 62 | those of 17, 18, 25 and 20 with 42 more: left hand 21, right hand 21 (wrist, then thumb to little finger) |
"""  # noqa: E501

import colorsys
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

Keypoints = Float[np.ndarray, "T K 3"]
Point = tuple[int, int]


class Layout(NamedTuple):
    """Where a keypoint array has what. body: of each of the release's 20 body points the two that it lies between
    (twice the same: that point; -1: there is none). hands, face: where they begin, None if there are none."""

    body: tuple[tuple[int, int], ...]
    hands: int | None = None
    face: int | None = None


NONE = ((-1, -1), (-1, -1))
OPENPOSE = tuple((i, i) for i in range(18))
COCO = ((0, 0), (6, 5), *((i, i) for i in (6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)))
BODY_25 = (*OPENPOSE[:8], *((i, i) for i in (9, 10, 11, 12, 13, 14, 15, 16, 17, 18)), (19, 20), (22, 23))
RELEASE = (*OPENPOSE, (18, 18), (19, 19))
LAYOUTS = {
    17: Layout(COCO + NONE),
    59: Layout(COCO + NONE, 17),
    133: Layout((*COCO, (17, 18), (20, 21)), 91, 23),
    18: Layout(OPENPOSE + NONE),
    60: Layout(OPENPOSE + NONE, 18),
    134: Layout((*OPENPOSE, (18, 19), (21, 22)), 92, 24),
    25: Layout(BODY_25),
    67: Layout(BODY_25, 25),
    20: Layout(RELEASE),
    62: Layout(RELEASE, 20),
}
"""By number of keypoints."""

# Pairs of body points and the colours of limbs and points in their order; a limb has 60% of its colour's brightness.
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
         (0, 14), (14, 16), (0, 15), (15, 17), (13, 18), (10, 19))  # fmt: skip
COLOURS = ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
           (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
           (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0))  # fmt: skip
HEAD = [0, 14, 15, 16, 17]
FINGERS = tuple((0 if i % 4 == 0 else i, i + 1) for i in range(20))
FINGER_COLOURS = tuple(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 20, 1, 1)) for i in range(20))
FINGERTIP = (0, 0, 255)
SINES = np.sin(np.deg2rad(np.arange(451))).round(7).astype(np.float32).astype(np.float64)
"""Of whole degrees with seven digits, as OpenCV has them: which way a corner is rounded hangs on it."""


class Person(NamedTuple):
    """A person's keypoints: body as the release orders it; hands and face where the layout has them."""

    body: Float[np.ndarray, "T 20 3"]
    left_hand: Float[np.ndarray, "T 21 3"] | None
    right_hand: Float[np.ndarray, "T 21 3"] | None
    face: Float[np.ndarray, "T 68 3"] | None


def person(keypoints: Keypoints) -> Person:
    """The parts of a keypoint array of any of the layouts. A neck that the layout lacks is the middle of the shoulders,
    toes are the middle of big and small toe, with the mean confidence. A body of which every point has a negative
    coordinate is that of the frame before.

    Raises:
        ValueError: an array that is not (T, K, 3) numbers with a K of `LAYOUTS`.
    """
    x = np.asarray(keypoints)
    if x.ndim != 3 or x.shape[-1] != 3 or x.shape[1] not in LAYOUTS or not len(x) or x.dtype.kind not in "fiu":
        known = ", ".join(map(str, sorted(LAYOUTS)))
        raise ValueError(
            f"keypoints are numbers (T, K, 3), x, y and confidence, K one of {known}; not {x.dtype} {x.shape}"
        )
    layout, x = LAYOUTS[x.shape[1]], x.astype(np.float64)
    x[~np.isfinite(x).all(-1)] = (np.nan, np.nan, 0)
    first, second = np.array(layout.body).T
    body = (x[:, first] + x[:, second]) / 2
    body[:, first < 0] = (np.nan, np.nan, 0)
    for before, frame in itertools.pairwise(body):
        if (np.nan_to_num(frame[:, :2], nan=-1).min(-1) < 0).all():
            frame[:] = before
    cut = lambda start, count: None if start is None else x[:, start : start + count]
    right = None if layout.hands is None else layout.hands + 21
    return Person(body, cut(layout.hands, 21), cut(right, 21), cut(layout.face, 68))


# ---- the skeleton ----


def draw(
    keypoints: Keypoints,
    height: int,
    width: int,
    *,
    source: tuple[int, int] | None = None,
    normalized: bool = False,
    threshold: float = 0.5,
    hands: bool = True,
    head: bool = True,
) -> UInt8[np.ndarray, "T H W 3"]:
    """Skeletons on black. Confidence below `threshold` is not drawn.

    Args:
        source: rows and columns of the pictures that the keypoints were found in, (height, width) if None. Where they
            are of another shape the skeleton is scaled to fit, in the middle, and not stretched.
        normalized: x and y are shares of the source's width and height.
        hands, head: whether hands, and nose, eyes and ears, are drawn.

    Raises:
        ValueError: keypoints that `person` does not take; sizes below 1.
    """
    source = source or (height, width)
    if min(height, width, *source) < 1:
        raise ValueError(f"height={height}, width={width}, source={source}: sizes are at least 1")
    who = person(keypoints)
    place = _fit(source, (height, width), normalized)
    body, left, right = (None if part is None else place(part) for part in who[:3])
    assert body is not None
    if not head:
        body[:, HEAD, 2] = 0
    radius = max(min(height, width) // 200 - 1, 1)
    frames = np.zeros((len(body), height, width, 3), np.uint8)
    for t, frame in enumerate(frames):
        image = Image.new("RGB", (width, height))
        pen = ImageDraw.Draw(image)
        _draw_body(pen, body[t], radius, threshold)
        for hand in (left, right):
            if hands and hand is not None:
                _draw_hand(pen, hand[t], max(radius // 2, 1), threshold)
        frame[:] = np.asarray(image)
    return frames


def _fit(source: tuple[int, int], target: tuple[int, int], normalized: bool):
    """Keypoints of the source's pictures as pixels of the target's, the scale being one for both axes."""
    (rows, columns), (height, width) = source, target
    tall = rows / columns > height / width
    scale = height / rows if tall else width / columns
    within = (width, int(height / rows * columns)) if tall else (height, int(width / columns * rows))
    margin = (within[0] - within[1]) // 2
    unit = np.array((columns, rows) if normalized else (1, 1)) * scale

    def place(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[..., :2] * unit + ((margin, 0) if tall else (0, margin)), x[..., 2:]], -1)

    return place


def _draw_body(pen: ImageDraw.ImageDraw, points: Float[np.ndarray, "20 3"], radius: int, threshold: float):
    seen = points[:, 2] >= threshold
    for (a, b), colour in zip(LIMBS, COLOURS):
        if seen[a] and seen[b]:
            _limb(pen, points[a, :2], points[b, :2], radius, tuple(c * 3 // 5 for c in colour))
    for point, colour in zip(points[seen], np.array(COLOURS)[seen]):
        _disc(pen, (int(point[0]), int(point[1])), radius, tuple(map(int, colour)))


def _draw_hand(pen: ImageDraw.ImageDraw, points: Float[np.ndarray, "21 3"], width: int, threshold: float):
    seen = points[:, 2] >= threshold
    whole = np.where(seen[:, None], points[:, :2], 0).astype(int)
    seen &= (whole > 0).all(-1)
    places = [(int(x), int(y)) for x, y in whole]
    for (a, b), colour in zip(FINGERS, FINGER_COLOURS):
        if seen[a] and seen[b]:
            _line(pen, places[a], places[b], width, colour)
    for i in np.flatnonzero(seen):
        _disc(pen, places[i], width, FINGERTIP)


def _limb(pen: ImageDraw.ImageDraw, a: np.ndarray, b: np.ndarray, radius: int, colour: tuple[int, ...]):
    """An ellipse with its ends at the two points, turned by whole degrees, its corners rounded to pixels."""
    (x, y), (along, up) = (a + b) / 2, a - b
    angle, half = int(math.degrees(math.atan2(up, along))) % 360, int(math.hypot(along, up) / 2)
    degrees = np.arange(361)
    u, v = half * SINES[450 - degrees], radius * SINES[degrees]
    cos, sin = SINES[450 - angle], SINES[angle]
    corners = np.stack([int(x) + u * cos - v * sin, int(y) + u * sin + v * cos], -1).round()
    _convex(pen, corners[np.append(True, (np.diff(corners, axis=0) != 0).any(-1))], colour)


def _line(pen: ImageDraw.ImageDraw, a: Point, b: Point, width: int, colour: tuple[int, ...]):
    if width == 1:
        pen.line([max(a, b), min(a, b)], fill=colour)  # OpenCV's choice of pixels needs this direction
        return
    along, half = np.subtract(b, a), (width + 1) // 2
    across = along[::-1] * (1, -1) * half / (math.hypot(*along) or 1)
    _convex(pen, np.array([a + across, a - across, b - across, b + across, a + across]), colour)
    for end in (a, b):
        _disc(pen, end, half, colour)


def _convex(pen: ImageDraw.ImageDraw, corners: Float[np.ndarray, "N 2"], colour: tuple[int, ...]):
    """A closed convex polygon, filled with the pixels that OpenCV chooses: Pillow's own lack some of thin ones."""
    for start, end in itertools.pairwise(corners.round().astype(int).tolist()):
        _line(pen, tuple(start), tuple(end), 1, colour)
    for y, left, right in _rows(corners, pen.im.size[1]):
        pen.line([(left, y), (right, y)], fill=colour)


def _rows(corners: Float[np.ndarray, "N 2"], height: int) -> Iterator[tuple[int, int, int]]:
    """y, first and last x of what lies between the sides: corners in whole rows, x in fixed point with 16 bits."""
    points = np.rint(corners * (2**16, 1)).astype(int)
    sides = np.stack([points[:-1], points[1:]], 1)
    sides = sides[sides[:, 0, 1] != sides[:, 1, 1]]
    upwards = sides[:, 0, 1] > sides[:, 1, 1]
    sides[upwards] = sides[upwards, ::-1]
    (x0, y0), (x1, y1) = sides.transpose(1, 2, 0)
    first, last = y0.clip(0, height), y1.clip(0, height)
    side = np.repeat(np.arange(len(x0)), last - first)
    if not len(side):
        return
    rows = np.arange(len(side)) - np.repeat(np.cumsum(last - first) - last, last - first)
    slope = ((x1 - x0) / (y1 - y0) + 0.5).astype(int)
    across = x0[side] + (rows - y0[side]) * slope[side]
    across = (across + 2**15) >> 16
    top = rows.min()
    left, right = np.full(rows.max() - top + 1, 2**31), np.full(rows.max() - top + 1, -(2**31))
    np.minimum.at(left, rows - top, across)
    np.maximum.at(right, rows - top, across)
    yield from zip(range(top, rows.max() + 1), left.tolist(), right.tolist())


def _disc(pen: ImageDraw.ImageDraw, centre: Point, radius: int, colour: tuple[int, ...]):
    x, y = centre
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - dy**2)
        pen.line([(x - half, y + dy), (x + half, y + dy)], fill=colour)


# ---- the face ----


def face_boxes(
    keypoints: Keypoints, height: int, width: int, *, normalized: bool = False, scale: float = 1.3
) -> Int[np.ndarray, "T 4"]:
    """Left, top, right and bottom of the face in each frame of height x width pixels: the bounds of its 68 points,
    grown to `scale` times their area (three quarters of what the height gains above), cut at the picture's rim and
    rounded down. A frame without a face has the box of the nearest frame before it, or else of the first after.

    Args:
        keypoints: a layout with a face (133, 134), or the face alone, 68 points, as (T, 68, 3).

    Raises:
        ValueError: keypoints without a face, a scale that is not positive, or no frame where a face is seen.
    """
    x = np.asarray(keypoints)
    face = x if x.ndim == 3 and x.shape[1:] == (68, 3) else person(x).face
    if face is None:
        raise ValueError(f"{x.shape[1]} keypoints have no face; 133 or 134 do, or the face's 68 alone")
    if not scale > 0:
        raise ValueError(f"scale={scale}: the growth of the area is above 0")
    points = face[..., :2] * ((width, height) if normalized else (1, 1))
    whole = np.isfinite(points).all(-1, keepdims=True)
    low = np.where(whole, points, np.inf).min(1)
    high = np.where(whole, points, -np.inf).max(1)
    size = np.where(high > low, high - low, 0)
    grow = size * (math.sqrt(scale) - 1)  # both sides by one factor
    low = np.maximum(low - grow * (1 / 2, 3 / 4), 0)
    high = np.minimum(high + grow * (1 / 2, 1 / 4), (width, height))
    with np.errstate(invalid="ignore"):
        boxes = np.concatenate([low, high], -1)
        boxes = np.where(np.isfinite(boxes), boxes, 0).astype(int)
    seen = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(-1))
    if not len(seen):
        raise ValueError(f"no face lies in the {height} x {width} picture in any of {len(x)} frames")
    return boxes[seen[np.maximum(np.searchsorted(seen, np.arange(len(x)), side="right") - 1, 0)]]


def crop_faces(
    video: UInt8[np.ndarray, "T H W 3"],
    keypoints: Keypoints,
    size: int = 512,
    *,
    normalized: bool = False,
    scale: float = 1.3,
) -> UInt8[np.ndarray, "T size size 3"]:
    """The face video: what `face_boxes` bounds in each frame, brought to size x size (bilinear, aspect not kept).

    Raises:
        ValueError: as `face_boxes`; a video that is not uint8 (T, H, W, 3) or has another number of frames.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"a video is a uint8 array (T, H, W, 3), not {video.dtype} {video.shape}")
    if len(video) != len(keypoints):
        raise ValueError(f"the video has {len(video)} frames, the keypoints are of {len(keypoints)}")
    boxes = face_boxes(keypoints, *video.shape[1:3], normalized=normalized, scale=scale)
    faces = np.empty((len(video), size, size, 3), np.uint8)
    for face, frame, (left, top, right, bottom) in zip(faces, video, boxes):
        piece = Image.fromarray(np.ascontiguousarray(frame[top:bottom, left:right]))
        face[:] = np.asarray(piece.resize((size, size), Image.Resampling.BILINEAR))
    return faces
