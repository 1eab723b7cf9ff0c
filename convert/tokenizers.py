"""Tokenizers from the files of a checkpoint, and back.

Three forms are read: tokenizer.json; vocab.json with merges.txt (CLIP, Qwen2); spiece.model (T5). The ids are those of
transformers' CLIPTokenizer, Qwen2Tokenizer and T5TokenizerFast. No package but `tokenizers` is needed.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jdit.atomic import write_file
from jdit.nn.text.tokenizer import Tokenizer

FORMS = "tokenizer.json, or vocab.json with merges.txt, or spiece.model"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
CLIP_NAMED = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
T5_NAMED = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
QWEN2_NAMED = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
NAMED_OF = {
    **dict.fromkeys(CLIP_CLASSES, CLIP_NAMED),
    **dict.fromkeys(("T5Tokenizer", "T5TokenizerFast"), T5_NAMED),
    **dict.fromkeys(QWEN2_CLASSES, QWEN2_NAMED),
}
"""The special tokens that upstream's classes have where a config names none."""
UNLIMITED = 10**9
"""Limits above this are transformers' way to say that there is none."""

CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What a word is: simple_tokenizer.py of OpenAI's CLIP."""


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The same of transformers' models/qwen2/tokenization_qwen2.py."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be read; the message names the folder or the file."""


def load(folder: str | Path) -> Tokenizer:
    """Read a tokenizer from a folder in any of the three forms, tokenizer.json first.

    Limit, padding and special tokens come from tokenizer_config.json and special_tokens_map.json; in a folder that
    `save` wrote they are in tokenizer.json itself.

    Raises:
        TokenizerError: nothing to read, a file that is broken, or a vocabulary that lacks a token which is needed.
    """
    folder = Path(folder)
    config: dict[str, Any] = _config(folder)
    if (folder / "tokenizer.json").is_file():
        config = {**NAMED_OF.get(config.get("tokenizer_class", ""), {}), **config}
        backend = _parse(folder / "tokenizer.json", lambda f: Backend.from_file(str(f)))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        kind = config.get("tokenizer_class", CLIP_CLASSES[0])
        if kind not in (*CLIP_CLASSES, *QWEN2_CLASSES):
            raise TokenizerError(
                f"{folder}: vocab.json with merges.txt is read for CLIPTokenizer and Qwen2Tokenizer, not for {kind!r}"
            )
        config = {**NAMED_OF[kind], **config}
        backend = _clip(folder, config) if kind in CLIP_CLASSES else _qwen2(folder)
    elif (folder / "spiece.model").is_file():
        config = {**T5_NAMED, **config}
        backend = _t5(folder / "spiece.model", config)
    else:
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise TokenizerError(f"{folder}: no tokenizer; looked for {FORMS}; found {there}")
    recorded, limit = backend.padding, (backend.truncation or {}).get("max_length")
    _add_specials(backend, config, folder)
    pad_id = recorded["pad_id"] if recorded else None
    if pad := _content(config.get("pad_token")):
        pad_id = backend.token_to_id(pad)
    if said := config.get("model_max_length"):
        limit = int(said) if said < UNLIMITED else None
    return Tokenizer(backend, limit, pad_id)


def dumps(tokenizer: Tokenizer) -> str:
    """The content of a tokenizer.json, padding and limit recorded in it."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    if tokenizer.max_length is not None:
        backend.enable_truncation(tokenizer.max_length)
    if tokenizer.pad_id is not None:
        pad = backend.id_to_token(tokenizer.pad_id)
        backend.enable_padding(pad_id=tokenizer.pad_id, pad_token=pad, length=tokenizer.max_length)
    return backend.to_str(pretty=True)


def save(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Write `folder/tokenizer.json`, padding and limit recorded in it, whole or not at all.

    Returns:
        the file's path.
    """
    return _write(Path(folder) / "tokenizer.json", dumps(tokenizer))


def export(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write what transformers reads: tokenizer.json, tokenizer_config.json, and vocab.json with merges.txt for CLIP and
    Qwen2."""
    folder = Path(folder)
    backend = tokenizer.backend
    model = json.loads(backend.to_str())["model"]
    name = lambda i: None if i is None else backend.id_to_token(i)
    config = {
        "model_max_length": tokenizer.max_length,
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(tokenizer.eos_id),
        "pad_token": name(tokenizer.pad_id),
        "unk_token": model.get("unk_token"),
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if model["type"] == "Unigram":
        config["unk_token"] = None if model["unk_id"] is None else name(model["unk_id"])
        config["tokenizer_class"] = "T5Tokenizer"
        config["extra_ids"] = sum(token.startswith("<extra_id_") for token in backend.get_vocab())
    elif model.get("end_of_word_suffix") == "</w>":
        config["tokenizer_class"] = CLIP_CLASSES[0]
    elif QWEN2_WORDS in _patterns(backend):
        config["tokenizer_class"] = QWEN2_CLASSES[0]
    if config["tokenizer_class"] in (CLIP_CLASSES[0], QWEN2_CLASSES[0]):
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        _write(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
        _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(folder / "tokenizer.json", backend.to_str(pretty=True))
    config = {k: v for k, v in config.items() if v is not None}
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text)
    return file


def _parse(file: Path, read):
    """read(file), any failure told as one of this file. `tokenizers` raises plain Exception."""
    try:
        return read(file)
    except OSError:
        raise
    except Exception as e:
        raise TokenizerError(
            f"{file}: cannot be read, it is damaged or of another kind: {e or type(e).__name__}"
        ) from e


def _json(file: Path) -> dict:
    def read(file: Path) -> dict:
        if not isinstance(content := json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError(f"a {type(content).__name__} where an object is wanted")
        return content

    return _parse(file, read)


def _config(folder: Path) -> dict:
    """tokenizer_config.json, with the older special_tokens_map.json and added_tokens.json where it lists no tokens."""
    config: dict = {}
    if (folder / "tokenizer_config.json").is_file():
        config = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    if (folder / "special_tokens_map.json").is_file():
        config |= _json(folder / "special_tokens_map.json")
    if (folder / "added_tokens.json").is_file():
        named = {_content(config.get(k)) for k in NAMED}
        config["added_tokens_decoder"] = {
            i: {"content": token, "special": token in named, "normalized": token not in named}
            for token, i in _json(folder / "added_tokens.json").items()
        }
    return config


def _content(token: str | Mapping | None) -> Any:
    """The text of a special token, which a config gives as a string, as a table with flags, or not at all."""
    return token["content"] if isinstance(token, Mapping) else token


def _added(token: str | Mapping, *, special: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    return AddedToken(token["content"], special=special, **{k: token[k] for k in FLAGS if k in token})


def _add_specials(backend: Backend, config: Mapping, folder: Path) -> None:
    """Make the config's special tokens special, with its flags; the ids that it declares must come out."""
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    declared = sorted((int(i), t) for i, t in config.get("added_tokens_decoder", {}).items())
    for i, token in declared:
        if token["content"] not in known:
            backend.add_tokens([_added(token, special=token.get("special", False))])
            known.add(token["content"])
        if (got := backend.token_to_id(token["content"])) != i:
            raise TokenizerError(f"{folder}: tokenizer_config.json gives {token['content']!r} id {i}, it is {got}")
    more = config.get("additional_special_tokens") or []
    for token in [*(config[k] for k in NAMED if config.get(k)), *more]:
        if _content(token) not in known:
            backend.add_tokens([_added(token, special=True)])
            known.add(_content(token))


def _bpe(merges: Path, tokens: dict, **options: Any) -> models.BPE:
    """Byte pairs in the order of merges.txt.

    Raises:
        ValueError: a line that is no pair.
    """
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version") :] if line]
    if odd := [p for p in pairs if len(p) != 2]:
        raise ValueError(f"{odd[0]} is not a pair")
    return models.BPE(tokens, pairs, continuing_subword_prefix="", fuse_unk=False, **options)


def _patterns(backend: Backend) -> list[str]:
    """The regular expressions that a tokenizer splits words by."""
    steps = json.loads(backend.to_str())["pre_tokenizer"] or {}
    return [s["pattern"].get("Regex", "") for s in steps.get("pretokenizers", [steps]) if "pattern" in s]


def _qwen2(folder: Path) -> Backend:
    """Byte-level BPE without marks at the ends of words; nothing stands around a text."""
    tokens = _json(folder / "vocab.json")
    backend = Backend(_parse(folder / "merges.txt", lambda f: _bpe(f, tokens, end_of_word_suffix="")))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _clip(folder: Path, config: Mapping) -> Backend:
    """Byte-level BPE with `</w>` at the ends of words, lower case, one space for any white space."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    tokens = _json(vocab)
    unk, bos, eos = (_content(config[k]) for k in ("unk_token", "bos_token", "eos_token"))
    if missing := [t for t in (bos, eos) if t not in tokens]:
        raise TokenizerError(f"{vocab}: lacks {missing}")

    backend = Backend(_parse(merges, lambda f: _bpe(f, tokens, unk_token=unk, end_of_word_suffix="</w>")))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (eos, tokens[eos]), (bos, tokens[bos]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def _t5(file: Path, config: Mapping) -> Backend:
    """Unigram with sentencepiece's own normaliser, `</s>` after the text, sentinels <extra_id_n> at the end."""
    pieces, unk_id, charsmap = _parse(file, _sentencepiece)
    vocab = [(piece, score) for piece, score, _ in pieces]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(config.get("extra_ids", 100)))]
    backend = Backend(_parse(file, lambda _: models.Unigram(vocab, unk_id=unk_id, byte_fallback=False)))
    steps = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    if charsmap:
        steps.insert(0, _parse(file, lambda _: normalizers.Precompiled(charsmap)))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    control, user = 3, 4
    marked = [(p, kind) for p, _, kind in pieces if kind in (control, user)]
    backend.add_tokens([AddedToken(p, special=kind == control, normalized=False) for p, kind in marked])
    backend.add_special_tokens([token for token, _ in vocab[len(pieces) :]])
    eos = _content(config["eos_token"])
    if backend.token_to_id(eos) is None:
        raise TokenizerError(f"{file}: lacks the end token {eos!r}")
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
    )
    return backend


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: ints for varints, bytes for the rest."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value, at

    at = 0
    while at < len(data):
        tag, at = varint(at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(at)
        elif kind in (1, 2, 5):
            size, at = varint(at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at > len(data):
            raise ValueError(f"ends inside field {tag >> 3}")
        yield tag >> 3, value


def _sentencepiece(file: Path) -> tuple[list[tuple[str, float, int]], int, bytes]:
    """Pieces (text, score, type), the unknown id and the normaliser's character map of a sentencepiece model.

    Field numbers of sentencepiece_model.proto: ModelProto pieces 1, trainer_spec 2, normalizer_spec 3; SentencePiece
    piece 1, score 2, type 3; TrainerSpec model_type 3 (1 is Unigram), unk_id 40; NormalizerSpec precompiled_charsmap 2.
    """
    pieces, trainer, charsmap = [], {}, b""
    for number, value in _fields(file.read_bytes()):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0, piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    if not pieces or trainer.get(3, 1) != 1:
        raise ValueError(f"{len(pieces)} pieces, model type {trainer.get(3, 1)}; a Unigram model (type 1) is wanted")
    return pieces, trainer.get(40, 0), charsmap
