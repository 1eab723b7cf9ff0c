"""Two processes on loopback make the picture of one, read what they hold, and fail together."""

import json

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


@pytest.mark.slow
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
        assert told["steps"] == ([] if rank else [1, 2])  # the first process has the progress
        assert told["held"] <= told["read"] < 1.02 * told["held"] < 0.8 * told["stored"]
        assert told["restored bytes"] == 1
    assert not (folder / "1.png").exists()  # the command writes once
    written = np.asarray(Image.open(folder / "0.png"), np.float32)
    assert np.abs(written - 255 * want.pixels[0]).max() < 0.5 + 255e-4  # rounded, as near as the pixels above


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


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"}
OPENMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
GKE = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    "env, want",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # inside salloc, but no step of srun
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
         Launch("SLURM", None, 16, 1)),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
         Launch("SLURM", None, 2, 1, tuple(range(8)))),
        (OPENMPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9"}, Launch("Open MPI")),
        (OPENMPI | {"JDIT_COORDINATOR": "h:9"}, Launch("arguments", "h:9", 4, 3)),
        (GKE, Launch("GKE")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"JDIT_COORDINATOR": "h:9", "JDIT_PROCESSES": "2", "JDIT_PROCESS_ID": "0"}, Launch("arguments", "h:9", 2, 0)),
        ({"JDIT_COORDINATOR": "h:9", "JDIT_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
         Launch("arguments", "h:9", 2, 1)),
        (SLURM | {"SLURM_NTASKS": "2", "JDIT_PROCESSES": "1"}, None),
        ({"JDIT_PROCESSES": "auto"}, Launch("jax")),
    ],
)  # fmt: skip
def test_what_launchers_say(env, want):
    assert launch(env=env) == want


@pytest.mark.parametrize(
    "arguments, env, message",
    [
        (
            ("h:9",),
            {},
            r"a coordinator \(HOST:PORT\) is h:9, but the number of processes and this one's number are missing",
        ),
        (("h:9", 2, 2), {}, "process 2 of 2: they are numbered 0 to 1"),
        (("h", 2, 0), {}, "coordinator 'h' is not HOST:PORT"),
        (("h:9", "two", 0), {}, "JDIT_PROCESSES=two: it must be a whole number of at least 1"),
        (("h:9", 2), {"JDIT_PROCESS_ID": "x"}, "JDIT_PROCESS_ID=x: it must be a whole number of at least 0"),
        ((), OPENMPI, "this Open MPI does not say where its first process is: give --coordinator HOST:PORT"),
    ],
)
def test_what_launchers_may_not_say(arguments, env, message):
    with pytest.raises(ValueError, match=message):
        launch(*arguments, env=env)


def test_one_process_is_alone(monkeypatch):
    for name in ("JDIT_COORDINATOR", "JDIT_PROCESSES", "JDIT_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not distributed.initialize() and distributed.first()
    distributed.fail("nobody is told")
    distributed.same("options", {"a": 1})
