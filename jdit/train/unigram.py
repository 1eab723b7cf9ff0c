"""A small vocabulary in T5's and UMT5's form: Unigram pieces, <pad> 0, </s> 1, <unk> 2 (arXiv 1804.10959)."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from convert import tokenizers as tokenizer_files
from jdit.nn.text.tokenizer import Tokenizer

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)]
"""Characters that are in every vocabulary."""


def train_unigram(texts: Iterable[str], size: int, limit: int) -> Tokenizer:
    """A tokenizer with at most `size` pieces and `limit` tokens a text, the end token included."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=[PAD, END, UNKNOWN], unk_token=UNKNOWN, initial_alphabet=LETTERS,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, backend.token_to_id(END))]
    )
    return Tokenizer(backend, limit, backend.token_to_id(PAD))


def write_unigram(folder: Path, texts: Iterable[str], size: int, limit: int) -> Tokenizer:
    """Train, write in transformers' layout, read back."""
    tokenizer_files.export(train_unigram(texts, size, limit), folder)
    return tokenizer_files.load(folder)
