"""Whole Qwen-Image pipelines against diffusers: text to image, image to image, inpainting, editing."""

import functools

import numpy as np
import pytest
from test_token_ids import needs_real

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402
from util_qwen_image_pipeline import (  # noqa: E402
    PIPELINES,
    SIDE,
    components,
    latents,
    made,
    picture,
    saved,
    smaller,
    unpacked,
)
from util_sd3 import error  # noqa: E402

import jdit  # noqa: E402

pytestmark = [pytest.mark.torch, needs_real]

PROMPTS = ["一只猫坐在窗台上，\n阳光洒在它的毛上。\n标题：“通义千问”", "a red cat"]
NEGATIVE = [" ", "blurry,\n\nlow quality"]
SIZE = dict(height=48, width=80)
RUN = dict(steps=4, guidance=4.0, output="latents")
THEIRS = dict(num_inference_steps=4, true_cfg_scale=4.0, output_type="latent")


@pytest.fixture(scope="module")
def parts():
    return components(zero_cond_t=True)


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen"), parts)


@pytest.fixture(scope="module")
def ours(folders):
    """Name of upstream's pipeline -> ours."""
    return functools.cache(lambda name: jdit.load(folders[name], dtype="float32"))


@pytest.fixture
def small(monkeypatch):
    smaller(monkeypatch)


def test_text_to_image(parts, ours):
    theirs, (packed, x) = made(PIPELINES["QwenImagePipeline"], parts), latents(2, 48, 80)
    with torch.no_grad():
        want = theirs(PROMPTS, negative_prompt=NEGATIVE, latents=packed, **SIZE, **THEIRS).images
        pixels = theirs(PROMPTS[0], latents=packed[:1], **SIZE, **(THEIRS | dict(output_type="np"))).images
    pipe = ours("QwenImagePipeline")
    assert pipe.parts.family == "qwen-image"
    got = pipe(PROMPTS, negative_prompt=NEGATIVE, latents=x, **SIZE, **RUN)
    assert error(got.latents, unpacked(want, 48, 80)) < 1e-4
    plain = pipe(PROMPTS[0], latents=x[:1], **SIZE, **(RUN | dict(guidance=1.0, output="float"))).pixels
    assert error(plain, pixels) < 1e-4


def test_bfloat16_is_as_close_as_torch(parts, folders):
    packed, x = latents(2, 48, 80)
    half = PIPELINES["QwenImagePipeline"].from_pretrained(folders["QwenImagePipeline"], torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    given = dict(negative_prompt=NEGATIVE, **SIZE, **THEIRS)
    with torch.no_grad():
        exact = unpacked(made(PIPELINES["QwenImagePipeline"], parts)(PROMPTS, latents=packed, **given).images, 48, 80)
        torchs = unpacked(half(PROMPTS, latents=packed.bfloat16(), **given).images.float(), 48, 80)
    pipe = jdit.load(folders["QwenImagePipeline"], dtype="bfloat16")
    got = pipe(PROMPTS, negative_prompt=NEGATIVE, latents=x, **SIZE, **RUN).latents
    assert error(got, exact) <= 1.2 * error(torchs, exact)


def mode_and_noise(monkeypatch, module: str, x: torch.Tensor):
    """The reference draws noise and posterior sample from a generator: here its noise is ours, its sample the mode."""
    target = f"diffusers.pipelines.qwenimage.{module}"
    monkeypatch.setattr(f"{target}.randn_tensor", lambda *a, **k: x.clone())
    monkeypatch.setattr(f"{target}.retrieve_latents", lambda out, **k: out.latent_dist.mode())


def given_noise(count: int, height: int, width: int, seed: int = 0):
    """(as upstream draws it, channels last as we want it)."""
    x = latents(count, height, width, seed)[1]
    return torch.tensor(x).movedim(-1, 1)[:, None], x


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_image_to_image(parts, ours, monkeypatch, strength):
    theirs, (drawn, x) = made(diffusers.QwenImageImg2ImgPipeline, parts), given_noise(2, 48, 80)
    mode_and_noise(monkeypatch, "pipeline_qwenimage_img2img", drawn)
    with torch.no_grad():
        want = theirs(
            PROMPTS, negative_prompt=NEGATIVE, image=picture(61, 47), strength=strength, **SIZE, **THEIRS
        ).images
    got = ours("QwenImagePipeline")(
        PROMPTS, negative_prompt=NEGATIVE, image=picture(61, 47), strength=strength, latents=x, seed=None,
        two_passes=strength < 1, **SIZE, **RUN,
    )  # fmt: skip
    assert error(got.latents, unpacked(want, 48, 80)) < 1e-4


def mask(height: int, width: int) -> Image.Image:
    """A soft-edged blob, as a grey picture."""
    y, x = np.mgrid[:height, :width]
    blob = 255 * np.exp(-(((y / height - 0.4) / 0.3) ** 4) - ((x / width - 0.6) / 0.3) ** 4)
    return Image.fromarray(blob.astype(np.uint8))


def test_inpainting(parts, ours, monkeypatch):
    """And what is not to be generated is the picture's, latent pixel by latent pixel."""
    theirs, (drawn, x) = made(diffusers.QwenImageInpaintPipeline, parts), given_noise(2, 48, 80)
    mode_and_noise(monkeypatch, "pipeline_qwenimage_inpaint", drawn)
    given = dict(negative_prompt=NEGATIVE, image=picture(61, 47), strength=0.8)
    with torch.no_grad():
        want = unpacked(theirs(PROMPTS, mask_image=mask(70, 90), **given, **SIZE, **THEIRS).images, 48, 80)
    pipe = ours("QwenImagePipeline")
    got = pipe(PROMPTS, mask=mask(70, 90).convert("RGB"), latents=x, seed=None, **given, **SIZE, **RUN).latents
    assert error(got, want) < 1e-4
    nothing = pipe(PROMPTS, mask=np.zeros((4, 4, 3), np.uint8), latents=x, seed=None, **given, **SIZE, **RUN).latents
    kept = np.abs(np.asarray(got) - np.asarray(nothing)).max((0, -1)) < 1e-5
    assert 0.3 < kept.mean() < 0.9


def test_editing(parts, ours, small):
    """A wide picture; two prompts, which upstream takes one at a time."""
    theirs, (packed, x) = made(PIPELINES["QwenImageEditPipeline"], parts), latents(2, 64, 128)
    image, pipe = picture(50, 103), ours("QwenImageEditPipeline")
    assert pipe.parts.family == "qwen-image-edit"
    with torch.no_grad():
        want = [
            theirs(image, p, negative_prompt=n, latents=packed[i : i + 1], **THEIRS).images
            for i, (p, n) in enumerate(zip(PROMPTS, NEGATIVE))
        ]
    got = pipe(PROMPTS, negative_prompt=NEGATIVE, image=image, latents=x, **RUN)
    assert error(got.latents, unpacked(torch.cat(want), 64, 128)) < 1e-4
    encoded = pipe.encode(PROMPTS, negative_prompt=NEGATIVE, image=image)
    assert np.array_equal(pipe(encoded, image=image, latents=x, **RUN).latents, got.latents)


def test_editing_several(parts, ours, small):
    """Two pictures of unlike proportions, and a result of a third size; unless it is given, the last one's."""
    theirs = made(PIPELINES["QwenImageEditPlusPipeline"], parts)
    images, pipe = [picture(50, 103), picture(90, 60, 1)], ours("QwenImageEditPlusPipeline")
    assert pipe.parts.family == "qwen-image-edit-plus"
    assert pipe.run_size({"image": images}) == (128, 64)
    packed, x = latents(1, 48, 80)
    with torch.no_grad():
        want = theirs(images, PROMPTS[0], negative_prompt=NEGATIVE[1], latents=packed, **SIZE, **THEIRS).images
    got = pipe(PROMPTS[0], negative_prompt=NEGATIVE[1], image=images, latents=x, **SIZE, **RUN)
    assert error(got.latents, unpacked(want, 48, 80)) < 1e-4


def test_editing_a_part(parts, ours, small, monkeypatch):
    theirs, (drawn, x) = made(diffusers.QwenImageEditInpaintPipeline, parts), given_noise(1, 64, 128)
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint as upstream

    full = upstream.calculate_dimensions
    share = (SIDE / 1024) ** 2
    monkeypatch.setattr(upstream, "calculate_dimensions", lambda area, ratio: full(area * share, ratio))
    mode_and_noise(monkeypatch, "pipeline_qwenimage_edit_inpaint", drawn)
    given = dict(negative_prompt=NEGATIVE[1], image=picture(50, 103), strength=0.8)
    with torch.no_grad():
        want = theirs(prompt=PROMPTS[0], mask_image=mask(70, 90), **given, **THEIRS).images
    got = ours("QwenImageEditPipeline")(PROMPTS[0], mask=mask(70, 90).convert("RGB"), latents=x, **given, **RUN)
    assert error(got.latents, unpacked(want, 64, 128)) < 1e-4
