"""HunyuanVideo's prompts against its pipeline: template, token ids, masks; what is cut off of a prompt that is too
long."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from test_token_ids import NASTY
from util_hunyuan_pipeline import llama_tokenizer

from convert import tokenizers
from jdit.pipeline.hunyuan_prompts import SKIP, VIDEO
from jdit.pipeline.templates import template_ids

pytestmark = pytest.mark.torch

PROMPTS = [
    *(text for text in NASTY if len(text) < 200), "a cat", "\nstarts with a line\n\n", "ends with one\n", "{} {0} {p}",
    "<|eot_id|> <|begin_of_text|> <|start_header_id|>", "一只猫",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """(upstream's tokenizer, ours)."""
    folder = tmp_path_factory.mktemp("llama")
    return llama_tokenizer(folder), tokenizers.load(folder)


class Heard(torch.nn.Module):
    """A language model that keeps what it is given."""

    dtype = torch.float32

    def forward(self, input_ids, attention_mask, output_hidden_states):
        self.given = input_ids.numpy(), attention_mask.numpy()
        states = torch.nn.functional.one_hot(torch.arange(5))[:, None, None].float()
        return type("Out", (), {"hidden_states": states.expand(5, *input_ids.shape, 5)})


def upstream(tokenizer, texts, **how):
    """(ids, mask, states, their mask) in its pipeline."""
    parts = dict.fromkeys(HunyuanVideoPipeline._get_signature_keys(HunyuanVideoPipeline)[0])
    pipe = HunyuanVideoPipeline(**(parts | dict(tokenizer=tokenizer, text_encoder=Heard())))
    states, mask = pipe._get_llama_prompt_embeds(texts, DEFAULT_PROMPT_TEMPLATE, device=torch.device("cpu"), **how)
    return *pipe.text_encoder.given, states.numpy(), mask.numpy()


def test_template_is_upstreams(tokens):
    assert VIDEO.head + "{}" + VIDEO.tail == DEFAULT_PROMPT_TEMPLATE["template"]
    assert VIDEO.drop == DEFAULT_PROMPT_TEMPLATE["crop_start"] == len(tokens[0](VIDEO.head).input_ids)


def test_prompts_that_fit(tokens):
    theirs, ours = tokens
    ids, mask, states, cut = upstream(theirs, PROMPTS)
    got = template_ids(ours, PROMPTS, VIDEO, max_tokens=256, multiple=256)
    assert got.tokens.shape == ids.shape == (len(PROMPTS), 95 + 256)
    for text, row, n, a, b in zip(PROMPTS, got.tokens, got.lengths, ids, mask):
        assert (row[:n].tolist(), n) == (a[: b.sum()].tolist(), b.sum()), text
        assert (np.cumsum(b[::-1])[::-1] > 0).sum() == n, text  # padding is last
    assert states.shape[1] == 256 and (cut.sum(1) == got.lengths - VIDEO.drop).all()
    assert states[0, 0].argmax() == 5 - 1 - SKIP


@pytest.mark.parametrize("most", [256, 9])
def test_long_text_is_cut_and_the_template_is_not(tokens, caplog, most):
    """Upstream's ids up to the last one, which upstream gives to the text."""
    theirs, ours = tokens
    text = "cat " * 300 + "end"
    want = upstream(theirs, [text, "a cat"], max_sequence_length=most)[0]
    with caplog.at_level(logging.WARNING, "jdit"):
        got = template_ids(ours, [text, "a cat"], VIDEO, max_tokens=most, multiple=most)
    assert got.tokens.shape == want.shape and got.lengths[0] == VIDEO.drop + most
    assert got.tokens[0, :-1].tolist() == want[0, :-1].tolist() and got.tokens[1].tolist() == want[1].tolist()
    eot = ours.backend.token_to_id(VIDEO.tail)
    assert got.tokens[0, -1] == eot and want[0, -1] != eot
    assert f", {most - 1} fit; this was cut off" in caplog.text and "end" in caplog.text


def test_a_tokenizer_that_does_not_begin_a_text(tokens, tmp_path):
    """Upstream's class makes it do so."""
    llama_tokenizer(tmp_path, begin=False)
    other = tokenizers.load(tmp_path)
    assert other.bos_id is None and tokens[1].bos_id is not None
    a, b = (template_ids(t, PROMPTS, VIDEO, max_tokens=256) for t in (other, tokens[1]))
    assert np.array_equal(a.tokens, b.tokens)


def test_refusals(tokens, tmp_path):
    ours = tokens[1]
    with pytest.raises(ValueError, match="max_tokens=1 leaves no room for text before the 1 tokens of the template"):
        template_ids(ours, ["a"], VIDEO, max_tokens=1)
    with pytest.raises(ValueError, match=r"this tokenizer has no token <\|begin\|>, which the template begins with"):
        template_ids(ours, ["a"], dataclasses.replace(VIDEO, begin="<|begin|>"), max_tokens=9)
    llama_tokenizer(tmp_path, pad=False)
    with pytest.raises(ValueError, match="this tokenizer has no padding token"):
        template_ids(tokenizers.load(tmp_path), ["a", "a cat"], VIDEO, max_tokens=9)
