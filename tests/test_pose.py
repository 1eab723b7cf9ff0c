"""Pose videos and faces from keypoints: layouts, confidence, placing, face boxes, and what is refused."""

import math

import numpy as np
import pytest

from jdit import pose

# COCO-WholeBody -> OpenPose's 18 with DWPose's order of the rest: 18 body, 6 feet, 68 face, 42 hands.
DWPOSE = [0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, *range(17, 133)]
BODY_25 = [0, -1, 6, 8, 10, 5, 7, 9, -2, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 18, 19, 20, 21, 22]


def walker(frames=2, height=240, width=320):
    """COCO-WholeBody: all points seen, and nothing on the rim."""
    rng = np.random.default_rng(0)
    at = rng.uniform(0.2, 0.8, (frames, 133, 2)) * (width, height)
    return np.concatenate([at, np.ones((frames, 133, 1))], -1)


def reordered(x, order):
    """-1 is the middle of the shoulders, -2 that of the hips."""
    x = np.concatenate([x, x[:, [11, 12]].mean(1, keepdims=True), x[:, [5, 6]].mean(1, keepdims=True)], 1)
    return x[:, order]


def test_layouts_give_one_picture():
    x = walker()
    whole, bare = pose.draw(x, 240, 320), x.copy()
    bare[:, 17:23, 2] = 0  # no toes
    no_toes = pose.draw(bare, 240, 320)
    hands = list(range(91, 133))
    toes = np.stack([x[:, [17, 18]].mean(1), x[:, [20, 21]].mean(1)], 1)
    release = np.concatenate([reordered(x, DWPOSE[:18]), toes], 1)
    same = lambda k, picture: np.testing.assert_array_equal(pose.draw(k, 240, 320), picture)
    same(reordered(x, DWPOSE), whole)
    same(np.concatenate([reordered(x, BODY_25), x[:, hands]], 1), whole)
    same(np.concatenate([release, x[:, hands]], 1), whole)
    same(reordered(x, [*range(17), *hands]), no_toes)
    same(reordered(x, [*DWPOSE[:18], *hands]), no_toes)
    plain = pose.draw(bare, 240, 320, hands=False)
    same(x[:, :17], plain)
    same(reordered(x, DWPOSE[:18]), plain)
    same(reordered(x, BODY_25), pose.draw(x, 240, 320, hands=False))
    same(release, pose.draw(x, 240, 320, hands=False))
    assert (plain != whole).any() and (plain != no_toes).any() and (no_toes != whole).any()


def test_a_limb_is_where_its_points_are():
    x = np.zeros((1, 18, 3))
    x[0, [2, 3]] = [(100, 50, 1), (100, 150, 1)]  # right upper arm
    frame = pose.draw(x, 200, 300)[0]
    rows, columns = np.nonzero(frame.any(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (49, 151, 99, 101)
    assert tuple(frame[100, 100]) == (153, 102, 0) and tuple(frame[50, 100]) == (255, 170, 0)
    assert tuple(frame[150, 100]) == (255, 255, 0)


def test_confidence_and_what_is_not_finite():
    x = walker()
    unsure = x.copy()
    unsure[:, 9, 2] = 0.49  # left wrist
    unseen = x.copy()
    unseen[:, 9] = np.nan
    picture = pose.draw(unsure, 240, 320)
    np.testing.assert_array_equal(picture, pose.draw(unseen, 240, 320))
    assert (picture != pose.draw(x, 240, 320)).any()
    np.testing.assert_array_equal(pose.draw(unsure, 240, 320, threshold=0.4), pose.draw(x, 240, 320))
    far = x.copy()
    far[0, 9, :2] = 1e8  # and the work does not grow with it
    assert pose.draw(far, 240, 320).shape == (2, 240, 320, 3)


def test_head_and_hands_can_be_left_out():
    x = walker()
    without = x.copy()
    without[:, [0, 1, 2, 3, 4], 2] = 0
    np.testing.assert_array_equal(pose.draw(x, 240, 320, head=False), pose.draw(without, 240, 320))
    without = x.copy()
    without[:, 91:, 2] = 0
    np.testing.assert_array_equal(pose.draw(x, 240, 320, hands=False), pose.draw(without, 240, 320))


def test_a_lost_body_is_that_of_the_frame_before():
    x = walker(3)
    x[1, :91, :2] = -1
    frames = pose.draw(x, 240, 320, hands=False)
    np.testing.assert_array_equal(frames[1], frames[0])
    assert (frames[2] != frames[0]).any()


def test_shares_of_the_picture():
    x = walker()
    shares = x / (320, 240, 1)
    np.testing.assert_array_equal(
        pose.draw(shares + np.array((1e-9, 1e-9, 0)), 240, 320, normalized=True), pose.draw(x, 240, 320)
    )


@pytest.mark.parametrize(
    "target, scale, left, top", [((480, 640), 2, 0, 0), ((480, 800), 2, 80, 0), ((320, 320), 1, 0, 40)]
)
def test_another_size_is_not_stretched(target, scale, left, top):
    x = walker()
    moved = x * (scale, scale, 1) + (left, top, 0)
    np.testing.assert_array_equal(pose.draw(x, *target, source=(240, 320)), pose.draw(moved, *target))


def face(left, top, right, bottom, frames=1):
    rng = np.random.default_rng(1)
    at = rng.uniform((left, top), (right, bottom), (frames, 68, 2))
    at[:, 0], at[:, 1] = (left, top), (right, bottom)
    return np.concatenate([at, np.ones((frames, 68, 1))], -1)


def test_face_box():
    """1.3 times the area at the same shape, three quarters of the growth in height above."""
    g = math.sqrt(1.3) - 1
    want = (100 - 20 * g, 80 - 45 * g, 140 + 20 * g, 140 + 15 * g)
    x = face(100, 80, 140, 140)
    assert tuple(pose.face_boxes(x, 240, 320)[0]) == tuple(map(int, want))
    assert tuple(pose.face_boxes(x / (320, 240, 1), 240, 320, normalized=True)[0]) == tuple(map(int, want))
    assert tuple(pose.face_boxes(x, 240, 320, scale=1.0)[0]) == (100, 80, 140, 140)
    whole = walker(1)
    whole[:, 23:91] = x
    assert tuple(pose.face_boxes(whole, 240, 320)[0]) == tuple(map(int, want))
    assert tuple(pose.face_boxes(reordered(whole, DWPOSE), 240, 320)[0]) == tuple(map(int, want))
    assert tuple(pose.face_boxes(face(-10, -10, 400, 300), 240, 320)[0]) == (0, 0, 320, 240)


def test_frames_without_a_face_take_the_nearest():
    x = face(100, 80, 140, 140, 5)
    x[3] = face(10, 20, 60, 70)[0]
    x[[0, 2]] = np.nan
    x[4, :, :2] = 1000  # outside
    boxes = pose.face_boxes(x, 240, 320)
    np.testing.assert_array_equal(boxes, boxes[[1, 1, 1, 3, 3]])
    assert (boxes[3] != boxes[1]).all()


def test_crops():
    y, x = np.mgrid[:240, :320]
    video = np.stack([np.stack([x % 256, y, 0 * x + t], -1) for t in range(2)]).astype(np.uint8)
    faces = pose.crop_faces(video, face(100, 80, 140, 140, 2), 64, scale=1.0)
    assert faces.shape == (2, 64, 64, 3) and (faces[1, ..., 2] == 1).all()
    want = 99.5 + (np.arange(64) + 0.5) * 40 / 64  # pixel centres
    assert np.abs(faces[0, 30, 1:-1, 0] - want[1:-1]).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pose.draw(np.zeros((2, 19, 3)), 9, 9), r"K one of 17, 18, 20, 25, .* 134; not float64 \(2, 19, 3\)"),
        (lambda: pose.draw(np.zeros((17, 3)), 9, 9), r"\(T, K, 3\)"),
        (lambda: pose.draw(np.zeros((2, 17, 3), object), 9, 9), "not object"),
        (lambda: pose.draw(walker(), 0, 9), "height=0, width=9.*at least 1"),
        (lambda: pose.face_boxes(np.zeros((2, 17, 3)), 9, 9), "17 keypoints have no face; 133 or 134 do"),
        (lambda: pose.face_boxes(walker() * np.nan, 9, 9), "no face lies in the 9 x 9 picture in any of 2 frames"),
        (lambda: pose.face_boxes(walker(), 9, 9, scale=0), "scale=0"),
        (lambda: pose.crop_faces(np.zeros((3, 9, 9, 3), np.uint8), walker()), "video has 3 frames.*of 2"),
        (lambda: pose.crop_faces(np.zeros((2, 9, 9)), walker()), r"not float64 \(2, 9, 9\)"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
