"""Training the MMDiT by flow matching (arXiv 2403.03206): x_s = (1 - s) x0 + s noise, the network gives noise - x0.

Latents of every example and the text states of every caption are made once, at the start, and stay on the devices.
"""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from convert import tokenizers as tokenizer_files
from jdit.nn.mmdit import MMDiTConfig
from jdit.sharding import Rules, shard
from jdit.train import data as data_folder
from jdit.train import examples as ex
from jdit.train.config import Config
from jdit.train.nets import Net, Weights, everywhere, open_net
from jdit.train.sheet import Sampler, colours_right, draw_sheet, recall

log = logging.getLogger("jdit")

ABSENT_T5 = 256
"""Zero tokens that upstream's pipeline puts where T5 is absent. They are equal, so one is sent, counted as many."""
LOSS = {"mean": 0.0, "deviation": 1.0}
"""Logit-normal distribution of s; [loss] in a config replaces its values."""


def noise_levels(key: Array, n: int, mean: float, deviation: float) -> Float[Array, "B"]:
    """Logit-normal levels in (0, 1), one from each of n equal parts of the distribution: less variance than n draws."""
    u = (jnp.arange(n) + jax.random.uniform(key, (n,))) / n
    z = jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6))
    return jax.nn.sigmoid(mean + deviation * z)


class FlowTask:
    """See `jdit.train.loop.Task`."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        if unknown := sorted(set(cfg.loss) - set(LOSS)):
            raise ValueError(f"[loss]: unknown {unknown}; there are {', '.join(LOSS)}")
        if not cfg.vae or not cfg.text:
            raise ValueError("flow training needs `vae` and `text`: folders that hold these components")
        self.levels = LOSS | dict(cfg.loss)
        self.vae, self.vae_weights = open_net(component(cfg.vae, "vae"), "AutoencoderKL", cfg.run.dtype)
        clip = "CLIPTextModelWithProjection"
        self.clips = [open_net(Path(cfg.text) / n, clip, cfg.run.dtype) for n in ("text_encoder", "text_encoder_2")]
        self.tokenizers = [tokenizer_files.load(Path(cfg.text) / n) for n in ("tokenizer", "tokenizer_2")]
        self.net = Net("SD3Transformer2DModel", self._model(), cfg.run.dtype)
        self.train, _ = data_folder.read(cfg.data.folder, cfg.data.size)
        self.held_out = ex.read_held_out(cfg.data.held_out, cfg.path)
        self.list = ex.build(
            self.train.items, held_out=self.held_out, backgrounds=cfg.data.backgrounds, seed=cfg.run.seed
        )
        self.examples = cfg.data.batch
        self._run_clips = jax.jit(self._clip_states)
        states, pooled = self.encode(self.list.texts)
        self.data = {
            "latents": self._latents(), "states": states, "pooled": pooled,
            "draw": ex.drawable(self.list, cfg.data.mix),
        }  # fmt: skip
        self.texts: dict[tuple[str, ...], tuple[Array, Array]] = {}
        side, channels = self.net.cfg.sample_size, self.net.cfg.in_channels
        self.sampler = Sampler(self._predict, (side, side, channels), self.vae, self.vae_weights, cfg.run.sheet_steps)
        log.info("%d examples, %d captions", len(self.list.picture), len(self.list.texts))

    def _model(self) -> MMDiTConfig:
        vae, (one, two) = self.vae.cfg, (net.cfg for net, _ in self.clips)
        side = self.cfg.data.size // vae.factor
        implied = dict(
            sample_size=side, in_channels=vae.latent_channels, out_channels=vae.latent_channels,
            joint_dim=one.width + two.width,
            pooled_dim=(one.projection or one.width) + (two.projection or two.width),
        )  # fmt: skip
        try:
            return MMDiTConfig(**{**implied, **self.cfg.model})
        except TypeError as e:
            raise ValueError(f"[model]: {e}") from None

    @property
    def counts(self) -> Float[Array, "L"]:
        """How many tokens each context token stands for."""
        return jnp.ones((self.tokenizers[0].max_length or 0) + 1).at[-1].set(ABSENT_T5)

    def _predict(self, weights: Weights, x, t, text) -> Array:
        return self.net.build(weights)(x, t, *text, context_counts=self.counts)

    def _clip_states(self, weights, tokens):
        outs = [net.build(w)(t) for (net, _), w, t in zip(self.clips, weights, tokens)]
        states = jnp.concatenate([o.states for o in outs], -1)
        states = jnp.pad(states, ((0, 0), (0, 1), (0, self.net.cfg.joint_dim - states.shape[-1])))
        return states.astype(jnp.bfloat16), jnp.concatenate([o.projected for o in outs], -1).astype(jnp.bfloat16)

    def encode(self, texts: list[str]) -> tuple[Float[Array, "U L J"], Float[Array, "U P"]]:
        """Text states (the zero token last) and pooled vectors of captions, bfloat16."""
        weights = [w for _, w in self.clips]
        tokens = [t.encode(texts) for t in self.tokenizers]
        parts = [
            self._run_clips(weights, [t[i] for t in tokens])
            for i in _batches(len(texts), 4096 if len(texts) > 512 else 512)
        ]
        states, pooled = (jnp.concatenate(p)[: len(texts)] for p in zip(*parts))
        return states, pooled

    def _latents(self) -> Float[Array, "E h w C"]:
        """Normalised latents (the posterior's mean) of all examples, bfloat16."""
        rgba, colours = everywhere((self.train.rgba, self.train.colours))

        @jax.jit
        def run(weights, rgba, colours, *rows):
            vae = self.vae.build(weights)
            return vae.normalise(vae.encode(ex.render(rgba, colours, *rows) * 2 - 1).mean).astype(jnp.bfloat16)

        rows = (self.list.picture, self.list.colour, self.list.background)
        parts = [
            run(self.vae_weights, rgba, colours, *(r[i] for r in rows))
            for i in _batches(len(rows[0]), 512 if len(rows[0]) > 64 else 64)
        ]
        latents = jnp.concatenate(parts)[: len(rows[0])]
        sample = latents[: self.list.size[0]].astype(jnp.float32)
        log.info("latents %s, mean %.3f, deviation %.3f", latents.shape, float(sample.mean()), float(sample.std()))
        return latents

    def init(self) -> Weights:
        """Random weights: DiT's (arXiv 2212.09748), in which every block starts as the identity."""
        if self.cfg.init:
            weights = self.net.read(component(self.cfg.init, "transformer"))
        else:
            weights = self.net.init(self.cfg.run.seed)
            zero = lambda k: k.startswith(("final.", "final_mod.")) or ".mod." in k
            weights = {k: jnp.zeros_like(v) if zero(k) else v for k, v in weights.items()}
        log.info("%s", self.net.describe(weights))
        return weights

    def loss(self, params: Weights, data, key):
        n, rules = self.examples, Rules()
        keys = jax.random.split(key, 4)
        example, caption = ex.draw(data["draw"], keys[0], n)
        caption = jnp.where(jax.random.bernoulli(keys[1], self.cfg.data.empty, (n,)), 0, caption)
        x0 = shard(data["latents"][example], "batch", None, None, None, rules=rules).astype(jnp.float32)
        states = shard(data["states"][caption], "batch", None, None, rules=rules)
        pooled = shard(data["pooled"][caption], "batch", None, rules=rules)
        noise = shard(jax.random.normal(keys[2], x0.shape), "batch", None, None, None, rules=rules)
        s = noise_levels(keys[3], n, self.levels["mean"], self.levels["deviation"])
        at = s[:, None, None, None]
        model = self.net.build(params)
        run = lambda m, x, t, c, p: m(x, t, c, p, context_counts=self.counts)
        if self.cfg.run.remat == "dots":
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.dots_saveable)
        velocity = run(model, (1 - at) * x0 + at * noise, 1000 * s, states, pooled).astype(jnp.float32)
        return jnp.square(velocity - (noise - x0)).mean(), {}

    def sheet(self, ema: Weights, folder: Path, step: int) -> dict[str, float]:
        """A sheet of the config's prompts; recall of training captions; colours of pairs that were never trained."""
        run = self.cfg.run
        prompts = list(run.prompts) or [i.text for i in self.train.items[:16]]
        pictures = self.sampler.pictures(ema, self._text(prompts), guidance=run.guidance, seed=1)
        draw_sheet(pictures, prompts, folder / f"flow_{step:07d}.png")
        figures = {}
        if n := min(run.evaluate, int(self.list.size[0])):
            rows = np.random.default_rng(0).permutation(int(self.list.size[0]))[:n]
            texts = [self.train.items[self.list.picture[r]].text for r in rows]
            latents = self.sampler.latents(ema, self._text(texts), guidance=run.guidance, seed=2)
            plain = np.asarray(self.data["latents"][: int(self.list.size[0])].astype(jnp.float32))
            figures |= recall(np.asarray(latents), plain, rows)
        if self.held_out and n:
            pairs = sorted(self.held_out)
            pictures = self.sampler.pictures(
                ema, self._text([ex.article(p) for p in pairs]), guidance=run.guidance, seed=3
            )
            figures["colour"] = colours_right(pictures, [p.split(" ")[0] for p in pairs])
        return figures

    def _text(self, texts: list[str]) -> tuple[Array, Array]:
        """States and pooled vectors of the empty caption, then of `texts`; kept for the next sheet."""
        key = tuple(texts)
        if key not in self.texts:
            self.texts[key] = self.encode(["", *texts])
        return self.texts[key]

    def finish(self, ema: Weights, folder: Path) -> dict[str, float]:
        self.net.write(folder / "transformer", ema)
        return {}


def component(folder: str, name: str) -> Path:
    """A component's folder, or the folder that has it."""
    path = Path(folder)
    return path / name if (path / name).is_dir() else path


def _batches(n: int, size: int):
    """Indices in equal batches (one compilation); the last is filled up with the last index."""
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size), n - 1)
