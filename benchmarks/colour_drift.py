"""Does colour matching hold colours over many segments? A synthetic experiment, on the CPU in seconds.

    python benchmarks/colour_drift.py                # a minute on two cores

Stripes and discs of several colours move, so that a segment's statistics differ from its neighbours'. A generator
stands for the network: it continues from the last frame of the segment before, with that frame's colours, and shifts
them by a small gain and offset of its own each time, those of the frame that it repeats too. 32 segments of 21 frames,
1 of them overlap; 8 seeds. `matched` holds the segment's overlap to the frame that it repeats, `to the first segment`
holds whole segments to the statistics of the first.

What is shown: the colour error, root mean square of (video - scene) in levels of 255, of segments 2, 8 and 32.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jdit import colour

SEGMENTS, LENGTH, OVERLAP, SEEDS, H, W = 32, 21, 1, 8, 36, 64
STRIDE = LENGTH - OVERLAP
DRIFTS = {
    "gain and offset of brightness": lambda rng: (
        np.full(3, 1 + rng.normal(0.01, 0.005)),
        np.full(3, rng.normal(0, 0.005)),
    ),
    "offset of each of R, G, B": lambda rng: (np.ones(3), rng.normal((0.004, 0, -0.004), 0.003)),
    "gain and offset of each of R, G, B": lambda rng: (rng.normal((1.012, 1.0, 0.99), 0.005), rng.normal(0, 0.003, 3)),
}
WAYS = ("off", "matched, strength 0.5", "matched, strength 1", "to the first segment, strength 1")
NOISE = 2 / 255
"""Of each pixel of each segment: the repeated frame is not repeated exactly."""


def scene(seed: int) -> np.ndarray:
    """(T, H, W, 3) in [0, 1]: stripes behind, discs that come and go in front."""
    rng = np.random.default_rng(seed)
    frames = SEGMENTS * STRIDE + OVERLAP
    t, y, x = np.ogrid[:frames, :H, :W]
    stripes = 0.5 + 0.25 * np.sin(x / rng.uniform(4, 9) + t / rng.uniform(20, 60) + y / 7)[..., None] * (1, 0.6, 0.3)
    for _ in range(12):
        start, rgb = rng.uniform(0, frames), rng.uniform(0.1, 0.9, 3)
        along, across = (t - start) / rng.uniform(1, 4), rng.uniform(0, H)
        inside = (x - along) ** 2 + (y - across - 6 * np.sin(t / 15)) ** 2 < rng.uniform(5, 12) ** 2
        stripes = np.where(inside[..., None], rgb, stripes)
    return stripes.astype(np.float32)


@jax.jit
def run(scene, gains, offsets, key, way):
    """Segments one after another: errors (SEGMENTS,). The generator's colours are the affine map (a, b) of the scene's,
    which it reads off the frame that it was given and changes once more."""
    first = colour.statistics(scene[None, :LENGTH])

    def segment(carry, item):
        tail, previous = carry
        index, gain, offset = item
        want = jax.lax.dynamic_slice_in_dim(scene, index * STRIDE, LENGTH)
        a, b = previous  # what the given frame's colours are to the scene's
        a, b = jnp.where(index > 0, a * gain, 1.0), jnp.where(index > 0, b * gain + offset, 0.0)
        made = (want * a + b + NOISE * jax.random.normal(jax.random.fold_in(key, index), want.shape))[None]
        strength = jnp.where(index > 0, jnp.array([0.0, 0.5, 1.0, 1.0])[way], 0.0)
        by_tail = colour.match(made, made[:, :OVERLAP], tail, strength)
        by_first = colour.transfer(made, colour.statistics(made), first, strength)
        made = jnp.where(way == 3, by_first, by_tail)
        # least squares over the last frame: how the next generator sees its colours
        x, y = want[-1].reshape(-1, 3), made[0, -1].reshape(-1, 3)
        spread = x - x.mean(0)
        slope = (spread * y).sum(0) / (spread**2).sum(0)
        error = jnp.sqrt(jnp.square(made[0] - want).mean())
        return (made[:, -OVERLAP:], (slope, y.mean(0) - slope * x.mean(0))), error

    start = (jnp.zeros((1, OVERLAP, H, W, 3)), (jnp.ones(3), jnp.zeros(3)))
    return jax.lax.scan(segment, start, (jnp.arange(SEGMENTS), gains, offsets))[1]


def main():
    scenes = [scene(seed) for seed in range(SEEDS)]
    print("| drift | matching | segment 2 | 8 | 32 |\n|---|---|---|---|---|")
    for name, draw in DRIFTS.items():
        for way, label in enumerate(WAYS):
            errors = []
            for seed in range(SEEDS):
                rng = np.random.default_rng(100 + seed)
                gains, offsets = map(np.float32, zip(*(draw(rng) for _ in range(SEGMENTS))))
                errors.append(run(scenes[seed], gains, offsets, jax.random.key(seed), way))
            mean = 255 * np.mean(errors, 0)
            print(f"| {name} | {label} | {mean[1]:.1f} | {mean[7]:.1f} | {mean[31]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
