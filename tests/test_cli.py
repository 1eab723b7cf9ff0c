"""The command line: what it says and how it ends when it is given something bad, and its help."""

import pytest
from click.testing import CliRunner

from jdit.cli import main
from jdit.nn import context_parallel


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def error(result) -> str:
    return " ".join((result.output + result.stderr).split())


@pytest.mark.parametrize("command", ["generate", "pose", "check", "convert", "inspect", "models", "train"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert command == "models" or f"jdit {command} " in result.output.split("Examples:")[1]


def test_models_are_listed():
    output = run("models").output
    assert all(name in output for name in ("fluent-image", "sd3.5-medium", "sd3.5-large-turbo"))
    makes = {"fluent-image": "128 x 128 pictures", "fluent-video": "17 frames, 64 x 64, 6 fps",
             "fluent-animate": "segments of 17 frames, 64 x 64, 12 fps"}  # fmt: skip
    for name, what in makes.items():
        assert any(line.startswith(f"{name} ") and f" {what} " in line for line in output.splitlines())
    (line,) = (line for line in output.splitlines() if line.startswith("wan2.2-ti2v-5b "))
    assert "121 frames, 1280 x 704, 24 fps" in line and line.rstrip().endswith("Wan-AI/Wan2.2-TI2V-5B-Diffusers")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "a", "-o", "no/such/a.png"], "the folder no/such does not exist"),
        (["generate", "a", "-o", "a.tif"], "unknown suffix '.tif'; there are .png"),
        (["generate", "a", "--model", "nowhere"], "nowhere: no such file or folder"),
        (["generate", "a", "--image", "no.png"], "no picture at no.png"),
        (["generate", "a", "--skip-layers", "x"], "give layer numbers"),
        (["generate", "a", "--part", "vae"], "'vae' is not NAME=PATH"),
        (["generate", "a", "--mesh", "data=16"], "data=16, sequence=1, tensor=1 needs 16 devices; there are 8"),
        (["generate", "a", "--mesh", "rows=2"], "no axis 'rows'; there are data, sequence, tensor, as data=2"),
        (["generate", "a", "--mesh", "data=x"], "data must be a whole number of devices, 1 or more"),
        (["generate", "a", "--rules", "fsdp"], "--rules: goes with --mesh, as --mesh data=2,sequence=4"),
        (["generate", "a", "--mesh", "data=2", "--rules", "x"], "'x' is not one of 'replicated', 'fsdp', 'tensor'"),
        (["generate", "a", "--exchange", "ring"], "--exchange: goes with --mesh, as --mesh data=2,sequence=4"),
        (["generate", "a", "--mesh", "sequence=2", "--exchange", "x"], "'x' is not one of 'auto', 'ulysses', 'ring'"),
        (["generate", "a", "--mesh", "data=2", "--process-id", "1"], "this one's number is 1, but a coordinator"),
        (["generate", "a", "--processes", "2"], "--processes: goes with --mesh"),
        (["convert", "nowhere", "there"], "nowhere: no such file or folder"),
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["train", "nowhere"], "no such file, and no recipe of that name"),
        (["generate"], "Missing argument"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in error(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_exchange_of_attention_can_be_forced(caplog, tmp_path):
    context_parallel._log_choice.cache_clear()
    where = ("--mesh", "sequence=2", "--exchange", "gather", "--steps", "1", "-o", str(tmp_path / "a.png"))
    assert run("-v", "generate", "a red apple", *where).exit_code == 0
    assert "attention over 2 devices: gather over 2;" in caplog.text
