"""Text to token ids, on the host. Reading tokenizers from files is convert.tokenizers' work."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int

log = logging.getLogger("jdit")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with a limit and a padding token.

    Attributes:
        backend: its own padding and truncation are switched off here, so it must not be shared with other users.
        max_length: tokens of a padded row, special ones included; None where the checkpoint does not say.
        pad_id: what fills a row up, None where there is no such token.
        bos_id, eos_id: what `encode` puts before and after a text, None for nothing.
    """

    backend: tokenizers.Tokenizer
    max_length: int | None
    pad_id: int | None
    bos_id: int | None = dataclasses.field(init=False)
    eos_id: int | None = dataclasses.field(init=False)

    def __post_init__(self):
        self.backend.no_padding()
        self.backend.no_truncation()
        # only the post-processor knows what stands around a text, and its kinds differ: look at a probe
        probe = self.backend.encode("a")
        around = len(probe.ids) > self.backend.num_special_tokens_to_add(is_pair=False) > 0
        for name, end in (("bos_id", 0), ("eos_id", -1)):
            object.__setattr__(self, name, probe.ids[end] if around and probe.special_tokens_mask[end] else None)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> Int[np.ndarray, "B N"]:
        """Ids of each text with its special tokens, cut and padded to `max_length` (None: the tokenizer's own limit).

        A text that is too long loses its tail, never its end token, and the lost part is logged as a warning.

        Raises:
            ValueError: see `encode_with_lengths`.
        """
        return self.encode_with_lengths(texts, max_length)[0]

    def encode_with_lengths(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> tuple[Int[np.ndarray, "B N"], Int[np.ndarray, "B"]]:
        """`encode`, and how many ids of each row are not padding (a padding token that the text itself spells counts).

        Raises:
            ValueError: there is no limit, no padding token where one is needed, or a limit without room for a token.
        """
        n = self.max_length if max_length is None else max_length
        if n is None:
            raise ValueError("this tokenizer has no limit of its own: max_length is needed")
        room = n - self.backend.num_special_tokens_to_add(is_pair=False)
        if room < 1:
            raise ValueError(f"max_length={n} leaves no room for text between the special tokens")
        rows, lengths = np.empty((len(texts), n), np.int32), np.empty(len(texts), np.int32)
        bodies = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for i, (row, text, body) in enumerate(zip(rows, texts, bodies)):
            if len(body.ids) > room:
                lost = text[body.offsets[room][0] :]
                log.warning("the prompt has %d tokens, %d fit; this was cut off: %r", len(body.ids), room, lost)
                body.truncate(room)
            ids = self.backend.post_process(body).ids
            if len(ids) < n and self.pad_id is None:
                raise ValueError("this tokenizer has no padding token")
            row[: len(ids)] = ids
            row[len(ids) :] = self.pad_id or 0
            lengths[i] = len(ids)
        return rows, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens, as far as the vocabulary can give it back."""
        return self.backend.decode([int(i) for i in ids])
