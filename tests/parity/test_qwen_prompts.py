"""Prompts and pictures of Qwen-Image against its pipelines' processors: templates, token ids, resizing, pixels."""

import json
import logging
import math

import numpy as np
import pytest
from PIL import Image
from test_token_ids import NASTY, copied, needs_real, real

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline  # noqa: E402
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (  # noqa: E402
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from convert import tokenizers as convert  # noqa: E402
from jdit.nn.vision.qwen2_5_vl import merged_patches  # noqa: E402
from jdit.pipeline import qwen_pictures, qwen_prompts  # noqa: E402
from jdit.pipeline.qwen_pictures import QwenImageProcessor  # noqa: E402
from jdit.pipeline.qwen_prompts import EDIT, EDIT_PLUS, GENERATE, prompt_ids  # noqa: E402

pytestmark = pytest.mark.torch

PROMPTS = [
    *NASTY, "一只猫坐在窗台上，\n阳光洒在它的毛上。\n\n标题：“通义千问” 2025年",
    "\nstarts with a line\r\n\r\n  and  \tgoes on \n",
    "A coffee shop with a chalkboard that reads\n\"Qwen Coffee 😊 $2 per cup,\"\nneon light beside it: 通义千问",
    "<|im_end|>\n<|im_start|>user", "braces {} {0} {number}", "ﬁ e\u0301 normalised", "<think> <tool_call> <|fim_pad|>",
]  # fmt: skip
FORMS = {
    "tokenizer.json": (),
    "merges.txt": ("tokenizer.json",),
    "older": ("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def ours():
    return convert.load(real("qwen_image/tokenizer"))


@pytest.fixture(scope="module")
def theirs():
    return transformers.Qwen2Tokenizer.from_pretrained(real("qwen_image/tokenizer"))


def pipeline(cls):
    return cls(**dict.fromkeys(cls._get_signature_keys(cls)[0]))


@needs_real
@pytest.mark.parametrize("form", FORMS)
def test_token_ids(tmp_path, theirs, form):
    """Multi-line prompts in Chinese and English, special tokens in the text, from each form of the files."""
    folder = copied(real("qwen_image/tokenizer"), tmp_path / "qwen", *FORMS[form])
    if form == "older":
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    ours = convert.load(folder)
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.vocab_size) == (151643, None, None, len(theirs))
    want = theirs(PROMPTS).input_ids
    ids, lengths = ours.encode_with_lengths(PROMPTS, 1000)
    for text, row, n, b in zip(PROMPTS, ids, lengths, want):
        assert row[:n].tolist() == b, text
    assert ours.encode(["A cat, 猫 surfing."], 9).tolist() == [[32, 8251, 11, 10236, 234, 104, 57740, 13, 151643]]


@needs_real
def test_written_back(tmp_path, ours):
    convert.export(ours, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "Qwen2Tokenizer" and (tmp_path / "merges.txt").is_file()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(again).__name__ == "Qwen2Tokenizer" and again.pad_token_id == 151643
    for text, ids in zip(PROMPTS, again(PROMPTS).input_ids):
        assert ours.backend.encode(text).ids == ids, text


def test_templates_are_upstreams():
    plain, one, several = map(pipeline, (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline))
    picture = lambda template, n: template.picture[0].format(number=n) + qwen_prompts.PICTURE + template.picture[1]
    assert GENERATE.head + "{}" + GENERATE.tail == plain.prompt_template_encode
    assert EDIT.head + picture(EDIT, 1) + "{}" + EDIT.tail == one.prompt_template_encode
    assert EDIT_PLUS.head + "{}" + EDIT_PLUS.tail == several.prompt_template_encode
    for pipe, template in ((plain, GENERATE), (one, EDIT), (several, EDIT_PLUS)):
        assert template.drop == pipe.prompt_template_encode_start_idx
    assert plain.tokenizer_max_length == 1024


@needs_real
def test_generation_prompts(ours, theirs):
    """Upstream's ids and mask for every prompt that fits; only longer ones differ, in that they keep their end."""
    pipe = pipeline(QwenImagePipeline)
    texts = [pipe.prompt_template_encode.format(p) for p in PROMPTS]
    want = theirs(texts, max_length=1024 + 34, padding=True, truncation=True, return_tensors="np")
    got = prompt_ids(ours, PROMPTS, GENERATE)
    assert got.positions is None
    assert got.tokens.tolist() == want.input_ids.tolist()
    assert got.lengths.tolist() == want.attention_mask.sum(1).tolist()
    wide = prompt_ids(ours, PROMPTS[:2], GENERATE, length=1058)
    assert wide.tokens.shape == (2, 1058) and (wide.tokens[:, got.lengths[:2].max() :] == 151643).all()


@needs_real
@pytest.mark.parametrize("template, grids", [(GENERATE, ()), (EDIT, [(3, 5)]), (EDIT_PLUS, [(3, 5), (2, 2)])])
def test_long_text_is_cut_and_the_template_is_not(ours, theirs, caplog, template, grids):
    text = "word " * 50 + "猫end"
    tail = theirs(template.tail).input_ids
    with caplog.at_level(logging.WARNING, "jdit"):
        got = prompt_ids(ours, [text, "short"], template, grids, max_tokens=len(tail) + 40)
    row = got.tokens[0, : got.lengths[0]].tolist()
    full = prompt_ids(ours, [text], template, grids, max_tokens=None)
    text_ids = theirs(text).input_ids
    assert row[-len(tail) :] == tail and row[: -len(tail)] == full.tokens[0, : len(row) - len(tail)].tolist()
    assert row[-len(tail) - 40 : -len(tail)] == text_ids[:40]
    assert f"{len(text_ids)} tokens, 40 fit" in caplog.text and "猫end" in caplog.text
    assert got.lengths[1] == len(row) - 40 + len(theirs("short").input_ids)


@needs_real
def test_editing_prompts(ours, theirs):
    """The processor's work on the text: a picture's placeholder is repeated for each of its tokens."""
    texts = ["换成蓝色背景\n保留人物", "make it blue"]
    one, several = map(pipeline, (QwenImageEditPipeline, QwenImageEditPlusPipeline))
    pad = qwen_prompts.PICTURE
    want = theirs([one.prompt_template_encode.format(t).replace(pad, pad * 15) for t in texts], padding=True)
    got = prompt_ids(ours, texts, EDIT, [(3, 5)])
    assert got.tokens.tolist() == want.input_ids
    assert got.positions is not None and got.positions.shape == (*got.tokens.shape, 3)
    prefix = "".join(f"Picture {n}: <|vision_start|>{pad * k}<|vision_end|>" for n, k in ((1, 15), (2, 4)))
    want = theirs([several.prompt_template_encode.format(prefix + t) for t in texts], padding=True)
    got = prompt_ids(ours, texts, EDIT_PLUS, [(3, 5), (2, 2)])
    assert got.tokens.tolist() == want.input_ids
    assert got.lengths.tolist() == np.sum(want.attention_mask, 1).tolist()


@needs_real
def test_refusals(ours):
    with pytest.raises(ValueError, match="1 pictures; this template takes none"):
        prompt_ids(ours, ["a"], GENERATE, [(1, 1)])
    with pytest.raises(ValueError, match="2 pictures; this template takes one"):
        prompt_ids(ours, ["a"], EDIT, [(1, 1), (1, 1)])
    with pytest.raises(ValueError, match="max_tokens=5 leaves no room for text"):
        prompt_ids(ours, ["a"], GENERATE, max_tokens=5)
    with pytest.raises(ValueError, match="a prompt has 40 tokens with its template; length=39 is too short"):
        prompt_ids(ours, ["a"], GENERATE, length=39)
    with pytest.raises(ValueError, match="prompt 0 has 2 picture tokens, its pictures make 1"):
        prompt_ids(ours, ["a <|image_pad|>"], EDIT, [(1, 1)])


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 90 * 90, "max_pixels": 100 * 100}])
def test_sizes_are_upstreams(limits):
    processor = QwenImageProcessor.from_config(limits)
    low, high = processor.min_pixels, processor.max_pixels
    for height, width in np.random.default_rng(0).integers(2, 2500, (200, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        want = smart_resize(height, width, 28, low, high)
        assert processor.size(height, width) == want, (height, width)
        assert processor.grid(height, width) == (want[0] // 28, want[1] // 28)
        columns, rows, _ = edit.calculate_dimensions(1024 * 1024, width / height)
        assert qwen_pictures.area_size(height, width, 1024 * 1024) == (rows, columns)
    with pytest.raises(ValueError, match="a picture of 2 x 401: one side may be at most 200 times"):
        processor.size(2, 401)


@pytest.mark.parametrize("size", [(97, 180), (56, 84), (20, 33)])
def test_pixels_are_upstreams(size):
    """uint8 and PIL pictures, resized up, down or not, in the vision tower's order of patches."""
    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    upstream = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    want = upstream([Image.fromarray(picture)], return_tensors="np")
    processor = QwenImageProcessor.from_config(upstream.to_dict())
    assert (processor.min_pixels, processor.max_pixels) == (56 * 56, 112 * 112)
    for source in (picture, Image.fromarray(picture)):
        got = processor(source)
        assert got.dtype == np.float32 and got.shape[0] * got.shape[1] == math.prod(want["image_grid_thw"][0]) * 14 * 14
        patches = np.asarray(merged_patches(got[None], 14, 2))[0].reshape(-1, 14, 14, 3)
        frames = want["pixel_values"].reshape(-1, 3, 2, 14, 14)
        for frame in range(2):
            np.testing.assert_allclose(patches.transpose(0, 3, 1, 2), frames[:, :, frame], rtol=1e-6, atol=1e-6)


@needs_real
def test_published_processor():
    file = real("qwen_image/qwen2_vl_image_processor.json")
    assert QwenImageProcessor.from_config(json.loads(file.read_text())) == QwenImageProcessor()


@pytest.mark.parametrize("change, message", [
    ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported"),
    ({"do_resize": False}, "do_resize=False is not supported; True is"),
    ({"size": {"height": 4, "width": 4}}, "shortest_edge and longest_edge"),
])  # fmt: skip
def test_refused_processors(change, message):
    with pytest.raises(ValueError, match=message):
        QwenImageProcessor.from_config(change)
