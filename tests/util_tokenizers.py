"""Small tokenizers in the forms that checkpoints have, for tests that need no package."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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


LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>",
]  # fmt: skip


def llama3_folder(folder: Path, text: str, *, begin: bool = True, pad: bool = True, more: Sequence[str] = ()) -> Path:
    """A small tokenizer of Llama 3's kind, tokenizer.json: it splits as that does and has the words of `text` whole.

    Args:
        begin: it puts <|begin_of_text|> before a text by itself.
        more: further special tokens.
    """
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*LLAMA_SPECIAL, *more)])
    first = LLAMA_SPECIAL[0]
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, backend.token_to_id(first))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": first, "eos_token": LLAMA_SPECIAL[1],
        "padding_side": "right", **({"pad_token": LLAMA_SPECIAL[-1]} if pad else {}),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
