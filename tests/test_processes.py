"""Two processes on loopback make the picture of one, read what they hold, and fail together."""

import json
import os

import numpy as np
import pytest
import util_processes as together
from PIL import Image

import jdit
from jdit import checkpoint, distributed, sharding
from jdit.distributed import Launch, launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a checkpoint of the transformer, and one process's result."""
    folder = tmp_path_factory.mktemp("alone")
    pipe = jdit.load(together.MODEL, dtype="float32")
    checkpoint.save(folder / "saved", {}, {"transformer": sharding.leaves(pipe.components["transformer"])})
    return folder, pipe(together.PROMPT, **together.CALL)


def test_two_processes_make_the_picture_of_one(alone):
    folder, want = alone
    script = str(together.ROOT / "tests/util_processes.py")
    commands = [[script, "{port}", str(rank), str(folder)] for rank in (0, 1)]
    for code, _, err in together.run_together(commands, [folder] * 2, devices=together.DEVICES):
        assert code == 0, err[-2000:]
    for rank in (0, 1):
        got, told = np.load(folder / f"{rank}.npz"), json.loads((folder / f"{rank}.json").read_text())
        assert np.linalg.norm(got["latents"] - want.latents) < 1e-5 * np.linalg.norm(want.latents)
        assert np.abs(got["pixels"] - want.pixels).max() < 1e-4
        assert told["mesh"] == [0, 0, 1, 1] and told["restored"] and told["spread"] > 10
        print(told)
        assert told["held"] <= told["read"] < 1.02 * told["held"] < 0.8 * told["stored"]


def command(rank, *more):
    where = ("--coordinator", "127.0.0.1:{port}", "--processes", "2", "--process-id", str(rank))
    return ["-m", "jdit", "generate", together.PROMPT, "--mesh", "data=2", *where, *more]


def test_what_fails_in_one_process_ends_both_with_its_message(tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    Image.new("RGB", (64, 64)).save(folders[0] / "sketch.png")  # the second host has none
    commands = [command(rank, "--image", "sketch.png", "-o", "out.png") for rank in (0, 1)]
    for code, out, err in together.run_together(commands, folders, devices=1):
        assert code == 2 and not out
        assert [line for line in err.splitlines() if line.startswith("jdit: ")] == [
            "jdit: process 1: no picture at sketch.png"
        ]
    assert [f.name for f in tmp_path.rglob("*.*")] == ["sketch.png"]


def test_processes_that_are_not_started_alike(tmp_path):
    commands = [command(0, "--steps", "4"), command(1, "--steps", "5")]
    for code, _, err in together.run_together(commands, [tmp_path] * 2, devices=1):
        assert code == 2 and "jdit: process 1: options: steps=5 where process 0 has 4" in err
