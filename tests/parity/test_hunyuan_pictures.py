"""Prompts of HunyuanVideo's image to video against its pipeline: tokens, states that the transformer sees, masks."""

import logging

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import util_hunyuan_pictures as util  # noqa: E402
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as theirs  # noqa: E402
from util_text import error  # noqa: E402

from jdit.pipeline import hunyuan_pictures as ours  # noqa: E402
from jdit.preprocess import ImageProcessor  # noqa: E402

pytestmark = pytest.mark.torch

TEXTS = ["A cat surfs at dusk, 猫.", "\n\nhello\n"]
MAX = 64


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """(upstream's pipeline with text encoder and tokenizer alone, our encoder, our tokenizer)."""
    return util.encoder(tmp_path_factory.mktemp("encoder"))


encode = jax.jit(ours.encode)


def test_template_is_upstreams():
    known, template = theirs.DEFAULT_PROMPT_TEMPLATE, ours.TEMPLATE
    picture = (template.picture or ("", ""))[0] + template.token + (template.picture or ("", ""))[1]
    assert template.head + picture + "{}" + template.tail == known["template"]
    assert template.drop == known["crop_start"] - 1 + known["image_emb_len"]


@pytest.mark.parametrize("every", [2, 4])
def test_states_and_masks_are_upstreams(encoder, every):
    """Unequal prompts, a picture for each."""
    pipe, llava, tokenizer = encoder
    pictures = util.pictures(2)
    want, mask = pipe._get_llama_prompt_embeds(
        pictures, TEXTS, util.TEMPLATE, device="cpu", max_sequence_length=MAX,
        image_embed_interleave=every,
    )  # fmt: skip
    pixels = ImageProcessor.from_config(pipe.image_processor.to_dict())(pictures)
    ids = ours.prompt_ids(tokenizer, TEXTS, [every] * 2, llava.cfg.tokens, MAX)
    got = encode(llava, ids.tokens, ids.seen, pixels, np.arange(2))
    assert got.shape == want.shape and ids.lengths.tolist() == mask.sum(1).tolist()
    assert len(set(ids.lengths)) == 2
    for a, b, n in zip(got, want, ids.lengths):
        assert error(a[:n], b[:n]) < 1e-5


def test_one_picture_for_all_and_unequal_shares(encoder):
    """A negative prompt sees half of a black picture's tokens, whatever the others see."""
    pipe, llava, tokenizer = encoder
    black = util.black()
    pictures = [black, *util.pictures(1)]
    pixels = ImageProcessor.from_config(pipe.image_processor.to_dict())(pictures)
    ids = ours.prompt_ids(tokenizer, ["", *TEXTS], [2, 4, 4], llava.cfg.tokens, MAX)
    got = encode(llava, ids.tokens, ids.seen, pixels, np.array([0, 1, 1]))
    for row, (picture, text, every) in enumerate(zip([pictures[i] for i in (0, 1, 1)], ["", *TEXTS], (2, 4, 4))):
        want, mask = pipe._get_llama_prompt_embeds(
            picture, text, util.TEMPLATE, device="cpu", max_sequence_length=MAX,
            image_embed_interleave=every,
        )  # fmt: skip
        n = int(mask.sum())
        assert ids.lengths[row] == n and error(got[row, :n], want[0, :n]) < 1e-5


def test_long_text_is_cut_and_the_template_is_not(encoder, caplog):
    """As upstream sees a text that just fits."""
    pipe, llava, tokenizer = encoder
    encoded = lambda text: tokenizer.backend.encode(text, add_special_tokens=False)
    tail, text = len(encoded(ours.TEMPLATE.tail).ids), "word " * 50
    assert tail == ours.CUT + 1
    with caplog.at_level(logging.WARNING, "jdit"):
        long = ours.prompt_ids(tokenizer, [text + "end"], [2], llava.cfg.tokens, MAX)
    assert f"{MAX - tail} fit" in caplog.text and "end" in caplog.text
    fits = text[: encoded(text).offsets[MAX - tail - 1][1]]
    short = ours.prompt_ids(tokenizer, [fits], [2], llava.cfg.tokens, MAX)
    for a, b in zip(long, short):
        assert np.array_equal(a, b)
    picture = util.pictures(1)
    want, mask = pipe._get_llama_prompt_embeds(picture, fits, util.TEMPLATE, device="cpu", max_sequence_length=MAX)
    assert mask.all() and short.lengths[0] == mask.shape[1] == short.seen.shape[1]
    pixels = ImageProcessor.from_config(pipe.image_processor.to_dict())(picture)
    assert error(encode(llava, short.tokens, short.seen, pixels, np.zeros(1, int)), want) < 1e-5


def test_refusals(encoder):
    _, llava, tokenizer = encoder
    with pytest.raises(ValueError, match="a prompt has 10 picture tokens, its picture makes 9: 'an <image> here'"):
        ours.prompt_ids(tokenizer, ["an <image> here"], [2], llava.cfg.tokens, MAX)
    with pytest.raises(ValueError, match="leaves no room for text"):
        ours.prompt_ids(tokenizer, ["a"], [2], llava.cfg.tokens, 5)
