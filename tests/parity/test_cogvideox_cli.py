"""CogVideoX from the command line, its further arguments, and what it refuses and in which words."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_cogvideox_pipeline import NEGATIVE, PICTURE, PROMPTS, TOKENS, VIDEO
from util_cogvideox_pipeline import SIZE, pipeline, vae
from util_sd3 import error

import jdit
from jdit import media, video
from jdit.cli import main
from jdit.load import Opened
from jdit.sharding import make_mesh

pytestmark = pytest.mark.torch

SHORT = ["--size", "32x16", "--steps", "2", "--max-text-tokens", "11"]
QUICK = dict(steps=2, guidance=3.0, max_text_tokens=TOKENS, output="latents", negative_prompt=NEGATIVE, **SIZE)


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cogvideox")
    for kind in ("5b", "1.5-i2v"):
        pipeline(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def text(folders):
    return jdit.load(folders / "5b", dtype="float32")


def test_inspect_convert_generate(folders, tmp_path, monkeypatch):
    """Both layouts make the same clip, which a second call repaints; a picture begins another."""
    monkeypatch.chdir(tmp_path)
    result = run("convert", folders / "5b", "model", "--check")
    assert result.exit_code == 0 and "every tensor agrees" in result.stderr, result.output
    for place, layout in ((folders / "5b", "pipeline"), ("model", "jdit")):
        found = json.loads(run("inspect", place, "--json").output)
        assert (found["layout"], found["family"], found["problems"]) == (layout, "cogvideox", [])
    clips = []
    for n, place in enumerate((folders / "5b", "model")):
        result = run("generate", "a cat", "--model", place, *SHORT, "--frames", "8", "-o", f"{n}.mp4")
        assert result.exit_code == 0, result.output
        clips.append(video.video(f"{n}.mp4"))
    assert clips[0].frames.shape == (8, 16, 32, 3) and clips[0].fps == 8
    assert np.array_equal(clips[0].frames, clips[1].frames) and np.std(clips[0].frames) > 0
    more = ["--video", "0.mp4", "--strength", "0.6", "--dynamic-guidance", "--solver", "dpm", "-o", "2.mp4"]
    result = run("generate", "two", "--model", "model", *SHORT, *more)
    assert result.exit_code == 0 and "encode_video " in result.stderr, result.output
    assert video.video("2.mp4").frames.shape == (8, 16, 32, 3)
    media.write(PICTURE, tmp_path / "0.png")
    more = ["--image", "0.png", "--frames", "9", "--vae-tiling", "--vae-slicing", "-o", "3.gif"]
    result = run("generate", "two", "--model", folders / "1.5-i2v", *SHORT, *more)
    assert result.exit_code == 0, result.output
    assert len(video.video("3.gif").frames) == 9


def test_back_to_diffusers(folders, tmp_path):
    """What is written is the pipeline that upstream loads, of the task's own class."""
    from diffusers import DiffusionPipeline

    assert run("convert", folders / "1.5-i2v", tmp_path / "model").exit_code == 0
    result = run("convert", tmp_path / "model", tmp_path / "back", "--to", "diffusers", "--check")
    assert result.exit_code == 0, result.output
    again = DiffusionPipeline.from_pretrained(tmp_path / "back")
    first = DiffusionPipeline.from_pretrained(folders / "1.5-i2v")
    assert type(again) is type(first) and again.vae.config.invert_scale_latents
    want = first.transformer.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in again.transformer.state_dict().items())


REFUSED = {
    "num_frames=10 does not work, 9 or 16 would": ["--frames", "10"],
    "height=24 does not work, 16 or 32 would": ["--size", "32x24"],
    "this model takes no image": ["--image", "0.png"],
    "strength goes with video": ["--strength", "0.5"],
    "strength=1.5: must lie in [0, 1]": ["--video", "0.gif", "--strength", "1.5"],
    "cogvideox does not take shift": ["--shift", "3"],
    "dynamic_guidance needs guidance above 1": ["--dynamic-guidance", "--guidance", "1"],
    "frames of video=5 does not work, 1 or 8 would": ["--video", "0.gif"],
    "num_frames=9, but the video has 5": ["--video", "0.gif", "--frames", "9"],
    "no video at 1.mp4": ["--video", "1.mp4"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_are_refused_before_weights_are_read(folders, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Opened, "pipeline", lambda *a, **k: pytest.fail("weights were read"))
    Image.new("RGB", (20, 40)).save("0.png")
    shown = [Image.fromarray(f) for f in VIDEO[:5]]
    shown[0].save("0.gif", save_all=True, append_images=shown[1:])
    result = run("generate", "a cat", "--model", folders / "5b", *REFUSED[message])
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " "), result.output


def test_what_a_picture_model_refuses(folders):
    ours = jdit.load(folders / "1.5-i2v", dtype="float32")
    for given, message in (
        ({}, "this model makes videos of a picture: it needs image"),
        ({"image": PICTURE, "video": VIDEO}, "this model takes no video, only a picture as image"),
        ({"image": PICTURE, "dynamic_guidance": 2}, "dynamic_guidance=2; it must be True or False"),
        ({"image": PICTURE, "width": 256}, "width=256 does not work, 240 would"),
        ({"image": PICTURE, "latents": np.zeros((1, 3, 6, 10, 4)), **SIZE}, r"this call needs \(1, 4, 6, 10, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ours("a cat", **given)


def test_components_that_do_not_fit(folders, tmp_path):
    with pytest.raises(ValueError, match="transformer takes 4 and gives 4 channels, but the vae has 5 latent channels"):
        vae(latent_channels=5).save_pretrained(tmp_path / "vae")
        jdit.load(folders / "5b", parts={"vae": tmp_path / "vae"})


class TestOptions:
    """Text to video, told otherwise: the numbers stay."""

    @pytest.fixture(scope="class")
    def plain(self, text):
        return text(PROMPTS, **QUICK).latents

    def test_two_passes(self, text, plain):
        assert error(text(PROMPTS, two_passes=True, **QUICK).latents, plain) < 1e-5

    def test_batches_seeds_and_encoded_prompts(self, text, plain):
        given = {k: v for k, v in QUICK.items() if k not in ("negative_prompt", "max_text_tokens")}
        encoded = text.encode(PROMPTS[1], negative_prompt=NEGATIVE[1], max_text_tokens=TOKENS)
        assert error(text(encoded, seed=1, **given).latents, plain[1:]) < 1e-5

    def test_a_stochastic_solver_draws_from_the_seed(self, text):
        start = np.ones((2, 3, 6, 10, 4), np.float32)
        drawn = [text(PROMPTS, solver="dpm", seed=s, latents=start, **QUICK).latents for s in (1, 1, None)]
        assert np.array_equal(drawn[0], drawn[1]) and error(drawn[0], drawn[2]) > 1e-2

    def test_a_mesh(self, folders, plain):
        mesh = make_mesh(data=2, sequence=2, tensor=2)
        sharded = jdit.load(folders / "5b", dtype="float32", mesh=mesh)
        assert error(sharded(PROMPTS, **QUICK).latents, plain) < 1e-5
