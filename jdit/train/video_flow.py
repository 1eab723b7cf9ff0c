"""Training Wan's transformer by flow matching, its text encoder with it: x_s = (1 - s) x0 + s noise, as in `flow`.

The latents of all clips are made once and stay on the devices; the text encoder is small and has the same loss.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from convert import tokenizers as tokenizer_files
from jdit.nn.text.t5 import T5Config
from jdit.nn.wan import WanConfig
from jdit.sharding import Rules, shard
from jdit.train import clips
from jdit.train.config import Config
from jdit.train.flow import LOSS, component, noise_levels
from jdit.train.nets import Net, Weights, everywhere, open_net
from jdit.train.sheet import Sampler, draw_sheet, film_strips, recall
from jdit.train.unigram import write_unigram
from jdit.train.video_vae import BATCH, batches

log = logging.getLogger("jdit")

CONTEXT = 512
"""Text tokens of upstream's pipelines, padding included. Padding is zeros, so one zero is sent, counted as many."""
ENCODER = {
    "vocab_size": 1024, "max_length": 24, "width": 128, "kv": 64, "heads": 2, "mlp": 256, "layers": 2,
}  # fmt: skip
"""[encoder] and its defaults: the UMT5 encoder, its vocabulary, and the most tokens of a training caption."""
NETS = {"transformer": "WanTransformer3DModel", "text_encoder": "UMT5EncoderModel"}


class VideoFlowTask:
    """See `jdit.train.loop.Task`. Parameters: transformer.*, text_encoder.*."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        for section, known in (("loss", LOSS), ("encoder", ENCODER)):
            if unknown := sorted(set(getattr(cfg, section)) - set(known)):
                raise ValueError(f"[{section}]: unknown {unknown}; there are {', '.join(known)}")
        if not cfg.vae:
            raise ValueError("video flow training needs `vae`: the folder that holds this component")
        self.levels = LOSS | dict(cfg.loss)
        encoder: dict[str, Any] = ENCODER | dict(cfg.encoder)
        self.vae, self.vae_weights = open_net(component(cfg.vae, "vae"), "AutoencoderKLWan", cfg.run.dtype)
        self.train, _ = clips.read(cfg.data.folder, cfg.data.frames, cfg.data.size)
        self.texts = clips.texts(self.train.items)
        folder, limit = Path(cfg.run.folder) / "tokenizer", encoder.pop("max_length")
        if not (folder / "tokenizer.json").is_file():  # a resumed run keeps its vocabulary
            write_unigram(folder, self.texts.texts, encoder["vocab_size"], CONTEXT)
        self.tokenizer, self.limit = tokenizer_files.load(folder), limit
        encoder["vocab_size"] = self.tokenizer.vocab_size
        text = T5Config(**encoder, shared_bias=False)
        configs = {"transformer": self._wan(text.width), "text_encoder": text}
        self.nets = {name: Net(NETS[name], c, cfg.run.dtype) for name, c in configs.items()}
        self.examples = cfg.data.batch
        self.data: Any = everywhere({
            "latents": self._latents(), "of": self.texts.of, "text": self.tokens(self.texts.texts),
            "shares": clips.shares(self.train.items, cfg.data.balance),
        })  # fmt: skip
        shape = self.data["latents"].shape[1:]
        self.sampler = Sampler(self._predict, shape, self.vae, self.vae_weights, cfg.run.sheet_steps)
        log.info("%d clips, %d captions, %d pieces", *self.texts.of.shape[:1], len(self.texts.texts), text.vocab_size)

    def _wan(self, text_dim: int) -> WanConfig:
        channels = self.vae.cfg.latent_channels
        try:
            model = WanConfig(**{"in_channels": channels, "out_channels": channels, "text_dim": text_dim,
                                 **self.cfg.model})  # fmt: skip
        except TypeError as e:
            raise ValueError(f"[model]: {e}") from None
        return model

    def tokens(self, texts: list[str]) -> tuple[Int[np.ndarray, "U L"], Int[np.ndarray, "U"]]:
        """Token ids of captions and how many of each are not padding."""
        return self.tokenizer.encode_with_lengths(texts, self.limit)

    def _latents(self) -> Float[Array, "N t h w C"]:
        """Normalised latents (the posterior's mean) of all clips, bfloat16."""

        @jax.jit
        def run(weights, frames):
            vae = self.vae.build(weights)
            return vae.normalise(vae.encode(frames.astype(jnp.float32) / 127.5 - 1).mean).astype(jnp.bfloat16)

        frames = self.train.frames
        parts = [run(self.vae_weights, everywhere(frames[i])) for i in batches(len(frames), BATCH)]
        latents = jnp.concatenate(parts)[: len(frames)]
        sample = latents.astype(jnp.float32)
        log.info("latents %s, mean %.3f, deviation %.3f", latents.shape, float(sample.mean()), float(sample.std()))
        return latents

    def init(self) -> Weights:
        return start(self.nets, self.cfg)

    def _predict(self, weights: Weights, x, t, text) -> Array:
        """The velocity at latents x and timesteps t; text as `tokens` gives it."""
        tokens, lengths = text
        wan, encoder = (self.nets[n].build(part(weights, n)) for n in NETS)
        states = jnp.pad(encoder.padded(tokens, lengths), ((0, 0), (0, 1), (0, 0)))
        counts = jnp.ones(states.shape[1]).at[-1].set(CONTEXT - tokens.shape[1])
        context = wan.embed_context(states, counts=counts)
        return wan.velocity(x, wan.modulation(t), context)

    def loss(self, params: Weights, data, key):
        n, rules = self.examples, Rules()
        keys = jax.random.split(key, 5)
        clip = shard(clips.draw(keys[0], n, len(data["of"]), data["shares"]), "batch", rules=rules)
        caption = data["of"][clip, jax.random.randint(keys[1], (n,), 0, data["of"].shape[1])]
        caption = jnp.where(jax.random.bernoulli(keys[2], self.cfg.data.empty, (n,)), 0, caption)
        x0 = shard(data["latents"][clip], "batch", None, None, None, None, rules=rules).astype(jnp.float32)
        noise = shard(jax.random.normal(keys[3], x0.shape), "batch", None, None, None, None, rules=rules)
        s = noise_levels(keys[4], n, self.levels["mean"], self.levels["deviation"])
        at = s[:, None, None, None, None]
        run = self._predict
        if self.cfg.run.remat == "dots":
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.dots_saveable)
        text = tuple(shard(a[caption], "batch", *[None] * (a.ndim - 1), rules=rules) for a in data["text"])
        velocity = run(params, (1 - at) * x0 + at * noise, 1000 * s, text).astype(jnp.float32)
        return jnp.square(velocity - (noise - x0)).mean(), {}

    def sheet(self, ema: Weights, folder: Path, step: int) -> dict[str, float]:
        """A sheet of the config's prompts (five frames each); recall of training captions; how much the clips move."""
        run = self.cfg.run
        prompts = list(run.prompts) or [i.text for i in self.train.items[:16]]
        made = self.sampler.pictures(ema, self._text(prompts), guidance=run.guidance, seed=1)
        draw_sheet(film_strips(made), prompts, folder / f"flow_{step:07d}.png")
        if not (n := min(run.evaluate, len(self.train.items))):
            return {}
        rows = np.random.default_rng(0).permutation(len(self.train.items))[:n]
        texts = [self.train.items[r].text for r in rows]
        latents = self.sampler.latents(ema, self._text(texts), guidance=run.guidance, seed=2)
        known = np.asarray(self.data["latents"].astype(jnp.float32))
        return recall(np.asarray(latents), known, rows) | {"motion": motion(made)}

    def _text(self, texts: list[str]) -> tuple[Array, Array]:
        """Tokens of the empty caption, then of `texts`."""
        tokens, lengths = self.tokens(["", *texts])
        return jnp.asarray(tokens), jnp.asarray(lengths)

    def finish(self, ema: Weights, folder: Path) -> dict[str, float]:
        for name, net in self.nets.items():
            net.write(folder / name, part(ema, name))
        return {}


def start(nets: dict[str, Net], cfg: Config) -> Weights:
    """Weights of several networks, their names before the paths: `init`'s, or random ones, where the last layer and
    what time adds to modulation start at zero."""
    out: Weights = {}
    for n, (name, net) in enumerate(nets.items()):
        if cfg.init:
            weights = net.read(component(cfg.init, name))
        else:
            weights = net.init(cfg.run.seed + n)
            weights = {k: jnp.zeros_like(v) if k.startswith(("final.", "time_mod.")) else v for k, v in weights.items()}
            if name == "text_encoder":  # its scores are not divided by the root of the head dim
                qkv = weights["blocks.qkv.kernel"]
                weights["blocks.qkv.kernel"] = qkv.at[..., 0, :].multiply(net.cfg.kv**-0.5)
        log.info("%s", net.describe(weights))
        out |= {f"{name}.{k}": v for k, v in weights.items()}
    return out


def part(params: Weights, name: str) -> Weights:
    """The weights of one network."""
    return {k.removeprefix(f"{name}."): v for k, v in params.items() if k.startswith(f"{name}.")}


def motion(clips: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames, in levels of 8 bits."""
    return float(np.abs(np.diff(clips.astype(np.int16), axis=1)).mean())
