"""Driving videos: what is refused, all at once, and what is told of the rest."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from jdit import driving, video
from jdit.video import write_video

SIZE = {"height": 32, "width": 48, "face_size": 16}


def skeleton(frames=5, height=64, width=96):
    x = np.zeros((frames, height, width, 3), np.uint8)
    x[:, 20:30, 20:24] = (153, 0, 0)
    return x


def face(frames=5):
    return np.random.default_rng(0).integers(0, 255, (frames, 40, 40, 3), np.uint8)


def mask(frames=5, height=64, width=96):
    x = np.zeros((frames, height, width), np.uint8)
    x[:, 16:48, 16:48] = 255
    return x


def test_sizes_and_notes():
    clips = driving.read(skeleton(), face(), skeleton(), mask() > 0, **SIZE)
    assert clips.pose.shape == clips.background.shape == (5, 32, 48, 3) and clips.face.shape == (5, 16, 16, 3)
    assert clips.mask.shape == (5, 32, 48) and set(np.unique(clips.mask[:, 12:20, 12:20])) == {255}
    assert clips.fps is None
    assert clips.notes[:2] == (
        "pose: 5 frames of 96 x 64, resized to 48 x 32",
        "face: 5 frames of 40 x 40, resized to 16 x 16",
    )
    assert driving.check(skeleton(), face(), **SIZE).notes == list(clips.notes[:2])


def test_frames_by_number():
    x = skeleton()
    x[:, 0, 0] = np.arange(5)[:, None]
    clips = driving.read(x, face(), height=64, width=96, face_size=40)
    pose, faces, *rest = clips.frames(np.array([3, 4, 3]))
    np.testing.assert_array_equal(pose, x[[3, 4, 3]])
    np.testing.assert_array_equal(faces, face()[[3, 4, 3]])
    assert rest == [None, None]


def test_all_findings_at_once(tmp_path):
    pose = write_video(skeleton(), tmp_path / "pose.mp4", 30)
    faces = write_video(face(4), tmp_path / "face.mp4", 25)
    grey = np.full((5, 64, 64), 128, np.uint8)
    report = driving.check(pose, faces, tmp_path / "none.mp4", grey, fps=24, **SIZE)
    assert report.problems == [
        f"background: no video at {tmp_path / 'none.mp4'}",
        "mask is grey in 100% of its pixels: white is to be generated, black is kept",
        "pose has 30 frames a second, fps=24: give its rate, or resample it",
        "face has 4 frames, pose has 5: as many are needed",
        "face has 25 frames a second, pose has 30: one rate is needed (jdit.video.resample)",
        "mask is 64 x 64, pose is 96 x 64: they lie over each other, so one shape is needed",
    ]
    with pytest.raises(ValueError) as error:
        driving.read(pose, faces, tmp_path / "none.mp4", grey, fps=24, **SIZE)
    assert str(error.value) == "; ".join(report.problems)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"mask": mask()}, "mask needs background: together"),
        ({"background": skeleton()}, "background needs mask: together"),
        ({"background": skeleton(), "mask": mask() * 0}, "mask is black throughout"),
        ({"background": skeleton(), "mask": mask().astype(float)}, "mask: a video is a uint8 array"),
        ({"face": skeleton()[0]}, "face: a video is a uint8 array"),
        ({"pose": [Image.new("RGB", s) for s in ((4, 6), (6, 4))]}, "pose: its frames have one size, not 6 x 4, 4 x 6"),
        ({"stop": 6, "face": face(4)}, "face has 4 frames, pose has 5"),
    ],
)  # fmt: skip
def test_refused(arguments, problem):
    given = {"pose": skeleton(), "face": face()} | SIZE | arguments
    (found,) = driving.check(**given).problems[:1]
    assert found.startswith(problem)


def test_what_is_taken():
    ok = lambda *a, **k: not driving.check(*a, **SIZE, **k).problems
    assert ok(skeleton(9), face(7), stop=5)
    assert ok(skeleton(), face(), skeleton(5, 128, 193), mask())  # another size of one shape
    assert ok(list(map(Image.fromarray, skeleton())), face())
    soft = mask()
    soft[:, 48:50, 16:48] = 128
    assert ok(skeleton(), face(), skeleton(), soft)


def test_rates(tmp_path):
    pose = write_video(skeleton(), tmp_path / "pose.mp4", 29.97)
    assert driving.read(pose, face(), **SIZE, fps=30).fps == pytest.approx(29.97, abs=1e-3)
    assert driving.read(skeleton(), write_video(face(), tmp_path / "face.mp4", 12), **SIZE).fps == 12


def test_what_looks_odd():
    empty = skeleton()
    empty[[1, 2]] = 0
    assert "pose: 2 of 5 frames are black, without a figure" in driving.check(empty, face(), **SIZE).notes
    notes = driving.check(face(), face(), **SIZE).notes
    assert notes[0] == "pose: 5 frames of 40 x 40, resized to 48 x 32, 50% wider"
    assert notes[-1].startswith("pose: 100%") and "skeletons on black are needed" in notes[-1]


def test_frames_are_resized_while_they_are_read(tmp_path):
    """Each as it is decoded, from files, lists and arrays alike."""
    sizes = []

    def each(frame):
        sizes.append(frame.shape)
        return frame[::2]

    frames = skeleton()
    frames[range(5), :, range(50, 55)] = 255  # Pillow makes one of equal frames
    path, gif = (write_video(frames, tmp_path / f"a.{suffix}", 8) for suffix in ("mp4", "gif"))
    for source in (path, gif, frames, list(frames)):
        assert video.video(source, start=1, stop=4, each=each).frames.shape == (3, 32, 96, 3)
    assert sizes == [(64, 96, 3)] * 12


def test_reference_that_cannot_be():
    with pytest.raises(ValueError, match="a picture of 1000 x 1 leaves nothing in 48 x 32"):
        driving.reference(np.zeros((1, 1000, 3), np.uint8), 32, 48)


@pytest.mark.slow
def test_no_video_lies_in_memory_as_a_whole(tmp_path):
    for name, make in {"pose": skeleton, "face": face, "street": skeleton, "mask": mask}.items():
        frames = make(150)
        write_video(frames if frames.ndim == 4 else np.repeat(frames[..., None], 3, -1), tmp_path / f"{name}.mp4", 30)
    paths = [tmp_path / f"{name}.mp4" for name in ("pose", "face", "street", "mask")]
    tracemalloc.start()
    try:
        assert not driving.check(*paths, height=64, width=96, face_size=40).problems
        clips = driving.Streams(*paths, height=64, width=96, face_size=40)
        assert clips.length == 150 and clips.fps == 30 and clips.frames(140, 150)[0].shape == (10, 64, 96, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150 * 64 * 96 * 3  # one of them
    assert driving._pixel(np.zeros((4, 4, 3), np.uint8)).base is None  # decoders' own memory is not traced
