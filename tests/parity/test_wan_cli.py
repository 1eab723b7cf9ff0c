"""The command line on Wan folders as diffusers saves them: inspect, convert, generate, broken folders."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from util_wan_pipeline import pipeline, vae

from jdit import video
from jdit.cli import main
from jdit.load import Opened
from jdit.pipeline import calls

pytestmark = pytest.mark.torch

SHORT = ["--frames", "5", "--size", "32x16", "--steps", "2", "--max-text-tokens", "7"]


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (diffusers' pipeline, its folder); the transformer of t2v in shards."""
    root, made = tmp_path_factory.mktemp("wan"), {}
    for kind in ("t2v", "i2v-experts"):
        made[kind] = pipeline(root / kind, kind), root / kind
    pipe, folder = made["t2v"]
    shutil.rmtree(folder / "transformer")
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    return made


def test_inspect_convert_generate(models, tmp_path, monkeypatch):
    """Both layouts are told to be what diffusers holds, and make the same clip."""
    monkeypatch.chdir(tmp_path)
    theirs, folder = models["t2v"]
    result = run("convert", folder, "model", "--check")
    assert result.exit_code == 0, result.output
    assert "text_encoder, transformer, vae" in result.stderr and "every tensor agrees" in result.stderr
    for place, layout in ((folder, "pipeline"), ("model", "jdit")):
        found = json.loads(run("inspect", place, "--json").output)
        assert (found["layout"], found["family"], found["problems"]) == (layout, "wan", [])
        assert found["scheduler"]["_class_name"] == "UniPCMultistepScheduler" and found["tokenizers"] == ["tokenizer"]
        for name in ("transformer", "vae", "text_encoder"):
            count = sum(p.numel() for p in getattr(theirs, name).parameters())
            expected = {"parameters": count, "bytes": 4 * count, "dtypes": ["float32"]}
            assert {k: found["components"][name][k] for k in expected} == expected
    assert all(word in run("inspect", folder).output for word in ("family wan", "AutoencoderKLWan", "UniPC"))
    clips = []
    for n, place in enumerate((folder, "model")):
        result = run("generate", "a cat", "--model", place, *SHORT, "-o", f"{n}.mp4")
        assert result.exit_code == 0, result.output
        clips.append(video.video(f"{n}.mp4"))
    assert clips[0].frames.shape == (5, 16, 32, 3) and clips[0].fps == 16
    assert np.array_equal(clips[0].frames, clips[1].frames) and np.std(clips[0].frames) > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.mp4", "1.mp4", "model"]


def test_from_a_first_to_a_last_frame(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 40, 3), np.uint8)).save(f"{i}.png")
    pictures, model = ["--image", "0.png", "--last-image", "1.png"], ["--model", models["i2v-experts"][1]]
    told, plain = [], calls._Listeners.chunk
    note = lambda self, *a: (plain(self, *a), told.append((self.frames, a[1])))
    monkeypatch.setattr(calls._Listeners, "chunk", note)
    more = ["--guidance-2", "2", "--fps", "24", "-n", "2", "--vae-slicing", "-o", "a.gif"]
    result = run("generate", "two", *model, *SHORT, *pictures, *more)
    assert result.exit_code == 0, result.output
    assert all(f"{stage} " in result.stderr for stage in ("denoise_high", "denoise_low", "decode"))
    assert [len(video.video(f"a-{i}.gif").frames) for i in range(2)] == [5, 5]
    assert told == [(1, 10), (5, 10), (6, 10), (10, 10)]


def test_segments_grow_a_file(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)).save("0.png")
    model = ["--model", models["i2v-experts"][1]]
    result = run("generate", "two", *model, *SHORT, "--image", "0.png", "--segments", "2", "-o", "a.mp4")
    assert result.exit_code == 0, result.output
    assert len(video.video("a.mp4").frames) == 9  # 5, and 4 that go on from the last


REFUSED = {
    "num_frames=8 does not work, 5 or 9 would": ["--frames", "8"],
    "height=17 does not work, 16 or 32 would": ["--size", "32x17"],
    "this model takes no image": ["--image", "0.png"],
    "guidance_2 is the second expert's": ["--guidance-2", "2"],
    "wan does not take strength": ["--strength", "0.5"],
    "out.jpg: no video is '.jpg'": ["-o", "out.jpg"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_are_refused_before_weights_are_read(models, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Opened, "pipeline", lambda *a, **k: pytest.fail("weights were read"))
    Image.new("RGB", (20, 40)).save("0.png")
    result = run("generate", "a cat", "--model", models["t2v"][1], *REFUSED[message])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["0.png"]


def lacking(folder):
    next((folder / "transformer").glob("*-00002-of-*")).unlink()
    return "00002-of-0000"


def cut(folder):
    path = next((folder / "transformer").glob("*-00002-of-*"))
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path.name}: "


def of_another_shape(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 48}))
    return "ffn.net.0.proj.weight: shape (40, 32)"


def without_vae(folder):
    shutil.rmtree(folder / "vae")
    return "the folder that model_index.json names is missing"


def with_vae_of_another_release(folder):
    shutil.rmtree(folder / "vae")
    vae(base_dim=4, z_dim=6, dim_mult=[1, 2, 2, 2], num_res_blocks=1).save_pretrained(folder / "vae")
    return "transformer takes 4 and gives 4 channels, but the vae has 6 latent channels"


@pytest.mark.parametrize("damage", [lacking, cut, of_another_shape, without_vae, with_vae_of_another_release])
def test_a_broken_folder(models, damage, tmp_path, monkeypatch):
    """One message that names the place, from every command, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(models["t2v"][1], tmp_path / "model")
    message = damage(folder)
    for command in (["inspect", folder], ["convert", folder, "out"], ["generate", "cat", "--model", folder, *SHORT]):
        result = run(*command)
        told = (result.stdout + result.stderr) if command[0] == "inspect" else result.stderr
        assert result.exit_code == 2 and message in told.replace("\n", ""), (command, result.output)
        lines = [line for line in told.splitlines() if line.startswith(("jdit: ", "problem: "))]
        assert len(lines) == 1 or damage is of_another_shape  # which is wrong in each layer
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
