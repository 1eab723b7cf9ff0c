"""Qwen-Image from the command line and between layouts, its geometry, its further arguments, and what it refuses."""

import dataclasses
import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from test_token_ids import needs_real

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from test_qwen_image_pipeline import NEGATIVE, PROMPTS, RUN, SIZE, mask  # noqa: E402
from util_qwen2_5_vl import TEXT, VISION, upstream  # noqa: E402
from util_qwen_image import transformer  # noqa: E402
from util_qwen_image_pipeline import components, latents, original_vae, picture, saved, smaller  # noqa: E402
from util_sd3 import error  # noqa: E402

import jdit  # noqa: E402
from convert.qwen_image import ZERO_COND_T  # noqa: E402
from convert.source import open_source  # noqa: E402
from jdit import media  # noqa: E402
from jdit.cli import main  # noqa: E402
from jdit.load import Opened, open_model  # noqa: E402
from jdit.pipeline import qwen_edit  # noqa: E402
from jdit.pipeline.qwen_edit import QwenImageEditing  # noqa: E402
from jdit.sharding import make_mesh  # noqa: E402

pytestmark = [pytest.mark.torch, needs_real]

NAMES = {"make": "QwenImagePipeline", "edit": "QwenImageEditPipeline", "plus": "QwenImageEditPlusPipeline"}
SHORT = ["--size", "80x48", "--steps", "2"]


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = saved(tmp_path_factory.mktemp("qwen"), components())
    return {short: made[name] for short, name in NAMES.items()}


@pytest.fixture(scope="module")
def make(folders):
    return jdit.load(folders["make"], dtype="float32")


@pytest.fixture
def small(monkeypatch):
    smaller(monkeypatch)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with pictures."""
    monkeypatch.chdir(tmp_path)
    for n, size in enumerate([(50, 103), (90, 60)]):
        picture(*size, n).save(f"{n}.png")
    mask(70, 90).save("mask.png")
    return tmp_path


def test_generate(folders, here):
    result = run("generate", PROMPTS[0], "--model", folders["make"], *SHORT, "--negative", " ", "-o", "a.png")
    assert result.exit_code == 0, result.output
    assert media.picture("a.png").shape == (48, 80, 3)
    more = ["--image", "a.png", "--mask", "mask.png", "--strength", "0.7", "--vae-tiling", "--vae-slicing"]
    result = run("generate", "a moon", "--model", folders["make"], *SHORT, *more, "-o", "b.png")
    assert result.exit_code == 0 and "encode_image" in result.stderr, result.output
    assert (media.picture("a.png") != media.picture("b.png")).any()


def test_edit_and_convert(folders, here, small):
    """A picture of the last one's proportions; and back."""
    result = run("convert", folders["plus"], "model", "--check")
    assert result.exit_code == 0 and "every tensor agrees" in result.stderr, result.output
    for place, layout in ((folders["plus"], "pipeline"), ("model", "jdit")):
        found = json.loads(run("inspect", place, "--json").output)
        assert (found["layout"], found["family"], found["problems"]) == (layout, "qwen-image-edit-plus", [])
    images = ["--image", "0.png", "--image", "1.png"]
    result = run("generate", "join them", "--model", "model", *images, "--steps", "2", "-o", "out.png")
    assert result.exit_code == 0, result.output
    assert media.picture("out.png").shape == (128, 64, 3)
    result = run("convert", "model", "back", "--to", "diffusers", "--check")
    assert result.exit_code == 0 and "every tensor agrees" in result.stderr, result.output
    index = json.loads((here / "back" / "model_index.json").read_text())
    assert (index["_class_name"], index["processor"]) == (NAMES["plus"], ["transformers", "Qwen2VLProcessor"])
    assert {"preprocessor_config.json", "tokenizer.json"} <= {p.name for p in (here / "back" / "processor").iterdir()}
    want = diffusers.AutoencoderKLQwenImage.from_pretrained(folders["plus"] / "vae").state_dict()
    got = diffusers.AutoencoderKLQwenImage.from_pretrained(here / "back" / "vae").state_dict()
    assert all(torch.equal(got[k], v) for k, v in want.items()) and set(got) == set(want)


def test_the_size_of_an_edit_is_that_of_the_picture():
    """What the transformer makes and what it sees are of one grid of patches, whatever the proportions: less than a
    patch, of 16 pixels, is lost or gained on each side."""
    for height, width in np.random.default_rng(0).integers(200, 3000, (50, 2)).tolist():
        tall, wide = qwen_edit._size(np.zeros((height, width, 3), np.uint8), qwen_edit.AREA)
        assert tall % 32 == wide % 32 == 0 and abs(tall * wide / qwen_edit.AREA - 1) < 0.1
        scale = (1024 * 1024 / (height * width)) ** 0.5
        assert abs(tall - height * scale) <= 16 and abs(wide - width * scale) <= 16


def test_nothing_shifts_or_zooms(folders, monkeypatch):
    """A transformer whose tokens attend to those of their own place: what is changed in a corner of the picture
    changes the same corner of the result."""
    smaller(monkeypatch, side=256)
    pipe = jdit.load(folders["edit"], dtype="float32")
    attn = pipe.components["transformer"].blocks.image.attn
    kernel = attn.qkv.kernel.get_value()
    attn.qkv.kernel.set_value(kernel.at[:, :, :2].set(0))  # queries and keys know nothing but where they are
    turned = jnp.zeros(16).at[jnp.array([6, 7, 12, 13])].set(60.0)  # one slow pair of the row, one of the column
    for norm in (attn.norm_q, attn.norm_k):
        norm.scale.set_value(jnp.broadcast_to(turned, norm.scale.get_value().shape))
    attn.qkv.bias.set_value(attn.qkv.bias.get_value().at[:, :2].set(1))
    image = np.full((101, 207, 3), 128, np.uint8)
    encoded = pipe.encode("move nothing", image=image, negative_prompt=None)
    size = pipe.run_size({"image": image})
    assert size == (192, 352)
    x = latents(1, *size)[1]
    call = lambda image: np.asarray(
        pipe(encoded, image=image, latents=x, guidance=1.0, steps=2, output="latents").latents
    )
    plain = call(image)
    for row, column in ((0.15, 0.1), (0.8, 0.35), (0.3, 0.9)):
        marked = image.copy()
        y, x_ = int(row * 101), int(column * 207)
        marked[y - 8 : y + 9, x_ - 8 : x_ + 9] = np.random.default_rng(0).integers(0, 255, (17, 17, 3))
        energy = ((call(marked) - plain) ** 2).sum((0, -1))
        energy = energy * (energy > energy.max() / 10)
        at = [
            (energy.sum(1 - axis) * (np.arange(n) + 0.5)).sum() / energy.sum() / n
            for axis, n in enumerate(energy.shape)
        ]
        assert abs(at[0] - row) < 1 / 12 and abs(at[1] - column) < 1 / 22  # a patch


def test_a_converted_model_is_the_same(folders, make, tmp_path):
    """What generates is read without the vision tower, from either layout, and written back with it."""
    assert make.components["text_encoder"].cfg.vision is None
    assert run("convert", folders["make"], tmp_path / "model").exit_code == 0
    pipe = jdit.load(tmp_path / "model", dtype="float32")
    assert pipe.components["text_encoder"].cfg.vision is None
    given = dict(latents=latents(1, 48, 80)[1], negative_prompt=NEGATIVE[1], **RUN, **SIZE)
    assert np.array_equal(pipe(PROMPTS[0], **given).latents, make(PROMPTS[0], **given).latents)
    assert run("convert", tmp_path / "model", tmp_path / "back", "--to", "diffusers", "--check").exit_code == 0
    back = transformers.AutoConfig.from_pretrained(tmp_path / "back" / "text_encoder")
    assert back.vision_config.hidden_size == 24


@pytest.mark.parametrize("mark", [True, False], ids=["edit-2511", "qwen-image"])
def test_single_files(mark, tmp_path):
    """The transformer in a file, and beside it what ComfyUI keeps elsewhere; only Edit-2511's says what it is for."""
    cfg = original_vae(tmp_path / "qwen_image_vae.safetensors")
    kw = dict(attention_head_dim=32, axes_dims_rope=(4, 14, 14), in_channels=64, out_channels=16, num_layers=1)
    kw["joint_attention_dim"] = 256
    tensors = {f"model.diffusion_model.{k}": v for k, v in transformer(**kw, zero_cond_t=mark).state_dict().items()}
    if mark:
        tensors[f"model.diffusion_model.{ZERO_COND_T}"] = torch.empty(0)
    save_file(tensors, tmp_path / "qwen.safetensors")
    text = dict(TEXT, hidden_size=256, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    text["rope_parameters"] = TEXT["rope_parameters"] | {"mrope_section": [16, 24, 24]}
    tower = dict(hidden_size=80, num_heads=1, out_hidden_size=256, depth=1, patch_size=14, window_size=112)
    encoder = upstream(text=text, vision=dict(VISION, **tower))
    save_file(encoder.state_dict(), tmp_path / "qwen_2.5_vl_7b.safetensors")
    found = json.loads(run("inspect", tmp_path / "qwen.safetensors", "--json").output)
    assert found["family"] == ("qwen-image-edit-plus" if mark else "qwen-image")
    assert set(found["components"]) == {"transformer", "vae", "text_encoder"}
    assert found["problems"] == []
    configs = open_source(tmp_path / "qwen.safetensors").parts
    assert configs["vae"].cfg == cfg and configs["transformer"].cfg.zero_cond_t == mark
    assert configs["text_encoder"].cfg.language.heads == 2


REFUSED = {
    "height=40 does not work, 32 or 48 would": ("make", ["--size", "80x40"]),
    "mask goes with image; strength goes with image": ("make", ["--mask", "mask.png", "--strength", "0.5"]),
    "2 pictures; qwen-image takes one as image": ("make", ["--image", "0.png", "--image", "1.png"]),
    "strength=0.0 leaves none of the 5 steps to run": ("make", ["--image", "0.png", "--strength", 0, "--steps", 5]),
    "max_text_tokens=1025; it may be 1 to 1024": ("make", ["--max-text-tokens", "1025"]),
    "qwen-image does not take num_frames": ("make", ["--frames", "5"]),
    "this model edits pictures: it needs image": ("edit", []),
    "2 pictures; qwen-image-edit takes one as image": ("edit", ["--image", "0.png", "--image", "1.png"]),
    "strength goes with mask": ("edit", ["--image", "0.png", "--strength", "0.5"]),
    "32 x 32 pixels; with mask the result is 704 x 1472, as the picture": (
        "edit", ["--image", "0.png", "--mask", "mask.png", "--size", "32x32"],
    ),
    "a picture of 2 x 500: one side may be at most 200 times the other": (
        "plus", ["--image", "0.png", "--image", "long.png"],
    ),
    "no picture at 7.png": ("plus", ["--image", "0.png", "--image", "7.png"]),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_are_refused_before_weights_are_read(folders, here, message, monkeypatch):
    monkeypatch.setattr(Opened, "pipeline", lambda *a, **k: pytest.fail("weights were read"))
    picture(2, 500).save("long.png")
    model, arguments = REFUSED[message]
    result = run("generate", "a cat", "--model", folders[model], *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output


def test_components_that_do_not_fit(folders, tmp_path):
    parts = open_model(folders["edit"]).parts

    def misfits(component: str | None = None, **fields):
        configs = dict(parts.configs)
        if component:
            configs[component] = dataclasses.replace(configs[component], **fields)
        settings = parts.settings if component else {"image_processor": parts.settings["image_processor"] | fields}
        return " ".join(QwenImageEditing.misfits(dataclasses.replace(parts, configs=configs, settings=settings)))

    assert not misfits()
    assert "takes 5 and gives 4 channels of latents, the vae has 4" in misfits("transformer", in_channels=5)
    assert "reads states of width 24, but those of the text_encoder have 40" in misfits("transformer", text_dim=24)
    said = "temperal_downsample has 4 values for 4 levels; 3 would fit"
    assert said in misfits("vae", temporal=(False, True, True, False), space_factor=16)
    assert "text_encoder has no vision tower" in misfits("text_encoder", vision=None)
    assert "processor makes tokens of 28 pixels a side, the text_encoder of 8" in misfits(patch_size=14)
    assert "processor: do_resize=False is not supported" in misfits(do_resize=False)
    file = shutil.copytree(folders["edit"], tmp_path / "edit") / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": True}))
    assert "guidance_embeds=True (it may be False)" in " ".join(run("inspect", tmp_path / "edit").output.split())


def test_options_and_devices(folders, make):
    """Batches, seeds, two outputs a prompt, encoded prompts, and 8 devices: the numbers stay."""
    given = dict(**RUN, **SIZE) | dict(steps=2)
    plain = make(PROMPTS, negative_prompt=NEGATIVE, seed=[5, 6], **given).latents
    encoded = make.encode(PROMPTS, negative_prompt=NEGATIVE)
    assert encoded.positive.states.shape[1] % 64 == 0  # of one shape with other prompts of about its length
    again = make(encoded, seed=[5, 8, 6, 7], num_outputs=2, **given).latents
    assert error(again[::2], plain) < 1e-5
    with pytest.raises(ValueError, match="max_text_tokens: the prompt is encoded already"):
        make(encoded, max_text_tokens=9, **given)
    sharded = jdit.load(folders["make"], dtype="float32", mesh=make_mesh(data=2, sequence=2, tensor=2))
    assert error(sharded(PROMPTS, negative_prompt=NEGATIVE, seed=[5, 6], **given).latents, plain) < 1e-5


def test_long_prompts_keep_the_template(make, caplog):
    with caplog.at_level(logging.WARNING, "jdit"):
        states = make.encode("word " * 50 + "end", negative_prompt=None, max_text_tokens=30).positive
    assert "51 tokens, 25 fit" in caplog.text and states.lengths.tolist() == [30]
