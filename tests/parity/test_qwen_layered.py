"""Qwen-Image-Layered against diffusers: whole pipelines, layouts, the command line, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from test_token_ids import needs_real

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_qwen_image_pipeline import NEGATIVE, PROMPTS  # noqa: E402
from util_qwen_image import transformer  # noqa: E402
from util_qwen_image_pipeline import components, made, original_vae, saved, smaller_layers  # noqa: E402
from util_sd3 import error, noise  # noqa: E402

import jdit  # noqa: E402
from convert.source import open_source  # noqa: E402
from jdit import media  # noqa: E402
from jdit.cli import main  # noqa: E402
from jdit.load import Opened, open_model  # noqa: E402
from jdit.pipeline.qwen_image import QwenImageGeneration  # noqa: E402
from jdit.pipeline.qwen_layered import QwenImageLayering  # noqa: E402

pytestmark = [pytest.mark.torch, needs_real]

NAME = "QwenImageLayeredPipeline"
LAYERED = dict(use_additional_t_cond=True, use_layer3d_rope=True)
COUNT, HEIGHT, WIDTH = 3, 64, 128  # of layers; pixels of what a picture of 50 x 103 becomes
CHANNELS = 6  # of latents; what has as many as them upstream takes for latents, so not 4


@pytest.fixture(scope="module")
def parts():
    return components(channels=4, z=CHANNELS, **LAYERED)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("layered"), parts, [NAME])[NAME]


@pytest.fixture(scope="module")
def pipe(folder):
    return jdit.load(folder, dtype="float32")


@pytest.fixture
def small(monkeypatch):
    smaller_layers(monkeypatch)


def image(height: int = 50, width: int = 103) -> Image.Image:
    """Of every opacity."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8))


def latents(count: int):
    """(packed as upstream wants it, channels last as we want it): the whole and its layers."""
    z = noise(0, count, 1 + COUNT, CHANNELS, HEIGHT // 8, WIDTH // 8)
    packed = diffusers.QwenImageLayeredPipeline._pack_latents(z, count, CHANNELS, HEIGHT // 8, WIDTH // 8, 1 + COUNT)
    return packed, z.movedim(2, -1).numpy()


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("normalized", [False, True])
def test_layers(parts, pipe, small, normalized):
    """Two unequal prompts and negative prompts (upstream deals the layers of a batch out wrongly, but in order); with
    normalised guidance also what saves memory, and prompts that are encoded before."""
    theirs, (packed, x), steps = made(diffusers.QwenImageLayeredPipeline, parts), latents(2), []
    with torch.no_grad():
        pixels = theirs(
            image(), PROMPTS, NEGATIVE, true_cfg_scale=4.0, layers=COUNT, num_inference_steps=4, latents=packed,
            cfg_normalize=normalized, output_type="np",
            callback_on_step_end=lambda pipe, i, t, values: steps.append(values["latents"]) or {},
        ).images  # fmt: skip
    want = theirs._unpack_latents(steps[-1], HEIGHT, WIDTH, COUNT, 8).movedim(1, -1).numpy()
    given = dict(image=image(), layers=COUNT, steps=4, guidance=4.0, latents=x, output="float")
    assert pipe.parts.family == "qwen-image-layered"
    if normalized:
        encoded = pipe.encode(PROMPTS, negative_prompt=NEGATIVE)
        got = pipe(encoded, cfg_normalize=True, two_passes=True, vae_slicing=True, **given)
    else:
        got = pipe(PROMPTS, negative_prompt=NEGATIVE, **given)
    assert len(steps) == 4 and got.latents.shape == x.shape
    assert error(got.latents, want) < 1e-4
    assert got.pixels.shape == (2, COUNT, HEIGHT, WIDTH, 4)
    assert error(got.pixels.reshape(-1, HEIGHT, WIDTH, 4), np.concatenate(pixels)) < 1e-4


def test_without_guidance(parts, pipe, small, tmp_path):
    """A file without transparency is opaque; uint8 as upstream rounds, and a batch of one."""
    image().convert("RGB").save(tmp_path / "a.png")
    theirs, (packed, x) = made(diffusers.QwenImageLayeredPipeline, parts), latents(1)
    given = dict(num_inference_steps=2, layers=COUNT, latents=packed)
    with torch.no_grad():
        want = theirs(image().convert("RGB").convert("RGBA"), PROMPTS[1], **given).images[0]
    got = pipe(PROMPTS[1], image=tmp_path / "a.png", latents=x, guidance=1.0, steps=2, layers=COUNT).pixels
    assert len(want) == COUNT and got.dtype == np.uint8
    for ours, layer in zip(got[0], want):
        assert layer.mode == "RGBA" and np.abs(ours.astype(int) - np.asarray(layer)).max() <= 1


def test_sizes(pipe):
    """Upstream's buckets: about 640 or 1024 squared, in the proportions of the picture."""
    upstream = diffusers.pipelines.qwenimage.pipeline_qwenimage_layered.calculate_dimensions
    for height, width in [(50, 103), (700, 300), (1024, 1024)]:
        picture = np.zeros((height, width, 3), np.uint8)
        for resolution in (None, 640, 1024):
            width_, height_ = upstream((resolution or 640) ** 2, width / height)
            assert pipe.run_size({"image": picture, "resolution": resolution}) == (height_, width_)


def test_command_line_and_layouts(folder, pipe, small, tmp_path, monkeypatch):
    """Layers as files, the same from either layout; and back."""
    monkeypatch.chdir(tmp_path)
    image().save("in.png")
    assert pipe.components["text_encoder"].cfg.vision is None
    result = run("convert", folder, "model", "--check")
    assert result.exit_code == 0 and "every tensor agrees" in result.stderr, result.output
    given = ["--image", "in.png", "--layers", COUNT, "--steps", 2, "--cfg-normalize", "--negative", " "]
    result = run("generate", PROMPTS[1], "--model", "model", *given, "-o", "a.png")
    assert result.exit_code == 0 and "a-0.png, a-1.png, a-2.png" in result.stderr, result.output
    read = np.stack([np.asarray(Image.open(f"a-{i}.png")) for i in range(COUNT)])
    assert read.shape == (COUNT, HEIGHT, WIDTH, 4)
    kw = dict(negative_prompt=" ", image="in.png", layers=COUNT, steps=2, cfg_normalize=True)
    assert np.array_equal(pipe(PROMPTS[1], **kw).pixels[0], read)
    only = ["--only", "transformer", "--only", "vae"]
    result = run("convert", "model", "back", "--to", "diffusers", "--check", *only)
    assert result.exit_code == 0 and "every tensor agrees" in result.stderr, result.output
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert (index["_class_name"], index["processor"]) == (NAME, ["transformers", "Qwen2VLProcessor"])
    assert (tmp_path / "back" / "processor" / "preprocessor_config.json").is_file()
    for part, kind in (("vae", "AutoencoderKLQwenImage"), ("transformer", "QwenImageTransformer2DModel")):
        want = getattr(diffusers, kind).from_pretrained(folder / part)
        got = getattr(diffusers, kind).from_pretrained(tmp_path / "back" / part)
        assert all(got.config[k] == v for k, v in want.config.items() if k[0] != "_")
        assert all(torch.equal(got.state_dict()[k], v) for k, v in want.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file(prefix, tmp_path):
    """The second embedding of time tells it, and the autoencoder beside it is another file than Qwen-Image's."""
    kw = dict(attention_head_dim=32, axes_dims_rope=(4, 14, 14), in_channels=64, out_channels=16, num_layers=1)
    tensors = {prefix + k: v.contiguous() for k, v in transformer(**kw, **LAYERED).state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    save_file({"broken": torch.zeros(1)}, tmp_path / "qwen_image_vae.safetensors")
    vae = original_vae(tmp_path / "qwen_image_layered_vae.safetensors", input_channels=4)
    found = json.loads(run("inspect", tmp_path / "x.safetensors", "--json").output)
    assert (found["family"], set(found["components"]), found["problems"]) == (
        "qwen-image-layered", {"transformer", "vae"}, []
    )  # fmt: skip
    parts = open_source(tmp_path / "x.safetensors").parts
    assert parts["transformer"].cfg.layered and parts["transformer"].cfg.added_t
    assert parts["vae"].cfg == vae and vae.in_channels == vae.out_channels == 4


ONE = ["a cat", "--image", "in.png"]
REFUSED = {
    "this model takes a picture apart: it needs image": ["a cat"],
    "2 pictures; qwen-image-layered takes one as image": [*ONE, "--image", "in.png"],
    "resolution=512; there are 640 and 1024": [*ONE, "--resolution", 512],
    "qwen-image-layered does not take height, width": [*ONE, "--size", "640x640"],
    "a picture of 1 x 3000 would become 0 x 35040 pixels": ["a cat", "--image", "long.png"],
    "out.webp: layers have transparency, they are written as .png": [*ONE, "-o", "out.webp"],
    "--grid lays pictures on a sheet; qwen-image-layered makes layers": [*ONE, "--grid"],
    "the prompt is empty; describe the picture": [" ", "--image", "in.png"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_are_refused_before_weights_are_read(folder, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Opened, "pipeline", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    image().save("in.png")
    image(1, 3000).save("long.png")
    result = run("generate", *REFUSED[message], "--model", folder)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output


def test_empty_prompts(pipe):
    for prompt in ("", " ", None, ["a cat", "\n"]):
        with pytest.raises(ValueError, match="the prompt is empty; describe the picture"):
            pipe(prompt, image=image())
    with pytest.raises(ValueError, match="the prompt is empty"):
        pipe.encode("")
    with pytest.raises(ValueError, match="layers=0; it must be at least 1"):
        pipe("a cat", image=image(), layers=0)
    with pytest.raises(ValueError, match=r"latents are \(1, 4, 8, 16, 6\); this call needs \(1, 5, 56, 116, 6\)"):
        pipe("a cat", image=image(), latents=latents(1)[1])


def test_components_that_do_not_fit(folder):
    parts = open_model(folder).parts
    vae = dataclasses.replace(parts.configs["vae"], in_channels=3, out_channels=3)
    plain = lambda **fields: dataclasses.replace(parts.configs["transformer"], **fields)
    misfits = lambda cls, **configs: " ".join(
        cls.misfits(dataclasses.replace(parts, configs={**parts.configs, **configs}))
    )
    assert not misfits(QwenImageLayering)
    assert "vae takes pictures of 3 channels, qwen-image-layered needs 4" in misfits(QwenImageLayering, vae=vae)
    assert not misfits(QwenImageGeneration, vae=vae, transformer=plain(layered=False, added_t=False))
    for fields in (dict(layered=False), dict(added_t=False)):
        said = misfits(QwenImageGeneration, vae=vae, transformer=plain(**fields))
        assert "it makes layers of a picture, which goes with QwenImageLayeredPipeline" in said


def test_files_of_layers(tmp_path):
    """A number for each output, then for each layer."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 5, 6, 4), np.uint8)
    names = [p.name for p in jdit.Output(pixels, None, {}).save(tmp_path / "a.png")]
    assert names == ["a-0-0.png", "a-0-1.png", "a-1-0.png", "a-1-1.png"]
    np.testing.assert_array_equal(media.picture(tmp_path / "a-1-0.png", alpha=True), pixels[1, 0])
    assert [p.name for p in media.save(pixels[:1, :1], tmp_path / "b.png")] == ["b.png"]
    for suffix in (".webp", ".gif", ".jpg", ".mp4"):
        with pytest.raises(ValueError, match=r"layers have transparency, they are written as \.png"):
            media.save(pixels, tmp_path / f"a{suffix}")
