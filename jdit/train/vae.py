"""Training the autoencoder: reconstruction in L1, squares and gradients, and a small divergence (arXiv 2112.10752).

There is no perceptual network and no discriminator: both would need weights from elsewhere. The loss of gradients at
several scales takes the part of keeping edges sharp.
"""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdit.media import contact_sheet, write
from jdit.nn.vae.autoencoder_kl import AutoencoderKLConfig
from jdit.sharding import Rules, shard
from jdit.train import data as data_folder
from jdit.train.colour import COLOURS, background_table, composite, recolour_many
from jdit.train.config import Config
from jdit.train.nets import Net, Weights, everywhere

log = logging.getLogger("jdit")

LOSS = {"l1": 1.0, "square": 4.0, "gradient": 1.0, "kl": 1e-4}
"""Weights of the terms; [loss] in a config replaces them."""
MARGIN = 8
"""Largest shift of a picture, in pixels."""


def gradients(x: Float[Array, "B H W C"]) -> tuple[Array, Array]:
    """Differences of neighbours along rows and columns."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


def edge_loss(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"], scales: int = 3) -> Float[Array, ""]:
    """Mean absolute difference of the gradients, over `scales` halvings of the size."""
    total = jnp.float32(0)
    for _ in range(scales):
        for x, y in zip(gradients(a), gradients(b)):
            total += jnp.abs(x - y).mean()
        a, b = (x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4)) for x in (a, b))
    return total / scales


def psnr(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """Peak signal to noise in dB of each picture; pixels in [0, 1]."""
    return -10 * jnp.log10(jnp.maximum(jnp.square(a - b).mean((1, 2, 3)), 1e-10))


class VAETask:
    """See `jdit.train.loop.Task`."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        if unknown := sorted(set(cfg.loss) - set(LOSS)):
            raise ValueError(f"unknown loss terms {unknown}; there are {', '.join(LOSS)}")
        self.terms = LOSS | dict(cfg.loss)
        try:
            model = AutoencoderKLConfig(**{"sample_size": cfg.data.size, **cfg.model})
        except TypeError as e:
            raise ValueError(f"[model]: {e}") from None
        self.net = Net("AutoencoderKL", model, cfg.run.dtype)
        train, val = data_folder.read(cfg.data.folder, cfg.data.size)
        self.val = val if val.items else train
        self.coloured = sum(cfg.data.mix[1:]) > 0
        self.data = everywhere((train.rgba, train.colours))
        self._round_trip = _round_trip(self.net)
        self.examples = cfg.data.batch

    def init(self) -> Weights:
        weights = self.net.read(self.cfg.init) if self.cfg.init else self.net.init(self.cfg.run.seed)
        log.info("%s", self.net.describe(weights))
        return weights

    def _pictures(self, data, key) -> Float[Array, "B S S 3"]:
        """Random pictures in [-1, 1]: shifted, mirrored, recoloured, on white or any other background."""
        rgba, info = data
        n, size = self.examples, rgba.shape[1]
        keys = jax.random.split(key, 8)
        index = shard(jax.random.randint(keys[0], (n,), 0, rgba.shape[0]), "batch", rules=Rules())
        x = jnp.pad(rgba[index], ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
        corner = jax.random.randint(keys[1], (n, 2), 0, 2 * MARGIN + 1)
        x = jax.vmap(lambda p, c: jax.lax.dynamic_slice(p, (c[0], c[1], 0), (size, size, 4)))(x, corner)
        if self.cfg.data.flip:
            x = jnp.where(jax.random.bernoulli(keys[2], 0.5, (n, 1, 1, 1)), x[:, :, ::-1], x)
        x = x.astype(jnp.float32) / 255
        if self.coloured:
            colour = jax.random.randint(keys[3], (n,), 0, len(COLOURS))
            wanted = jax.random.bernoulli(keys[4], 0.4, (n,)) & (info[index, 2] > 0)
            x = recolour_many(x, info[index, 0], info[index, 1], jnp.where(wanted, colour, -1))
        table = jnp.asarray(background_table())
        named = table[jax.random.randint(keys[5], (n,), 0, len(table))]
        anything = jax.random.uniform(keys[6], (n, 3))
        kind = jax.random.uniform(keys[7], (n, 1))
        background = jnp.where(kind < 0.5, 1.0, jnp.where(kind < 0.85, named, anything))
        return composite(x, background) * 2 - 1

    def loss(self, params: Weights, data, key):
        pictures_key, noise_key = jax.random.split(key)
        x = shard(self._pictures(data, pictures_key), "batch", None, None, None, rules=Rules())
        vae = self.net.build(params)
        posterior = vae.encode(x)
        y = vae.decode(posterior.sample(noise_key))
        size = posterior.mean.size / x.shape[0]
        parts = {
            "l1": jnp.abs(y - x).mean(),
            "square": jnp.square(y - x).mean(),
            "gradient": edge_loss(y, x),
            "kl": posterior.kl().mean() / size,
        }
        loss = sum(self.terms[k] * v for k, v in parts.items())
        return loss, {**parts, "psnr": psnr(y / 2, x / 2).mean()}

    def _reconstruct(self, ema: Weights, rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Originals on white and their reconstructions, float32 in [0, 1]."""
        before, after = [], []
        for start in range(0, len(rgba), 64):
            x, y = self._round_trip(ema, jnp.asarray(rgba[start : start + 64]))
            before.append(np.asarray(x))
            after.append(np.asarray(y))
        return np.concatenate(before), np.concatenate(after)

    def sheet(self, ema: Weights, folder: Path, step: int) -> dict[str, float]:
        before, after = self._reconstruct(ema, self.val.rgba[:256])
        pairs = np.stack([before[:32], after[:32]], 1).reshape(-1, *before.shape[1:])
        write(contact_sheet(np.round(pairs * 255).astype(np.uint8), columns=8), folder / f"vae_{step:07d}.png")
        return {"val_psnr": float(psnr(jnp.asarray(before), jnp.asarray(after)).mean())}

    def finish(self, ema: Weights, folder: Path) -> dict[str, float]:
        """Measure the latents, write the component with its scale and shift (upstream: (z - shift) * scale)."""
        rgba, _ = self.data
        mean = jax.jit(lambda w, x: self.net.build(w).encode(composite(x / 255.0, jnp.ones(3)) * 2 - 1).mean)
        pick = np.random.default_rng(0).permutation(rgba.shape[0])[:1024]
        z = np.concatenate([np.asarray(mean(ema, rgba[pick[i : i + 64]])) for i in range(0, len(pick), 64)])
        shift, scale = float(z.mean()), float(1 / z.std())
        net = Net("AutoencoderKL", dataclasses.replace(self.net.cfg, shift=shift, scale=scale), self.cfg.run.dtype)
        net.write(folder / "vae", ema)
        return {"latent_shift": shift, "latent_scale": scale}


def _round_trip(net: Net):
    @jax.jit
    def run(weights, rgba):
        x = composite(rgba.astype(jnp.float32) / 255, jnp.ones(3))
        vae = net.build(weights)
        y = vae.decode(vae.encode(x * 2 - 1).mean) / 2 + 0.5
        return x, jnp.round(jnp.clip(y, 0, 1) * 255) / 255

    return run
