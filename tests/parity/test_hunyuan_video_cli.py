"""HunyuanVideo from the command line, and what it refuses and in which words."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_hunyuan_video_pipeline import PROMPTS
from util_hunyuan_pipeline import pipeline
from util_hunyuan_video import saved

import jdit
from jdit import video
from jdit.cli import main
from jdit.load import Opened

pytestmark = pytest.mark.torch

SHORT = ["--size", "32x16", "--frames", "5", "--steps", "2"]


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hunyuan")
    pipeline(root)
    return root / "model"


def test_inspect_convert_generate(folder, tmp_path, monkeypatch):
    """Both layouts make the same clip; what is written back is the pipeline that upstream loads."""
    from diffusers import HunyuanVideoPipeline

    monkeypatch.chdir(tmp_path)
    result = run("convert", folder, "model", "--check")
    assert result.exit_code == 0 and "every tensor agrees" in result.stderr, result.output
    for place, layout in ((folder, "pipeline"), ("model", "jdit")):
        found = json.loads(run("inspect", place, "--json").output)
        assert (found["layout"], found["family"], found["problems"]) == (layout, "hunyuan-video", [])
    clips = []
    more = ["--true-guidance", "2.5", "--negative", "two", "--max-text-tokens", "9"]
    for n, (place, options) in enumerate(((folder, more), ("model", [*more, "--no-vae-tiling"]))):
        result = run("generate", "a cat", "--model", place, *SHORT, *options, "-o", f"{n}.mp4")
        assert result.exit_code == 0 and "modulate " in result.stderr, result.output
        clips.append(video.video(f"{n}.mp4"))
    assert clips[0].frames.shape == (5, 16, 32, 3) and clips[0].fps == 24
    assert np.array_equal(clips[0].frames, clips[1].frames) and np.std(clips[0].frames) > 0
    result = run("convert", "model", "back", "--to", "diffusers", "--check")
    assert result.exit_code == 0, result.output
    again, first = (HunyuanVideoPipeline.from_pretrained(f) for f in ("back", folder))
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        want = getattr(first, name).state_dict()
        assert all(torch.equal(v, want[k]) for k, v in getattr(again, name).state_dict().items()), name
    assert again.scheduler.config.shift == 7.0
    for text in PROMPTS:
        for a, b in ((again.tokenizer, first.tokenizer), (again.tokenizer_2, first.tokenizer_2)):
            assert a(text).input_ids == b(text).input_ids


REFUSED = {
    "num_frames=10 does not work, 9 or 13 would (1 + 4 n, up to 4093)": ["--frames", "10"],
    "height=24 does not work, 16 or 32 would": ["--size", "32x24"],
    "hunyuan-video does not take image": ["--image", "0.png"],
    "max_text_tokens=0; it must be at least 1": ["--max-text-tokens", "0"],
    "true_guidance=nan; it must be finite": ["--true-guidance", "nan"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_are_refused_before_weights_are_read(folder, message, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Opened, "pipeline", lambda *a, **k: pytest.fail("weights were read"))
    Image.new("RGB", (20, 40)).save("0.png")
    result = run("generate", "a cat", "--model", folder, *REFUSED[message])
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " "), result.output


MISFITS = {
    "transformer takes 5 and gives 5 channels, but the vae has 4": dict(in_channels=5, out_channels=5),
    "image_condition_type='token_replace', this pipeline runs": dict(image_condition_type="token_replace"),
    "transformer reads states of width 20, but those of text_encoder have 24": dict(text_embed_dim=20),
    "transformer reads states of width 8, but those of text_encoder_2 have 20": dict(pooled_projection_dim=8),
}


@pytest.mark.parametrize("message", MISFITS)
def test_components_that_do_not_fit(folder, message, tmp_path):
    saved(tmp_path, **MISFITS[message])
    with pytest.raises(ValueError, match=message):
        jdit.load(folder, parts={"transformer": tmp_path})
