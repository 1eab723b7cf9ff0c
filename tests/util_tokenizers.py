"""Small tokenizers in the forms that checkpoints have, for tests that need no package."""

import io
import json
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = [
    "c a",
    "ca t</w>",
    "d o",
    "do g</w>",
    "t h",
    "th e</w>",
    "i n",
    "in g</w>",
    "p h",
    "o t",
    "ph ot",
    "phot o</w>",
]


def clip_folder(folder: Path, *, pad=EOS, limit=11, config=True) -> Path:
    """A small CLIP tokenizer as the hub has them: vocab.json and merges.txt, no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    bos = {"content": BOS, "normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    special = {"bos_token": bos, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    if config:
        settings = {"model_max_length": limit, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def t5_folder(folder: Path, limit=12) -> Path:
    """A small T5 tokenizer, spiece.model only, trained by sentencepiece itself."""
    spm = pytest.importorskip("sentencepiece", reason="trains the T5 tokenizer of this test")
    model = io.BytesIO()
    text = ["the cat and the dog", "a photo of a cat surfing", "two dogs, one photo", "naïve cats' 1/2 fish"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=70, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, user_defined_symbols=["<hi>"], minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": limit, "tokenizer_class": "T5Tokenizer"})
    )
    return folder
