"""Training the two CLIP text encoders against pictures, contrastively (arXiv 2103.00020), and their vocabulary.

The picture tower is a small convolutional network that is thrown away afterwards.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jaxtyping import Array, Float, Int
from tokenizers import models, pre_tokenizers, trainers

from convert import tokenizers as tokenizer_files
from jdit.nn.layers import conv, linear
from jdit.nn.text.clip import CLIPTextConfig
from jdit.nn.text.tokenizer import Tokenizer
from jdit.sharding import Rules, assemble, dotted, leaves, shard
from jdit.train import data as data_folder
from jdit.train import examples as ex
from jdit.train.config import Config
from jdit.train.nets import Net, Weights, everywhere

log = logging.getLogger("jdit")

START, END = "<|startoftext|>", "<|endoftext|>"
ENCODERS = ("text_encoder", "text_encoder_2")
MODEL = {
    "vocab_size": 1536, "max_length": 24, "width": 128, "layers": 2, "heads": 2, "mlp": 512, "projection": 128,
    "tower": 64,
}  # fmt: skip
"""[model] and its defaults. Both encoders have this shape; they differ in activation and padding, as upstream's do.
tower: width of the picture tower's first level."""


def train_vocabulary(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary in CLIP's form: bytes, bytes at the end of a word, merges, the two special tokens.

    Returns:
        token -> id, and the merges in order.
    """
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(tokenizers.Regex(tokenizer_files.CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = _byte_order()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    split_up = (m.split(" ") if isinstance(m, str) else m for m in merges)
    pairs: list[tuple[str, str]] = [(a, b) for a, b in split_up]
    vocabulary = [*alphabet, *(c + "</w>" for c in alphabet)]
    pairs = pairs[: size - 2 - len(vocabulary)]
    vocabulary += [a + b for a, b in pairs]
    vocabulary += [START, END]
    return {token: i for i, token in enumerate(vocabulary)}, pairs


def _byte_order() -> list[str]:
    """The 256 byte characters in the order of OpenAI's table: printable ones first, so that "!" is 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], pad: str, limit: int
) -> None:
    """A tokenizer folder that transformers' CLIPTokenizer loads."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": limit, **named}
    dump = lambda value: json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(m) for m in merges), ""]), encoding="utf-8"
    )
    (folder / "special_tokens_map.json").write_text(dump(named), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(dump(config), encoding="utf-8")
    tokenizer_files.export(tokenizer_files.load(folder), folder)


def write_tokenizers(folder: Path, texts: Iterable[str], size: int, limit: int) -> tuple[Tokenizer, Tokenizer]:
    """`tokenizer` (CLIP-L's, padded with the end token) and `tokenizer_2` (CLIP-G's, padded with "!")."""
    vocabulary, merges = train_vocabulary(texts, size)
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        write_tokenizer(folder / name, vocabulary, merges, pad, limit)
    return tokenizer_files.load(folder / "tokenizer"), tokenizer_files.load(folder / "tokenizer_2")


class Tower(nnx.Module):
    """A picture to two embeddings: strided convolutions, mean, one projection an encoder."""

    def __init__(self, width: int, projection: int, dtype: str, *, rngs: nnx.Rngs):
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.convs = nnx.List(
            [conv(a, b, 3, stride=2, dtype=dtype, rngs=rngs) for a, b in zip([3, *widths[:-1]], widths)]
        )
        self.mixes = nnx.List([conv(w, w, 3, dtype=dtype, rngs=rngs) for w in widths])
        self.out = linear(4 * 4 * widths[-1], 2 * projection, (None, None), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B 2*P"]:
        for down, mix in zip(self.convs, self.mixes):
            x = nnx.gelu(down(x))
            x = x + nnx.gelu(mix(x))
        b, s, _, c = x.shape
        cells = x.reshape(b, 4, s // 4, 4, s // 4, c).mean((2, 4)) if s >= 4 else jnp.repeat(x.mean((1, 2)), 16, 0)
        return self.out(cells.reshape(b, -1))


def contrastive(a: Float[Array, "B P"], b: Float[Array, "B P"], scale, same: Array) -> tuple[Array, Array]:
    """Symmetric cross entropy of matching rows, and how often the right row is nearest. `same` (B, B) marks rows that
    are no mistakes though they are off the diagonal (equal pictures or equal captions)."""
    a, b = (x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6) for x in (a, b))
    logits = scale * jnp.dot(a, b.T, preferred_element_type=jnp.float32)
    logits = jnp.where(same & ~jnp.eye(len(a), dtype=bool), -jnp.inf, logits)
    right = lambda axis: jnp.diagonal(jax.nn.log_softmax(logits, axis)).mean()
    loss = -0.5 * (right(0) + right(1))
    return loss, (logits.argmax(-1) == jnp.arange(len(a))).mean()


class TextTask:
    """See `jdit.train.loop.Task`. Parameters: text_encoder.*, text_encoder_2.*, tower.*, scale."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        if unknown := sorted(set(cfg.model) - set(MODEL)):
            raise ValueError(f"[model]: unknown fields {unknown}; there are {', '.join(MODEL)}")
        m = self.model = MODEL | dict(cfg.model)
        train, self.val = data_folder.read(cfg.data.folder, cfg.data.size)
        held_out = ex.read_held_out(cfg.data.held_out, cfg.path)
        self.list = ex.build(train.items, held_out=held_out, backgrounds=cfg.data.backgrounds, seed=cfg.run.seed)
        self.tokenizers = write_tokenizers(Path(cfg.run.folder), self.list.texts, m["vocab_size"], m["max_length"])
        vocabulary = self.tokenizers[0].vocab_size
        shared: dict[str, Any] = dict(
            vocab_size=vocabulary, width=m["width"], mlp=m["mlp"], layers=m["layers"], heads=m["heads"],
            max_positions=m["max_length"], projection=m["projection"], eos_token_id=vocabulary - 1,
        )  # fmt: skip
        acts = dict(zip(ENCODERS, ("quick_gelu", "gelu")))
        make = lambda act: Net("CLIPTextModelWithProjection", CLIPTextConfig(**shared, act=act), cfg.run.dtype)
        self.nets = {name: make(act) for name, act in acts.items()}
        self.tower = lambda dtype: Tower(m["tower"], m["projection"], dtype, rngs=nnx.Rngs(cfg.run.seed))
        self.data = everywhere({
            "rgba": train.rgba, "colours": train.colours, "draw": ex.drawable(self.list, cfg.data.mix),
            "tokens": [t.encode(self.list.texts) for t in self.tokenizers],
            "rows": [self.list.picture, self.list.colour, self.list.background],
        })  # fmt: skip
        self._see, self._say = jax.jit(self._embed_pictures), jax.jit(self._embed_texts)
        self.examples = cfg.data.batch

    def init(self) -> Weights:
        out: Weights = {"scale": jnp.float32(np.log(1 / 0.07))}
        for n, (name, net) in enumerate(self.nets.items()):
            weights = net.init(self.cfg.run.seed + n)
            log.info("%s: %s", name, net.describe(weights))
            out |= {f"{name}.{k}": v for k, v in weights.items()}
        tower = jax.jit(lambda: {dotted(p): a for p, a in leaves(self.tower("float32")).items()})()
        return out | {f"tower.{k}": v for k, v in tower.items()}

    def _part(self, params: Weights, name: str) -> Weights:
        return {k.removeprefix(f"{name}."): v for k, v in params.items() if k.startswith(f"{name}.")}

    def _embed_texts(self, params: Weights, tokens: list[Int[Array, "B N"]]) -> list[Float[Array, "B P"]]:
        nets = self.nets.items()
        return [
            net.build(self._part(params, name))(t).projected.astype(jnp.float32) for (name, net), t in zip(nets, tokens)
        ]

    def _embed_pictures(self, params: Weights, pictures: Float[Array, "B S S 3"]) -> list[Float[Array, "B P"]]:
        dtype = self.cfg.run.dtype
        make = lambda: self.tower(dtype)
        paths = {dotted(p): p for p in leaves(nnx.eval_shape(make))}
        tower = assemble(make, {paths[k]: v.astype(dtype) for k, v in self._part(params, "tower").items()})
        b, s, _, _ = pictures.shape
        half = pictures.reshape(b, s // 2, 2, s // 2, 2, 3).mean((2, 4))
        return jnp.split(tower((half * 2 - 1).astype(dtype)).astype(jnp.float32), 2, -1)

    def loss(self, params: Weights, data, key):
        example, caption = ex.draw(data["draw"], key, self.examples)
        example = shard(example, "batch", rules=Rules())
        pictures = ex.render(data["rgba"], data["colours"], *(r[example] for r in data["rows"]))
        pictures = shard(pictures, "batch", None, None, None, rules=Rules())
        seen = self._embed_pictures(params, pictures)
        said = self._embed_texts(params, [t[caption] for t in data["tokens"]])
        same = (example[:, None] == example) | (caption[:, None] == caption)
        scale = jnp.exp(jnp.minimum(params["scale"], np.log(100.0)))
        losses, hits = zip(*(contrastive(a, b, scale, same) for a, b in zip(said, seen)))
        return sum(losses), {"top1_l": hits[0], "top1_g": hits[1], "scale": scale}

    def sheet(self, ema: Weights, folder: Path, step: int) -> dict[str, float]:
        """Retrieval among validation pairs: does the caption find its picture?"""
        if not self.val.items:
            return {}
        n = len(self.val.items)
        zero = jnp.zeros(n, jnp.int32)
        pictures = ex.render(jnp.asarray(self.val.rgba), jnp.asarray(self.val.colours), jnp.arange(n), zero - 1, zero)
        tokens = [jnp.asarray(t.encode([i.text for i in self.val.items])) for t in self.tokenizers]
        seen = self._see(ema, pictures)
        said = self._say(ema, tokens)
        none = jnp.zeros((n, n), bool)
        hits = [float(contrastive(a, b, 1.0, none)[1]) for a, b in zip(said, seen)]
        return {"val_top1_l": hits[0], "val_top1_g": hits[1], "val_pairs": n}

    def finish(self, ema: Weights, folder: Path) -> dict[str, float]:
        for name, net in self.nets.items():
            net.write(folder / name, self._part(ema, name))
        return {}
