"""`jdit generate` for a family of videos: a small pipeline stands for it, whose stages really run and report."""

import importlib
import io
import os
import signal
import time

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from jdit import sampling, video
from jdit.cli import main
from jdit.nn.vae.causal import run_chunks
from jdit.pipeline import base, calls
from jdit.pipeline.executor import Stage, Weights, run
from jdit.structs import Output, Plan
from jdit.video_writer import VideoWriter

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def denoise(x, table):
    return sampling.solve(lambda x, t: 0.1 * x, x, table, on_step=calls.report_step)


def decode(x, height: int, width: int):
    def step(z, cache):
        n = 1 if cache is None else 4
        frames = 0.1 * z[..., None] + jnp.linspace(-0.5, 0.5, n)[:, None, None, None]
        frames = jnp.broadcast_to(frames, (z.shape[0], n, height, width, 3))
        pixels = calls.to_pixels(frames, "uint8")
        calls.report_frames(pixels, 4 * x.shape[1] - 3)
        return pixels, jnp.zeros(())

    return run_chunks(step, x[:, :, None, None], size=1, out=4)


class Clips(base.Pipeline):
    """Grey videos of 4n + 1 frames."""

    takes = ("image", "last_image", "height", "width", "num_frames", "steps", "guidance_2", "on_frame")
    calls: list = []  # noqa: RUF012

    def size(self, height=None, width=None):
        calls.check_size(height or 32, width or 48, 16, 1280)
        return height or 32, width or 48

    def frames(self, num_frames=None):
        calls.check_frames(num_frames or 9, factor=4, patch=1, most=1024)
        return num_frames or 9

    def _generate(self, prompt, **a):
        self.calls.append({"prompt": prompt} | {k: v for k, v in a.items() if v is not None})
        height, width = self.size(a["height"], a["width"])
        shape = (len(prompt) * a["num_outputs"], ((a["num_frames"] or 9) + 3) // 4)
        stages = [
            Stage("denoise", denoise, (), ("x", "table"), ("latents",)),
            Stage("decode", decode, (), ("latents", "height", "width"), ("pixels",), ("height", "width")),
        ]
        values = {"x": calls.noise(shape, a["seed"]), "table": sampling.from_config(FLOW, a["steps"] or 3)}
        with calls.reporting(a["on_step"], a["on_frame"]):
            values, timings = run(stages, self.weights, values | {"height": height, "width": width})
        return Output(np.asarray(values["pixels"]), values["latents"], timings, fps=16)


class Stills(Clips):
    takes = ("height", "width", "steps")

    def frames(self, num_frames=None):
        return None

    def _generate(self, prompt, **a):
        self.calls.append(a)
        return Output(np.zeros((1, 32, 48, 3), np.uint8), jnp.zeros(()), {})


class Opened:
    family: type[base.Pipeline] = Clips

    def dry(self):
        return self.family(base.Parts("clips", None, {}, {}, {}, Plan()), Weights({}))

    def pipeline(self, **_):
        return self.dry()


@pytest.fixture(autouse=True)
def clips(monkeypatch, tmp_path):
    """jdit.load opens Clips whatever it is given; gives the arguments of calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("jdit.load"), "open_model", lambda *a, **k: Opened())
    monkeypatch.setattr("jdit.cli_generate.compilation_cache", lambda: None)
    Clips.calls.clear()
    return Clips.calls


def generate(*arguments: str):
    return CliRunner().invoke(main, ["generate", "a cat", *arguments])


def error(result) -> str:
    return " ".join((result.output + result.stderr).split())


def picture(name: str) -> np.ndarray:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(name)
    return pixels


def test_a_clip(clips, tmp_path):
    first, last = picture("first.png"), picture("last.png")
    result = generate(
        "--frames", "13", "--size", "64x32", "--image", "first.png", "--last-image", "last.png", "--guidance-2", "3",
        "-o", "clip.mp4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert error(result).startswith("jdit: clip.mp4 in ") and "decode " in error(result)
    frames, fps = video.video("clip.mp4")
    assert frames.shape == (13, 32, 64, 3) and fps == 16
    (call,) = clips
    assert call["guidance_2"] == 3 and call["prompt"] == ["a cat"]
    assert np.array_equal(call["image"], first) and np.array_equal(call["last_image"], last)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "first.png", "last.png"]


@pytest.mark.parametrize(
    "arguments, files",
    [
        ((), {"out.mp4": 9}),
        (("--frames", "1"), {"out.png": 1}),
        (("--frames", "1", "-o", "one.mp4"), {"one.mp4": 1}),
        (("-n", "2", "-o", "a.gif"), {"a-0.gif": 9, "a-1.gif": 9}),
        (("-o", "a.webp"), {"a.webp": 9}),
    ],
)
def test_files(arguments, files, tmp_path):
    result = generate(*arguments)
    assert result.exit_code == 0, result.output
    assert {p.name: len(video.video(p).frames) for p in tmp_path.iterdir()} == files


@pytest.mark.parametrize("fps, kept", [("24", 24), ("29.97", 30000 / 1001), ("7.5", 7.5)])
def test_rate(fps, kept):
    assert generate("--fps", fps, "-o", "a.mov").exit_code == 0
    with av.open("a.mov") as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(kept, rel=1e-9)


BAD = {
    "num_frames=80 does not work, 77 or 81 would": ["--frames", "80"],
    "num_frames=0; it must be at least 1": ["--frames", "0"],
    "width=830 does not work, 816 or 832 would": ["--size", "830x480"],
    "'830' is not WIDTHxHEIGHT, as 832x480": ["--size", "830"],
    "--size: gives both sides; leave --width out": ["--size", "832x480", "--width", "832"],
    "clips does not take guidance; it takes": ["--guidance", "3"],
    "no picture at no.png": ["--image", "no.png"],
    "notes.png is not a picture that Pillow reads": ["--image", "notes.png"],
    "cut.png is not a picture that Pillow reads": ["--last-image", "cut.png"],
    "a.png: no video is '.png'; there are .mp4, .mov, .gif, .webp": ["-o", "a.png"],
    "a.avi: unknown suffix '.avi'; there are": ["-o", "a.avi"],
    "a: unknown suffix ''; there are": ["-o", "a"],
    "the folder no/such does not exist": ["-o", "no/such/a.mp4"],
    "folder.mp4 is a folder": ["-o", "folder.mp4"],
    "fps=0.0: a rate is above 0": ["--fps", "0"],
    "fps=nan: a rate is above 0": ["--fps", "nan"],
    "a.gif: fps=60.0, a gif has at most 50": ["--fps", "60", "-o", "a.gif"],
    "--grid lays pictures on a sheet; clips makes videos": ["--grid"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_weights_are_read(message, tmp_path, monkeypatch):
    monkeypatch.setattr(Opened, "pipeline", lambda *a, **k: pytest.fail("weights were read"))
    picture("whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "folder.mp4").mkdir()
    before = set(tmp_path.rglob("*"))
    result = generate(*BAD[message])
    assert result.exit_code == 2, result.output
    assert message in error(result)
    assert len([line for line in result.stderr.splitlines() if line.startswith(("jdit: ", "Error: "))]) == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--frames", "81"], "clips does not take num_frames; it takes height, num_outputs"),
        (["--last-image", "a.png"], "clips does not take last_image"),
        (["--fps", "16"], "--fps goes with videos; clips makes pictures"),
        (["-o", "a.mp4"], "a.mp4: clips makes pictures, no videos; there are .png, .jpg, .jpeg, .webp, .gif"),
    ],
)
def test_a_family_of_pictures(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Opened, "family", Stills)
    picture("a.png")
    result = generate(*arguments)
    assert (result.exit_code, [p.name for p in tmp_path.iterdir()]) == (2, ["a.png"]), result.output
    assert message in error(result)
    assert generate("-o", "b.png").exit_code == 0


def test_progress(monkeypatch):
    """Steps, then decoded frames, in this order and to their end; the bar is gone afterwards."""
    told = []
    screen = io.StringIO()
    monkeypatch.setattr("jdit.terminal.err", Console(file=screen, force_terminal=True, width=80))
    from rich.progress import Progress

    update = Progress.update
    note = lambda bar, task, **k: told.append((bar.tasks[task].description, k)) or update(bar, task, **k)
    monkeypatch.setattr(Progress, "update", note)
    assert generate("--frames", "13", "--steps", "4").exit_code == 0
    counts = [(what, k["completed"], k["total"]) for what, k in told if "completed" in k]
    assert [c[1:] for c in counts[:4]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert counts[4:] == [("decode", n, 13) for n in (1, 5, 9, 13)]
    assert "denoise" in screen.getvalue() and "13/13" in screen.getvalue()


def test_a_folder_that_is_not_writable(monkeypatch, clips):
    monkeypatch.setattr("os.access", lambda *_: False)
    result = generate("-o", "a.mp4")
    assert (result.exit_code, clips) == (2, []) and "jdit: a.mp4: the folder . is not writable" in result.stderr


def test_a_full_disk_is_1_and_leaves_nothing(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoWriter, "_encode", full)
    result = generate("-o", "a.mp4")
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, []), result.output
    assert "jdit: [Errno 28] No space left on device" in error(result)


def test_what_the_device_says_is_one_line(monkeypatch, tmp_path):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBufferAssignment: ...")

    monkeypatch.setattr(Clips, "_generate", full)
    result = generate()
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert result.stderr == "jdit: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n"


@pytest.mark.parametrize("when", ["denoise", "decode", "write"])
def test_ctrl_c_leaves_no_debris(when, monkeypatch, tmp_path):
    press = lambda *_: os.kill(os.getpid(), signal.SIGINT)
    if when == "write":
        monkeypatch.setattr(VideoWriter, "_encode", press)
    else:
        listeners, place = calls._Listeners, {"denoise": "step", "decode": "chunk"}[when]
        plain = getattr(listeners, place)
        monkeypatch.setattr(listeners, place, lambda self, *a: (press(), plain(self, *a))[1])
    result = generate("-o", "a.mp4", "--frames", "4001", "--steps", "400")
    assert (result.exit_code, list(tmp_path.iterdir())) == (130, []), result.output
    assert "jdit: interrupted; nothing half-written is left behind" in error(result)


def test_a_swallowed_ctrl_c_is_heard(monkeypatch):
    class Loud:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def dry(self):
        Loud()
        time.sleep(5)

    monkeypatch.setattr(Opened, "dry", dry)
    assert generate().exit_code == 130


def test_frames_are_told_without_steps():
    seen = []
    pipe = Opened().pipeline()
    pipe(["a"], on_frame=lambda *a: seen.append(a))
    assert seen == [(1, 9), (5, 9), (9, 9)]
    jax.effects_barrier()
