"""`jdit generate` with driving videos: a file that holds every frame, and what is refused before weights are read."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from util_wan_animate_pipeline import clip, pipeline

import jdit
from jdit import video
from jdit.cli import main
from jdit.load import Opened

pytestmark = pytest.mark.torch

FRAMES, RATE = 15, 24
GIVEN = ["her.png", "pose.mp4", "face.mp4", "mask.mp4", "street.mp4", "short.mp4"]
ANIMATED = ["--image", "her.png", "--pose", "pose.mp4", "--face", "face.mp4"]
REPLACED = [*ANIMATED, "--background", "street.mp4", "--mask", "mask.mp4"]
NAMES = {"--image": "image", "--pose": "pose_video", "--face": "face_video", "--background": "background_video",
         "--mask": "mask_video"}  # fmt: skip
SHORT = ["--size", "80x48", "--steps", "2", "--segment-frames", "9", "--max-text-tokens", "7"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate") / "x"
    pipeline(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what drives the model, and how to call `jdit generate` in it."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(clip(0, 1, 40, 30)[0]).save("her.png")
    half = np.zeros((FRAMES, 48, 80, 3), np.uint8)
    half[:, :, 40:] = 255
    videos = {"pose": clip(1, FRAMES, 48, 80), "face": clip(2, FRAMES, 20, 18), "street": clip(3, FRAMES, 48, 80),
              "mask": half, "short": clip(4, FRAMES - 2, 20, 18)}  # fmt: skip
    for name, frames in videos.items():
        video.write_video(frames, f"{name}.mp4", RATE)
    return tmp_path


def run(model, *arguments):
    return CliRunner().invoke(main, ["generate", "she waves", "--model", str(model), *SHORT, *arguments])


def made(place):
    return sorted(p.name for p in place.iterdir() if p.name not in GIVEN)


@pytest.mark.parametrize(
    "given, more, name, rate",
    [(ANIMATED, [], "x.mp4", RATE), (REPLACED, ["--fps", "12"], "x.gif", 12)],
    ids=["animated, growing", "replaced, another rate"],
)
def test_a_file_of_every_frame(model, place, given, more, name, rate):
    result = run(model, *given, *more, "-o", name)
    assert result.exit_code == 0, result.output
    assert made(place) == [name]
    written = video.video(name)
    assert written.frames.shape == (FRAMES, 48, 80, 3) and written.fps == pytest.approx(rate, rel=0.01)
    for stage in ("encode_text", "encode_segment", "encode_face", "denoise", "decode"):
        assert stage in result.stderr
    arguments = {NAMES[flag]: path for flag, path in zip(given[::2], given[1::2])}
    out = jdit.load(model, dtype="float32")(
        "she waves", height=48, width=80, steps=2, segment_frames=9, max_text_tokens=7, on_step=lambda *a: None,
        **arguments,
    )  # fmt: skip
    assert out.fps == RATE and out.pixels is not None
    apart = np.abs(written.frames[:, None] - out.pixels[0].astype(np.float32)).mean((2, 3, 4))
    assert (apart.argmin(1) == np.arange(FRAMES)).all()  # each frame is its own, whatever the codec took from it


REFUSED = {
    "this model animates a picture: it needs face_video": ANIMATED[:4],
    "this model animates a picture: it needs pose_video": [*ANIMATED[:2], *ANIMATED[4:]],
    "background_video goes with mask_video": REPLACED[:-2],
    "face has 13 frames, pose has 15: as many are needed": [*ANIMATED, "--face", "short.mp4"],
    "x.jpg: no video is '.jpg'": [*ANIMATED, "-o", "x.jpg"],
    "segment_frames=10 does not work, 9 or 13 would": [*ANIMATED, "--segment-frames", "10"],
    "wan-animate does not take num_frames": [*ANIMATED, "--frames", "9"],
    "pose: no video at no.mp4": [*ANIMATED, "--pose", "no.mp4"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(model, place, monkeypatch, message):
    monkeypatch.setattr(Opened, "pipeline", lambda *a, **k: pytest.fail("weights were read"))
    result = run(model, *REFUSED[message])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and not made(place)
