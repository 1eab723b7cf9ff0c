"""`jdit pose` and `jdit check`, and the page about driving videos."""

import collections
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jdit import pose
from jdit.cli import main
from jdit.video import video, write_video
from jdit.video_writer import VideoWriter

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "driving.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keypoints of four frames, and the video that they are of."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    points = rng.uniform((10, 10, 0.6), (80, 50, 1), (4, 133, 3))
    np.save("points.npy", points)
    write_video(rng.integers(0, 255, (4, 64, 96, 3), np.uint8), "dance.mp4", 24)
    return points


def run(*arguments: str):
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, " ".join((result.output + result.stderr).split())


def test_keypoints_to_videos_that_go_together(folder, monkeypatch):
    written, write = collections.defaultdict(list), VideoWriter.write

    def recorded(writer, frames):
        written[writer.path.name].append(frames)
        write(writer, frames)

    monkeypatch.setattr(VideoWriter, "write", recorded)
    code, said = run("pose", "points.npy", "-o", "pose.mp4", "--video", "dance.mp4", "--face", "face.mp4")
    assert code == 0 and "pose.mp4, face.mp4: 4 frames" in said
    faces = pose.crop_faces(video("dance.mp4").frames, folder)
    # what the encoder is given
    for name, want in (("pose.mp4", pose.draw(folder, 64, 96)), ("face.mp4", faces)):
        np.testing.assert_array_equal(np.concatenate(written[name]), want)
    assert run("check", "--pose", "pose.mp4", "--face", "face.mp4", "--size", "96x64") == (
        0, "pose: 4 frames of 96 x 64 face: 4 frames of 512 x 512"
    )  # fmt: skip
    code, said = run("check", "--pose", "pose.mp4", "--face", "none.mp4", "--mask", "pose.mp4", "--fps", "30")
    assert code == 2
    for problem in ("face: no video at none.mp4", "mask needs background", "pose has 24 frames a second, fps=30"):
        assert f"problem: {problem}" in said


def test_size_and_source(folder):
    code, _ = run("pose", "points.npy", "-o", "a.webp", "--size", "200x64", "--source", "96x64", "--fps", "10")
    assert code == 0 and video("a.webp").frames.shape == (4, 64, 200, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.npy", "--size", "96x64"], "none.npy"),
        (["dance.mp4", "--size", "96x64"], "dance.mp4 is not a .npy array"),
        (["points.npy"], "give --size, --source or --video"),
        (["points.npy", "--size", "96x64", "--face", "f.mp4"], "--face needs --video"),
        (["points.npy", "--size", "96x64", "-o", "a.tif"], "unknown suffix '.tif'"),
        (["points.npy", "--size", "96x64"], "a video needs fps"),
        (["few.npy", "--video", "dance.mp4"], "dance.mp4 has 4 frames, few.npy has 3"),
    ],
)
def test_refused(folder, arguments, message):
    np.save("few.npy", folder[:3])
    code, said = run("pose", *arguments)
    assert code == 2 and message in said
    assert not list(Path().glob("*pose*"))


def test_the_page_runs_and_names_what_exists(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/driving.md", "exec"), space)
    assert space["skeletons"].any() and space["clips"].face.shape == (4, 512, 512, 3)
    assert "pose: 4 frames of 832 x 480" in capsys.readouterr().out
    layouts = [int(k) for row in re.findall(r"^\| ([\d, ]+) \|", PAGE, re.MULTILINE) for k in row.split(",")]
    assert sorted(layouts) == sorted(pose.LAYOUTS)
