"""Draws docs/images/solvers.png: how far each solver is from the exact solution, against its number of steps.

    pip install matplotlib
    python docs/solvers.py

The data is a mixture of three Gaussians on the line, whose perfect network and exact flow are known in closed form
(tests/util_mixture.py). Deterministic solvers start from 400 quantiles of the noise and are compared with where the
flow takes them; stochastic ones start from half a million draws, and the distribution that they end in is compared with
the exact one. Both are distances W1 in the units of the data, of standard deviation 1.08. float64; some minutes.

Levels: the flow schedule of Wan (shift 3, the last step to noise level 0); Stable Diffusion's betas spaced as Karras
does, from the largest training sigma to the smallest. CogVideoX's DPM takes counts that divide its 1000 steps.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import util_mixture as mixture  # noqa: E402

from jdit import sampling  # noqa: E402

jax.config.update("jax_enable_x64", True)
STEPS = (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 140, 200)
DRAWS = 2**19
UNIPC = {"_class_name": "UniPCMultistepScheduler"}
FLOW = {**UNIPC, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
DIFFUSION = {**UNIPC, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
             "beta_end": 0.012, "use_karras_sigmas": True}  # fmt: skip
TRAILING = {**DIFFUSION, "use_karras_sigmas": False, "timestep_spacing": "trailing"}
COG_DPM = {"_class_name": "CogVideoXDPMScheduler", "prediction_type": "v_prediction", "timestep_spacing": "trailing",
           "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}  # fmt: skip

unipc = lambda order, variant="bh2": lambda g, kind: sampling.unipc(g, order=order, variant=variant, prediction=kind)
dpm = lambda order, kind="midpoint", sde=False: (
    lambda g, prediction: sampling.dpmpp(g, order=order, kind=kind, prediction=prediction, stochastic=sde)
)
# name: builder, colour, line, marker
SOLVERS = {
    "Euler = DDIM = DPM++ 1": (lambda g, kind: sampling.ddim(g, prediction=kind), "#555555", "-", "o"),
    "DPM++ 2, midpoint": (dpm(2), "#1f77b4", "-", "s"),
    "DPM++ 2, heun": (dpm(2, "heun"), "#1f77b4", "--", None),
    "DPM++ 3": (dpm(3), "#17a2b8", "-", "D"),
    "UniPC-1": (unipc(1), "#f2b134", "-", "v"),
    "UniPC-2, bh2": (unipc(2), "#d62728", "-", "^"),
    "UniPC-2, bh1": (unipc(2, "bh1"), "#d62728", "--", None),
    "UniPC-3, bh2": (unipc(3), "#7b2d8b", "-", "P"),
    "UniPC-3, bh1": (unipc(3, "bh1"), "#7b2d8b", "--", None),
}
STOCHASTIC = {
    "SDE-DPM++ 1, flow": (dpm(1, sde=True), FLOW, "#2e8b57", "--", "o"),
    "SDE-DPM++ 2, flow": (dpm(2, sde=True), FLOW, "#2e8b57", "-", "s"),
    "SDE-DPM++ 1, variance preserving": (dpm(1, sde=True), DIFFUSION, "#e07b39", "--", "o"),
    "SDE-DPM++ 2, variance preserving": (dpm(2, sde=True), DIFFUSION, "#e07b39", "-", "s"),
    "CogVideoX's DPM": (None, COG_DPM, "#3b4cc0", "-", "^"),
}


def table_of(config: dict, steps: int, build=None) -> tuple[sampling.Table, float, float]:
    """The config's levels under another solver, and the level where they end."""
    if build is None:
        return sampling.from_config(config, steps), 1.0, 0.0
    if config is DIFFUSION:  # ends in the smallest sigma
        t = sampling.from_config(config, steps + 1)
        grid = sampling.Grid(t.alpha, t.sigma, t.timestep[:-1])
    else:
        t = sampling.from_config(config, steps)
        grid = sampling.Grid(np.append(t.alpha, 1.0), np.append(t.sigma, 0.0), t.timestep)
    return build(grid, config["prediction_type"]), grid.alpha[-1], grid.sigma[-1]


def run(kind: str):
    model = mixture.network(kind)
    levels = lambda table: (jnp.asarray(table.alpha), jnp.asarray(table.sigma))
    return jax.jit(lambda x, table, key: sampling.solve(model, x, table, key=key, per_step=levels(table)))


RUN = {kind: run(kind) for kind in ("flow_prediction", "v_prediction")}


def followed(config: dict, build, steps: int) -> float:
    """Mean distance from the exact flow."""
    (table, *final), mass = table_of(config, steps, build), (np.arange(400) + 0.5) / 400
    x = mixture.quantile(mass, table.alpha[0], table.sigma[0])
    end = RUN[config["prediction_type"]](x, jax.tree.map(jnp.asarray, table), None)
    return float(np.abs(end - mixture.quantile(mass, *final)).mean())


def drawn(key: jax.Array, alpha: float, sigma: float) -> jax.Array:
    """Exact samples of a noise level."""
    which, own, noise = jax.random.split(key, 3)
    k = jax.random.choice(which, 3, (DRAWS,), p=jnp.asarray(mixture.WEIGHTS))
    data = jnp.asarray(mixture.MEANS)[k] + jnp.asarray(mixture.STDS)[k] * jax.random.normal(own, (DRAWS,))
    return alpha * data + sigma * jax.random.normal(noise, (DRAWS,))


def distributed(config: dict, build, steps: int) -> float:
    """Distance of the distribution at the end from the exact one."""
    (table, *final), keys = table_of(config, steps, build), jax.random.split(jax.random.key(steps))
    x = drawn(keys[0], table.alpha[0], table.sigma[0])
    end = RUN[config["prediction_type"]](x, jax.tree.map(jnp.asarray, table), keys[1])
    return float(np.abs(np.sort(end) - exact(*final)).mean())


@functools.cache
def exact(alpha: float, sigma: float) -> np.ndarray:
    return mixture.quantile((np.arange(DRAWS) + 0.5) / DRAWS, alpha, sigma)


def main():
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8), sharex=True, layout="constrained")

    def draw(ax, name, counts, error, colour, line, marker):
        errors = [error(n) for n in counts]
        print(f"{ax.get_title()}; {name}:", *(f"{n}: {e:.2e}" for n, e in zip(counts, errors)), flush=True)
        ax.loglog(counts, errors, line, color=colour, marker=marker, ms=3.5, lw=1.4, label=name)

    for ax, (title, config) in zip(axes, (("flow, shift 3", FLOW), ("variance preserving, Karras", DIFFUSION))):
        ax.set_title(f"deterministic; {title}", fontsize=10)
        for name, (build, *style) in SOLVERS.items():
            draw(ax, name, STEPS, lambda n, c=config, b=build: followed(c, b, n), *style)
    error = lambda n: followed(TRAILING, SOLVERS["UniPC-2, bh2"][0], n)
    draw(axes[1], "UniPC-2, trailing timesteps, to 0", STEPS, error, "#999999", ":", None)
    axes[2].set_title("stochastic", fontsize=10)
    for name, (build, config, *style) in STOCHASTIC.items():
        counts = [n for n in STEPS if n <= 100 and (build or 1000 % n == 0)]
        draw(axes[2], name, counts, lambda n, c=config, b=build: distributed(c, b, n), *style)
    floor = float(np.abs(np.sort(drawn(jax.random.key(0), 1.0, 0.0)) - exact(1.0, 0.0)).mean())
    print(f"floor: {floor:.2e}")
    axes[2].axhline(floor, color="#999999", lw=1, ls=":", label="as many exact samples")
    axes[0].set_ylabel("mean distance from the exact solution")
    axes[2].set_ylabel("distance of the distributions")
    ticks = (5, 10, 20, 50, 100, 200)
    for ax in axes:
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        ax.set_xlabel("steps")
        ax.grid(True, lw=0.4, alpha=0.5)
        ax.legend(fontsize=8, frameon=False, loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    picture = Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(ROOT / "docs" / "images" / "solvers.png", optimize=True)


if __name__ == "__main__":
    main()
