"""The figures of fluent-animate: held-out clips, made from their first frame and another character's motion.

    python benchmarks/fluent_animate.py data/fluent_animate --model FOLDER [--json out.json] [--sheets DIR]

DATA is the folder that jdit/train/recipes/fluent_animate/prepare.py writes. A pair is a clip that was never trained and
one that shares its motion: the character is new ("character"), or the whole motion is ("motion"). Distances are the
root of the mean squared difference to the true clip in levels of 8 bits, segment by segment: of what was made, and of
two baselines, the still reference and the driving clip itself. Through `jdit.load`, on whatever device JAX has.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np

import jdit
from jdit.train import clips, config
from jdit.train.drive import drawing, heads
from jdit.train.sheet import film_strips
from jdit.train.video_animate import distances, held_out_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="fluent-animate")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--overlap", type=int, default=1, choices=(1, 5))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets: truth, made, driver")
    args = parser.parse_args()
    start = time.monotonic()
    pipe = jdit.load(args.model, dtype=args.dtype)
    data = config.read("fluent-animate/animate").data
    train, held = clips.read(args.data, data.frames, data.size)
    items, frames = [*train.items, *held.items], np.concatenate([train.frames, held.frames])
    pairs = held_out_pairs([i.group for i in items], len(train.items), args.pairs)
    own = data.segment - args.overlap
    rows = np.arange(args.segments * own + args.overlap) % data.frames
    side = pipe.components["transformer"].cfg.face_size
    truth, other = frames[pairs.target][:, rows], frames[pairs.driver][:, rows]
    faces = np.stack([heads(f, side) for f in frames[pairs.driver]])[:, rows]
    made = []
    for n, target in enumerate(pairs.target):
        out = pipe(
            items[target].text, image=truth[n, 0], pose_video=drawing(other[n]), face_video=faces[n], seed=n,
            height=data.size, width=data.size, segment_frames=data.segment, overlap_frames=args.overlap,
            steps=args.steps, guidance=args.guidance,
        )  # fmt: skip
        made.append(np.asarray(out.pixels)[0])
    made = np.stack(made)
    known = {i.group for i in train.items}
    new = np.asarray([items[t].group not in known for t in pairs.target])
    figures: dict = {}
    for kind, chosen in (("character", ~new), ("motion", new)):
        if not chosen.any():
            continue
        ends = [args.overlap + n * own for n in range(args.segments + 1)]
        parts = [slice(a if n else 0, b) for n, (a, b) in enumerate(itertools.pairwise(ends))]
        whole, *each = (
            distances(made[chosen, part], truth[chosen, part], other[chosen, part], truth[chosen, :1])
            for part in (slice(None), *parts)
        )
        errors = np.square(made[chosen].astype(np.float32) - truth[chosen]).mean((1, 2, 3, 4))
        figures[kind] = {"pairs": int(chosen.sum()), **whole, "worst": float(np.sqrt(errors.max())), "segments": each}
    figures["run"] = {"model": Path(args.model).name, "segments": args.segments, "overlap": args.overlap,
                      "steps": args.steps, "guidance": args.guidance, "dtype": args.dtype,
                      "device": jax.devices()[0].device_kind,
                      "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
        shown = np.stack([film_strips(a, 9) for a in (truth, made, other)], 1)
        for kind, chosen in (("character", ~new), ("motion", new)):
            if chosen.any():
                sheet = shown[chosen][:12].reshape(-1, *shown.shape[2:])
                jdit.contact_sheet(sheet, columns=3).save(args.sheets / f"{kind}.png")
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
