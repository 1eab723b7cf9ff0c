"""Sample sheets while a model trains, and the figures that its samples give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jdit import sampling
from jdit.media import contact_sheet, write
from jdit.train.colour import name_colour
from jdit.train.nets import Net, Weights

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
"""The scheduler that a trained model is written with: times are those of training, unshifted."""
Predict = Callable[[Weights, Array, Array, Any], Array]
BATCH = 64
"""Pictures at once; a quarter of it or more are filled up to it, so that few sizes are compiled."""


class Sampler:
    """Pictures or clips from encoded texts, with guidance, in batches of one size.

    Args:
        predict: (weights, x, t, text) -> velocity; text is a pytree of arrays whose rows are those of x.
        shape: of one sample's latents.
    """

    def __init__(self, predict: Predict, shape: tuple[int, ...], vae: Net, vae_weights: Weights, steps: int):
        self.predict, self.shape, self.vae, self.vae_weights = predict, shape, vae, vae_weights
        self.table = sampling.from_config(SCHEDULER, steps)
        self._denoise = jax.jit(self._run)
        self._decode = jax.jit(lambda w, z: self._pixels(self.vae.build(w), z))

    def _run(self, weights: Weights, noise, text, table, guidance) -> Array:
        call = lambda x, t: self.predict(weights, x, t, text).astype(jnp.float32)
        return sampling.solve(sampling.classifier_free(call, guidance), noise, table)

    @staticmethod
    def _pixels(vae: Any, z: Array) -> Array:
        pixels = vae.decode(vae.denormalise(z)) / 2 + 0.5
        return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)

    def latents(self, weights: Weights, text: Any, *, guidance: float, seed: int) -> Float[Array, "B *h C"]:
        """Normalised latents of texts 1..B; row 0 of every array of `text` is the empty text."""
        n = len(jax.tree.leaves(text)[0]) - 1
        size = BATCH if 4 * n >= BATCH else n
        out = []
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1) + 1
            both = lambda a, rows=rows: jnp.concatenate([jnp.repeat(a[:1], len(rows), 0), a[rows]])
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), start), (size, *self.shape))
            out.append(self._denoise(weights, noise, jax.tree.map(both, text), self.table, jnp.float32(guidance)))
        return jnp.concatenate(out)[:n]

    def pictures(self, weights: Weights, text: Any, *, guidance: float, seed: int) -> UInt8[np.ndarray, "B *H 3"]:
        """`latents`, decoded."""
        z = self.latents(weights, text, guidance=guidance, seed=seed)
        size = BATCH if 4 * len(z) >= BATCH else len(z)
        parts = []
        for start in range(0, len(z), size):
            rows = np.minimum(np.arange(start, start + size), len(z) - 1)
            parts.append(np.asarray(self._decode(self.vae_weights, z[rows])))
        return np.concatenate(parts)[: len(z)]


def draw_sheet(pictures: UInt8[np.ndarray, "B H W 3"], prompts: list[str], file: Path) -> None:
    """A PNG grid with the prompts below the pictures."""
    write(contact_sheet(pictures, prompts), file)


def film_strips(clips: UInt8[np.ndarray, "B T H W 3"], frames: int = 5) -> UInt8[np.ndarray, "B H W*frames 3"]:
    """Some frames of each clip, from the first to the last, side by side."""
    chosen = clips[:, np.linspace(0, clips.shape[1] - 1, frames).round().astype(int)]
    return np.concatenate(list(chosen.swapaxes(0, 1)), axis=2)


def recall(
    made: Float[np.ndarray, "B *h C"], known: Float[np.ndarray, "N *h C"], right: np.ndarray
) -> dict[str, float]:
    """How often the nearest (top1) or one of the five nearest (top5) known latents is the right one.

    Args:
        right: index into `known` of each made one.
    """
    a, b = made.reshape(len(made), -1).astype(np.float64), known.reshape(len(known), -1).astype(np.float64)
    distance = (b * b).sum(1)[None] - 2 * a @ b.T
    own = distance[np.arange(len(a)), right][:, None]
    nearer = (distance < own).sum(1)
    return {"top1": float((nearer < 1).mean()), "top5": float((nearer < 5).mean())}


def colours_right(pictures: UInt8[np.ndarray, "B H W 3"], wanted: list[str]) -> float:
    """The share of pictures whose object has the wanted colour."""
    return float(np.mean([name_colour(p / np.float32(255))[0] == w for p, w in zip(pictures, wanted)]))
