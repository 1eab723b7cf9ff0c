"""The figures of fluent-image: reconstruction, recall of training captions, colours that were never trained.

    python benchmarks/fluent_image.py DATA [--model fluent-image] [--json out.json]

DATA is the folder that jdit/train/recipes/fluent_image/prepare.py writes. Runs on whatever device JAX has;
--captions and --pairs make it shorter.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jdit
from jdit.train import colour, config, data
from jdit.train.examples import article, read_held_out, render
from jdit.train.sheet import recall
from jdit.train.vae import psnr

log = logging.getLogger("jdit")


def batches(n: int, size: int):
    """Index arrays of one size; the last repeats its final index."""
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size), n - 1)


def on_white(pictures: data.Pictures, index: np.ndarray):
    """Pictures (B, S, S, 3) in [0, 1] on a white background."""
    rgba, none = jnp.asarray(pictures.rgba[index]), np.zeros(len(index), np.int32)
    return render(rgba, jnp.asarray(pictures.colours[index]), np.arange(len(index)), none - 1, none)


def reconstruction(pipe, pictures: data.Pictures) -> dict[str, float]:
    """Peak signal to noise of the autoencoder (posterior mean, 8-bit result), in dB."""
    vae = pipe.components["vae"]

    @jax.jit
    def run(vae, x):
        y = vae.decode(vae.encode(x * 2 - 1).mean) / 2 + 0.5
        return psnr(jnp.round(jnp.clip(y, 0, 1) * 255) / 255, x)

    n = len(pictures.items)
    values = np.concatenate([np.asarray(run(vae, on_white(pictures, i))) for i in batches(n, 16)])[:n]
    return {"pictures": n, "psnr_mean": float(values.mean()), "psnr_min": float(values.min())}


def known_latents(pipe, pictures: data.Pictures) -> np.ndarray:
    """Normalised latents of all pictures."""
    vae = pipe.components["vae"]
    run = jax.jit(lambda vae, x: vae.normalise(vae.encode(x * 2 - 1).mean))
    n = len(pictures.items)
    return np.concatenate([np.asarray(run(vae, on_white(pictures, i))) for i in batches(n, 16)])[:n]


def generate(pipe, prompts: list[str], *, size: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and latents of prompts, a batch at a time; batch k has seed k."""
    pixels, latents = [], []
    for k, index in enumerate(batches(len(prompts), size)):
        out = pipe([prompts[i] for i in index], seed=k, **options)
        pixels.append(np.asarray(out.pixels))
        latents.append(np.asarray(out.latents))
    return np.concatenate(pixels)[: len(prompts)], np.concatenate(latents)[: len(prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="fluent-image")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--solver", help="the checkpoint's if not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets, the failures among them")
    args = parser.parse_args()
    start = time.monotonic()
    pipe = jdit.load(args.model, dtype=args.dtype)
    recipe = config.read("fluent-image/mmdit")
    train, val = data.read(args.data, recipe.data.size)
    options = {"size": args.batch, "steps": args.steps, "guidance": args.guidance, "solver": args.solver}
    figures: dict = {"reconstruction": reconstruction(pipe, val)}

    rows = np.random.default_rng(0).permutation(len(train.items))[: args.captions]
    captions = [train.items[r].text for r in rows]
    pixels, latents = generate(pipe, captions, **options)
    known = known_latents(pipe, train)
    figures["recall"] = {"captions": len(rows), **recall(latents, known, rows)}
    hits = [recall(z[None], known, np.asarray([r]))["top1"] for z, r in zip(latents, rows)]

    pairs = sorted(read_held_out(recipe.data.held_out, recipe.path))[: args.pairs]
    coloured, _ = generate(pipe, [article(p) for p in pairs], **options)
    seen = [colour.name_colour(p / np.float32(255))[0] for p in coloured]
    right = [s == p.split(" ")[0] for s, p in zip(seen, pairs)]
    figures["colours"] = {"pairs": len(pairs), "right": float(np.mean(right)),
                          "wrong": [f"{p}: {s}" for p, s, ok in zip(pairs, seen, right) if not ok]}  # fmt: skip
    device, seconds = jax.devices()[0].device_kind, round(time.monotonic() - start, 1)
    figures["run"] = {"model": str(args.model), "steps": args.steps, "guidance": args.guidance, "dtype": args.dtype,
                      "device": device, "seconds": seconds}  # fmt: skip
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
        wrong = np.flatnonzero(np.asarray(hits) == 0)
        jdit.contact_sheet(pixels[:64], captions[:64], columns=8).save(args.sheets / "captions.png")
        jdit.contact_sheet(coloured[:64], pairs[:64], columns=8).save(args.sheets / "colours.png")
        if len(wrong):
            missed = [captions[i] for i in wrong[:32]]
            jdit.contact_sheet(pixels[wrong[:32]], missed, columns=8).save(args.sheets / "missed.png")
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
