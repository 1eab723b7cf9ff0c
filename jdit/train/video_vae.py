"""Training Wan's causal video autoencoder: the losses of pictures on every frame, and one of the motion between."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdit.media import contact_sheet, write
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.sharding import Rules, shard
from jdit.train import clips
from jdit.train.config import Config
from jdit.train.nets import Net, Weights, everywhere
from jdit.train.sheet import film_strips
from jdit.train.vae import edge_loss, psnr

log = logging.getLogger("jdit")

LOSS = {"l1": 1.0, "square": 4.0, "gradient": 1.0, "motion": 1.0, "kl": 1e-4}
"""Weights of the terms; [loss] in a config replaces them."""
MARGIN = 4
"""Largest shift of a clip, in pixels."""
BATCH = 32
"""Clips at once outside training."""


class VideoVAETask:
    """See `jdit.train.loop.Task`."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        if unknown := sorted(set(cfg.loss) - set(LOSS)):
            raise ValueError(f"unknown loss terms {unknown}; there are {', '.join(LOSS)}")
        self.terms = LOSS | dict(cfg.loss)
        self.net = Net("AutoencoderKLWan", self._model(), cfg.run.dtype)
        self.train, val = clips.read(cfg.data.folder, cfg.data.frames, cfg.data.size)
        self.val = val if val.items else self.train
        self.data = everywhere((self.train.frames, clips.shares(self.train.items, cfg.data.balance)))
        self._round_trip = jax.jit(self._there_and_back)
        self.examples = cfg.data.batch

    def _model(self) -> AutoencoderKLWanConfig:
        try:
            model = AutoencoderKLWanConfig(**self.cfg.model)
        except TypeError as e:
            raise ValueError(f"[model]: {e}") from None
        c, data, time = model.latent_channels, self.cfg.data, model.frame_factors[0]
        if data.size % model.pixel_factor or (data.frames - 1) % time:
            raise ValueError(f"data.frames = {data.frames} of data.size = {data.size}: 1 + {time} n frames of a "
                             f"multiple of {model.pixel_factor} pixels are wanted")  # fmt: skip
        return dataclasses.replace(
            model, mean=(0.0,) * c, std=(1.0,) * c, time_factor=time, space_factor=model.pixel_factor
        )

    def init(self) -> Weights:
        weights = self.net.read(self.cfg.init) if self.cfg.init else self.net.init(self.cfg.run.seed)
        log.info("%s", self.net.describe(weights))
        return weights

    def _clips(self, data, key) -> Float[Array, "B T S S 3"]:
        """Random clips in [-1, 1]: another frame of the loop first, shifted, mirrored."""
        frames, shares = data
        n, (_, t, size, _, _) = self.examples, frames.shape
        keys = jax.random.split(key, 4)
        index = shard(clips.draw(keys[0], n, len(frames), shares), "batch", rules=Rules())
        x = jnp.pad(frames[index], ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
        corner = jax.random.randint(keys[1], (n, 2), 0, 2 * MARGIN + 1)
        cut = lambda clip, at: jax.lax.dynamic_slice(clip, (0, at[0], at[1], 0), (t, size, size, 3))
        x = jax.vmap(cut)(x, corner)
        x = jax.vmap(lambda clip, by: jnp.roll(clip, by, 0))(x, jax.random.randint(keys[2], (n,), 0, t))
        if self.cfg.data.flip:
            x = jnp.where(jax.random.bernoulli(keys[3], 0.5, (n, 1, 1, 1, 1)), x[:, :, :, ::-1], x)
        return _pixels(x)

    def loss(self, params: Weights, data, key):
        clips_key, noise_key = jax.random.split(key)
        x = shard(self._clips(data, clips_key), "batch", None, None, None, None, rules=Rules())
        vae = self.net.build(params)
        posterior = vae.encode(x)
        y = vae.decode(posterior.sample(noise_key))
        frames = lambda a: a.reshape(-1, *a.shape[2:])
        steps = lambda a: a[:, 1:] - a[:, :-1]
        parts = {
            "l1": jnp.abs(y - x).mean(),
            "square": jnp.square(y - x).mean(),
            "gradient": edge_loss(frames(y), frames(x)),
            "motion": jnp.abs(steps(y) - steps(x)).mean(),
            "kl": posterior.kl().mean() / (posterior.mean.size / x.shape[0]),
        }
        loss = sum(self.terms[k] * v for k, v in parts.items())
        return loss, {**parts, "psnr": psnr(frames(y) / 2, frames(x) / 2).mean()}

    def _there_and_back(self, weights: Weights, frames) -> tuple[Array, Array]:
        vae = self.net.build(weights)
        z = vae.encode(_pixels(frames)).mean
        return z, jnp.round((vae.decode(z) / 2 + 0.5) * 255).astype(jnp.uint8)

    def _through(self, weights: Weights, frames) -> tuple[np.ndarray, np.ndarray]:
        """Raw latents of clips, and the clips that come of them."""
        parts = [self._round_trip(weights, frames[i]) for i in batches(len(frames), BATCH)]
        z, y = (np.concatenate([np.asarray(p[n]) for p in parts])[: len(frames)] for n in range(2))
        return z, y

    def sheet(self, ema: Weights, folder: Path, step: int) -> dict[str, float]:
        before = self.val.frames[:64]
        after = self._through(ema, before)[1]
        pairs = np.stack([film_strips(before[:16]), film_strips(after[:16])], 1)
        write(contact_sheet(pairs.reshape(-1, *pairs.shape[2:]), columns=4), folder / f"vae_{step:07d}.png")
        frames = lambda a: jnp.asarray(a.reshape(-1, *a.shape[2:]), jnp.float32) / 255
        return {"val_psnr": float(psnr(frames(before), frames(after)).mean())}

    def finish(self, ema: Weights, folder: Path) -> dict[str, float]:
        """Measure each channel of the latents, write the component with these statistics."""
        z = self._through(ema, self.data[0])[0]
        flat = z.reshape(-1, z.shape[-1])
        mean, std = tuple(map(float, flat.mean(0))), tuple(map(float, flat.std(0)))
        net = Net("AutoencoderKLWan", dataclasses.replace(self.net.cfg, mean=mean, std=std), self.cfg.run.dtype)
        net.write(folder / "vae", ema)
        return {"latent_mean": float(flat.mean()), "latent_std": float(flat.std())}


def _pixels(frames) -> Float[Array, "B T S S 3"]:
    return frames.astype(jnp.float32) / 127.5 - 1


def batches(n: int, size: int):
    """Indices in equal batches (one compilation); the last is filled up with the last index."""
    size = min(n, size)
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size), n - 1)
