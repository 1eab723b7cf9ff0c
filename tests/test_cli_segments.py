"""Files that grow by a segment: what they hold at the end, after Ctrl-C, and after a failure."""

import numpy as np
import pytest

from jdit.cli_segments import write_segments
from jdit.structs import Output
from jdit.video import video


class Toy:
    """A pipeline whose segments are known; `stops` is raised in the place of segment `after`."""

    def __init__(self, stops: BaseException | None = None, after: int = 2, outputs: int = 1):
        self.stops, self.after, self.outputs = stops, after, outputs
        self.frames = np.random.default_rng(0).integers(0, 40, (outputs, 3, 5, 32, 48, 3), np.uint8)

    def stream(self, prompts, *, on_step, on_segment, steps):
        assert prompts == ["a cat"] and steps == 4
        for i in range(3):
            if self.stops is not None and i == self.after:
                raise self.stops
            on_step(4 * (i + 1), 12)
            on_segment(i + 1, 3)
            timings = {"prepare": 1.0} if i == 0 else {}
            yield Output(self.frames[:, i], None, timings | {f"denoise[{i}]": 2.0}, fps=12)  # type: ignore[arg-type]


def test_whole(tmp_path):
    paths, timings = write_segments(Toy(), ["a cat"], tmp_path / "x.mp4", None, steps=4)
    assert paths == [tmp_path / "x.mp4"] and timings == {"prepare": 1.0, "denoise": 6.0}
    made = video(paths[0])
    assert made.frames.shape == (15, 32, 48, 3) and made.fps == 12


def test_several_outputs_and_another_rate(tmp_path):
    paths, _ = write_segments(Toy(outputs=2), ["a cat"], tmp_path / "x.mp4", 24, steps=4)
    assert [p.name for p in paths] == ["x-0.mp4", "x-1.mp4"]
    assert [video(p).fps for p in paths] == [24, 24] and len(video(paths[1]).frames) == 15


def test_the_file_grows(tmp_path):
    toy, seen = Toy(), []
    stream = toy.stream

    def spied(*a, **k):
        for out in stream(*a, **k):
            if (tmp_path / "x.mp4").exists():
                seen.append(len(video(tmp_path / "x.mp4").frames))
            yield out

    toy.stream = spied  # type: ignore[method-assign]
    write_segments(toy, ["a cat"], tmp_path / "x.mp4", None, steps=4)
    assert seen == [5, 10]


def test_ctrl_c_leaves_whole_segments(tmp_path, capsys):
    for made, told in ((1, "5 frames, the one whole segment that"), (2, "10 frames, the 2 whole segments that")):
        with pytest.raises(SystemExit) as e:
            write_segments(Toy(KeyboardInterrupt(), after=made), ["a cat"], tmp_path / "x.mp4", None, steps=4)
        assert e.value.code == 130 and len(video(tmp_path / "x.mp4").frames) == 5 * made
        assert f"x.mp4 holds {told} w" in capsys.readouterr().err.replace("\n", "")
        assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_ctrl_c_before_the_first_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_segments(Toy(KeyboardInterrupt(), after=0), ["a cat"], tmp_path / "x.mp4", None, steps=4)
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_what_is_whole_and_is_told(tmp_path):
    with pytest.raises(FloatingPointError, match="NaN"):
        write_segments(Toy(FloatingPointError("NaN")), ["a cat"], tmp_path / "x.mp4", None, steps=4)
    assert len(video(tmp_path / "x.mp4").frames) == 10
