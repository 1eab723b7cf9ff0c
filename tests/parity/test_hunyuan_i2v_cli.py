"""HunyuanVideo's picture to video from the command line and from original releases: inspect, convert, generate, what is
refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import util_hunyuan_pictures as util
from click.testing import CliRunner
from util_sd3 import error

import jdit
from convert import registry, stream, write
from convert.convert import convert
from convert.source import open_source
from jdit import video
from jdit.cli import main
from jdit.load import open_model
from jdit.sharding import dotted, make_mesh

pytestmark = pytest.mark.torch

SHORT = ["--frames", "9", "--size", "32x16", "--steps", "2", "--max-text-tokens", "12"]
QUICK = dict(steps=2, height=32, width=48, num_frames=9, max_text_tokens=12, output="latents")
PICTURE = util.pictures(1, (20, 40))[0]


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> diffusers' folder."""
    root = tmp_path_factory.mktemp("hunyuan")
    for kind in util.KINDS:
        util.pipeline(root / kind, kind)
    return {kind: root / kind / "model" for kind in util.KINDS}


def test_inspect_convert_generate(models, tmp_path, monkeypatch):
    """To jdit and back makes the same clip, without the first four frames of "latent_concat"."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("cat.png")
    for command in (("convert", models["latent_concat"], "model"), ("convert", "model", "back", "--to", "diffusers")):
        result = run(*command, "--check")
        assert result.exit_code == 0 and "every tensor agrees" in result.output + result.stderr, result.output
    found = json.loads(run("inspect", "back", "--json").output)
    assert (found["family"], found["problems"]) == ("hunyuan-video-i2v", [])
    assert sorted(found["components"]) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    clips = []
    for n, place in enumerate((models["latent_concat"], "back")):
        result = run("generate", "two", "--model", place, "--image", "cat.png", *SHORT, "-o", f"{n}.mp4")
        assert result.exit_code == 0, result.output
        clips.append(video.video(f"{n}.mp4").frames)
    assert clips[0].shape == (5, 16, 32, 3) and np.std(clips[0]) > 0 and np.array_equal(*clips)
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["_class_name"] == "HunyuanVideoImageToVideoPipeline"
    assert index["text_encoder"] == ["transformers", "LlavaForConditionalGeneration"]
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]


class TestOptions:
    """Told otherwise: the numbers stay."""

    @pytest.fixture(scope="class")
    def loaded(self, models):
        return jdit.load(models["token_replace"], dtype="float32")

    @pytest.fixture(scope="class")
    def plain(self, loaded):
        return loaded(["a red cat", "two"], image=PICTURE, true_guidance=2.0, negative_prompt="blue", **QUICK).latents

    def test_encoded_prompts_and_batches(self, loaded, plain):
        given = dict(max_text_tokens=12, image=PICTURE)
        prompt = loaded.encode("two", negative_prompt="blue", **given)
        quick = {k: v for k, v in QUICK.items() if k != "max_text_tokens"}
        out = loaded(prompt, image=PICTURE, true_guidance=2.0, seed=[1, 5], num_outputs=2, **quick).latents
        assert error(out[:1], plain[1:]) < 1e-5 < 1e-2 < error(out[1:], plain[1:])
        with pytest.raises(ValueError, match="max_text_tokens: the prompt is encoded already"):
            loaded(prompt, image=PICTURE, **QUICK)
        with pytest.raises(ValueError, match="its prompts are encoded with image"):
            loaded.encode("two")

    def test_a_mesh(self, models, plain):
        mesh = make_mesh(data=2, sequence=2, tensor=2)
        pipe = jdit.load(models["token_replace"], dtype="float32", mesh=mesh)
        out = pipe(["a red cat", "two"], image=PICTURE, true_guidance=2.0, negative_prompt="blue", **QUICK)
        assert error(out.latents, np.asarray(plain)) < 1e-5

    def test_the_first_frame_is_the_picture(self, loaded, plain):
        other = loaded(["a red cat", "two"], image=PICTURE, seed=9, **QUICK).latents
        assert np.array_equal(other[:, 0], plain[:, 0]) and np.array_equal(plain[0, 0], plain[1, 0])


REFUSED = {
    "token_replace": {
        "this model makes videos of a picture: it needs image": dict(image=None),
        "height=24 does not work, 16 or 32 would": dict(height=24),
        "num_frames=8 does not work, 5 or 9 would": dict(num_frames=8),
        "takes one picture in its place": dict(image=[PICTURE, PICTURE]),
    },
    "latent_concat": {
        "num_frames=1 does not work, 5 would: this model leaves out the first 4": dict(num_frames=1),
        "its classifier-free scale is guidance, not true_guidance": dict(true_guidance=2.0),
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_calls(models, kind):
    dry = open_model(models[kind]).dry()
    dry.check(image=PICTURE, height=16, width=32, num_frames=5)
    for message, change in REFUSED[kind].items():
        with pytest.raises(ValueError, match=message):
            dry.check(**(dict(image=PICTURE) | change))


@pytest.mark.parametrize("change, message", [
    (("transformer", "image_condition_type", None), "image_condition_type=None, this pipeline runs"),
    (("text_encoder", "image_token_index", 70), "<image> is 485, the text_encoder's image_token_index is 70"),
    (("image_processor", "crop_size", 20), r"makes pictures of \(20, 20\), the text_encoder takes \(12, 12\)"),
])  # fmt: skip
def test_parts_that_do_not_fit(models, tmp_path, change, message):
    part, field, value = change
    model = tmp_path / "model"
    model.mkdir()
    for item in models["token_replace"].iterdir():
        if item.name != part:
            (model / item.name).symlink_to(item)
    (model / part).mkdir()
    for item in (models["token_replace"] / part).iterdir():
        if item.suffix == ".json" and field in (config := json.loads(item.read_text())):
            (model / part / item.name).write_text(json.dumps(config | {field: value}))
        else:
            (model / part / item.name).symlink_to(item)
    with pytest.raises(ValueError, match=message):
        open_model(model)


@pytest.mark.parametrize("kind", util.KINDS)
def test_original_release(tmp_path, kind):
    """Its folder says what no tensor does. A file of another name and with the channels of noise makes videos of
    text."""
    util.pipeline(tmp_path, kind, original=True)
    root, source = tmp_path / "ckpts", open_source(tmp_path / "model")
    family, want = registry.FAMILIES["hunyuan-video-i2v"], {n: (p.cfg, leaves(p)) for n, p in source.parts.items()}
    names = {"transformer": "hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states",
             "text_encoder": "text_encoder_i2v/model", "text_encoder_2": "text_encoder_2/model"}  # fmt: skip
    for name, file in names.items():
        cfg, own = want[name]
        tensors = write.outputs(own, family.originals[name].rules(cfg))
        state = {t.key: torch.from_numpy(np.array(t.load())) for t in tensors}
        (root / file).parent.mkdir(parents=True)
        torch.save({"module": state}, root / f"{file}.pt")
    for name, folder in (("tokenizer", "text_encoder_i2v"), ("tokenizer_2", "text_encoder_2")):
        shutil.copytree(tmp_path / "model" / name, root / folder, dirs_exist_ok=True)
    source = open_source(root)
    assert source.family == "hunyuan-video-i2v" and sorted(source.tokenizers) == ["tokenizer", "tokenizer_2"]
    assert source.parts.keys() == names.keys()
    for name, part in source.parts.items():
        cfg, own = want[name]
        said = {} if name == "transformer" else {"eos_token_id": cfg.eos_token_id} if name == "text_encoder_2" else {
            "image_token_id": cfg.image_token_id, "pad_token_id": cfg.pad_token_id}  # fmt: skip
        assert dataclasses.replace(part.cfg, **said) == cfg
        got = leaves(part)
        assert got.keys() == own.keys() and all(np.array_equal(got[k], own[k]) for k in got)
    (root / f"{names['transformer']}.pt").rename(tmp_path / "other.pt")
    other = open_source(tmp_path / "other.pt")
    assert other.family == ("hunyuan-video-i2v" if kind == "latent_concat" else "hunyuan-video")
    convert(tmp_path / "model", tmp_path / "jdit")
    convert(tmp_path / "jdit", tmp_path / "one.safetensors", to="original", check=True)
    one = open_source(tmp_path / "one.safetensors")
    assert one.family == "hunyuan-video-i2v" and one.parts["transformer"].cfg == want["transformer"][0]


def leaves(part) -> dict[str, np.ndarray]:
    targets = registry.of_config(part.cfg).targets(part.cfg)
    return {dotted(p): np.asarray(v) for p, v in stream.load_leaves(part.reader, part.rules, targets).items()}
