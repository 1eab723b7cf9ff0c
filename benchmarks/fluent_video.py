"""The figures of fluent-video: reconstruction, recall of training captions, motion, combinations never trained.

    python benchmarks/fluent_video.py DATA --model FOLDER [--json out.json]

DATA is the folder that jdit/train/recipes/fluent_video/prepare.py writes. Runs on whatever device JAX has; --captions
and --unseen make it shorter.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jdit
from jdit.train import clips, config
from jdit.train.recipes.fluent_video.prepare import motion as motion_of
from jdit.train.sheet import film_strips, recall
from jdit.train.vae import psnr
from jdit.train.video_flow import motion
from jdit.train.video_vae import batches


def through(pipe, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised latents of clips, and what the autoencoder makes of them, uint8."""

    @jax.jit
    def run(vae, x):
        z = vae.encode(x.astype(jnp.float32) / 127.5 - 1).mean
        return vae.normalise(z), jnp.round((vae.decode(z) / 2 + 0.5) * 255).astype(jnp.uint8)

    parts = [run(pipe.components["vae"], frames[i]) for i in batches(len(frames), 16)]
    z, y = (np.concatenate([np.asarray(p[n]) for p in parts])[: len(frames)] for n in range(2))
    return z, y


def generate(pipe, prompts: list[str], *, size: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and latents of prompts, a batch at a time; batch k has seed k."""
    outs = [pipe([prompts[i] for i in rows], seed=k, **options) for k, rows in enumerate(batches(len(prompts), size))]
    pixels, latents = ([np.asarray(getattr(o, name)) for o in outs] for name in ("pixels", "latents"))
    return np.concatenate(pixels)[: len(prompts)], np.concatenate(latents)[: len(prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="fluent-video")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--unseen", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    args = parser.parse_args()
    start = time.monotonic()
    pipe = jdit.load(args.model, dtype=args.dtype)
    size = config.read("fluent-video/wan").data
    train, held = clips.read(args.data, size.frames, size.size)
    options = {"size": args.batch, "steps": args.steps, "guidance": args.guidance, "height": size.size,
               "width": size.size, "num_frames": size.frames}  # fmt: skip
    known, _ = through(pipe, train.frames)
    held_latents, held_again = through(pipe, held.frames)
    frames = lambda a: jnp.asarray(a.reshape(-1, *a.shape[2:]), jnp.float32) / 255
    values = np.asarray(psnr(frames(held.frames), frames(held_again)))
    figures: dict = {"reconstruction": {"clips": len(held.items), "psnr_mean": float(values.mean()),
                                        "psnr_min": float(values.min())}}  # fmt: skip

    rows = np.random.default_rng(0).permutation(len(train.items))[: args.captions]
    captions = [train.items[r].text for r in rows]
    pixels, latents = generate(pipe, captions, **options)
    figures["recall"] = {"captions": len(rows), **recall(latents, known, rows)}
    figures["motion"] = {"generated": motion(pixels), "data": motion(train.frames[rows])}

    unseen = [i.text for i in held.items][: args.unseen]
    new_pixels, new_latents = generate(pipe, unseen, **options)
    both = np.concatenate([known, held_latents])
    right = len(known) + np.arange(len(unseen))
    names = [motion_of(i.text) for i in (*train.items, *held.items)]
    flat = lambda a: a.reshape(len(a), -1)
    nearest = [int(np.square(flat(both) - z.reshape(1, -1)).sum(1).argmin()) for z in new_latents]
    same = [names[n] == motion_of(t) for n, t in zip(nearest, unseen)]
    figures["unseen"] = {"captions": len(unseen), **recall(new_latents, both, right), "motion": float(np.mean(same))}
    figures["run"] = {"model": Path(args.model).name, "steps": args.steps, "guidance": args.guidance,
                      "dtype": args.dtype, "device": jax.devices()[0].device_kind,
                      "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
        jdit.contact_sheet(film_strips(pixels[:32]), captions[:32], columns=4).save(args.sheets / "captions.png")
        jdit.contact_sheet(film_strips(new_pixels[:32]), unseen[:32], columns=4).save(args.sheets / "unseen.png")
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
