"""Memory and time of Wan-Animate against the number of segments: a small random model on the CPU, no torch.

    python benchmarks/animate.py --out benchmarks/animate      every case; writes .json and .md
    python benchmarks/animate.py --only stream --counts 2,8    some of them

A case is a form and a number of segments, in a process of its own: "stream" writes each segment to an mp4 file and
forgets it, as `jdit generate` does; "call" returns the whole video, its segments a loop of programs; "scan" the same as
one program. The driving videos are mp4 files of the case's length, read as the segments need them. Frames are float32,
four times what users ask for, so that what is collected shows.

The resident set is counted from the end of the first segment, when everything is compiled: its size there, and by how
much the highest size after that lies above it (Linux: VmHWM, set back through /proc/self/clear_refs). "arrays" are the
bytes of all JAX arrays, the weights among them, at the end of a segment. Seconds are those between the ends of
segments, without the first; one program has its compilation before the first and its merge after the last. How fast
full-size networks are is in animate_speed.py.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

COUNTS, FORMS = (2, 8, 32), ("stream", "call", "scan")
LENGTH, OVERLAP, HEIGHT, WIDTH, STEPS = 17, 1, 64, 112, 2


def frames(count: int) -> int:
    return OVERLAP + count * (LENGTH - OVERLAP)


def small() -> dict[str, Any]:
    """Configs of a Wan-Animate of 0.2 M parameters; its latents are Wan's."""
    from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
    from jdit.nn.vision.clip import CLIPVisionConfig
    from jdit.nn.wan_animate_config import WanAnimateConfig

    return {
        "transformer": WanAnimateConfig(
            heads=2, head_dim=16, mlp=64, layers=4, group=2, text_dim=32, freq_dim=16, image_dim=32,
            face_channels=(4, 4, 8, 8), motion_features=8, motion_directions=4, motion_width=8, face_width=16,
        ),
        "vae": AutoencoderKLWanConfig(width=4, multipliers=(1, 1, 2, 2), layers=1),
        "image_encoder": CLIPVisionConfig(width=32, mlp=64, layers=2, heads=2, patch=56),
    }  # fmt: skip


def pipeline(configs: dict[str, Any], **plan: Any) -> Any:
    """A Wan-Animate of random weights, without what reads words; calls take the prompt of `prompt`."""
    import math

    from convert import registry
    from jdit import zoo
    from jdit.pipeline.base import Parts
    from jdit.pipeline.executor import Weights
    from jdit.pipeline.wan_animate import WanAnimation
    from jdit.structs import Plan

    scheduler = zoo.VARIANTS["wan2.2-animate-14b"].scheduler
    parts = Parts("wan-animate", None, configs, {}, scheduler, Plan(overlap_frames=OVERLAP, **plan))
    if problems := WanAnimation.misfits(parts):
        raise ValueError("; ".join(problems))
    unit = lambda shape: 0.1 if len(shape) == 1 else math.prod(shape[:-1]) ** -0.5  # the VAE's convolutions
    deviations = {"vae": unit}
    weights = {
        name: harness.jax_weights(registry.of_config(cfg).make(cfg), deviations.get(name, lambda shape: 0.02))
        for name, cfg in configs.items()
    }
    return WanAnimation(parts, Weights(weights))


def prompt(tokens: int, width: int, dtype: str = "float32") -> Any:
    import jax

    from jdit.structs import Prompt, Text

    return Prompt(Text(jax.random.normal(jax.random.key(1), (1, tokens, width), dtype)))


def picture(seed: int, height: int, width: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def driving(folder: Path, count: int, height: int, width: int, side: int) -> dict[str, str]:
    """Pose and face videos as files, written a few frames at a time; those of an earlier case are taken again."""
    import numpy as np

    from jdit.video_writer import VideoWriter

    out = {}
    for name, size in {"pose_video": (height, width), "face_video": (side, side)}.items():
        path = folder / f"{name}_{count}.mp4"
        if not path.exists():
            still = picture(len(name), *(-(-n // 16) for n in size)).repeat(16, 0).repeat(16, 1)[: size[0], : size[1]]
            with VideoWriter(path, 30, *size) as writer:
                for i in range(count):
                    writer.write(np.roll(still, 3 * i, 1)[None])
        out[name] = str(path)
    return out


def resident() -> dict[str, float]:
    """MB of this process: now, and the most since `forget`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM")}


def forget():
    Path("/proc/self/clear_refs").write_text("5")


def measure(form: str, count: int, folder: Path) -> dict[str, Any]:
    """One case, in this process."""
    import jax
    import numpy as np

    from jdit.video_writer import VideoWriter

    configs = small()
    pipe = pipeline(configs, steps=STEPS, guidance=1.0, fps=30.0)
    ends: list[float] = []
    first: dict[str, float] = {}
    arrays: list[int] = []

    def on_segment(done: int, total: int):
        ends.append(time.perf_counter())
        if form != "scan":  # inside one program there is nothing to be seen
            arrays.append(sum(a.nbytes for a in jax.live_arrays()))
        if done == 1:
            forget()
            first.update(resident())

    given: dict[str, Any] = dict(
        image=picture(0, HEIGHT, WIDTH), height=HEIGHT, width=WIDTH, segment_frames=LENGTH, output="float",
        on_segment=on_segment, **driving(folder, frames(count), HEIGHT, WIDTH, configs["transformer"].face_size),
    )  # fmt: skip
    text = prompt(8, configs["transformer"].text_dim)
    if form == "stream":
        made = 0
        with VideoWriter(folder / f"out_{count}.mp4", 30, HEIGHT, WIDTH, growing=True) as writer:
            for out in pipe.stream(text, **given):
                writer.write(out.pixels[0])
                made += out.pixels.shape[1]
    else:
        out = pipe(text, scan_segments=form == "scan", **given)
        arrays.append(sum(a.nbytes for a in jax.live_arrays()))
        made = out.pixels.shape[1]
        assert np.isfinite(out.pixels).all()
    assert made == frames(count), made
    spent = np.diff(ends)
    return {
        "form": form, "segments": count, "frames": made, "seconds": statistics.median(spent),
        "last": float(np.mean(spent[-4:])), "resident_mb": first["VmRSS"],
        "growth_mb": resident()["VmHWM"] - first["VmRSS"], "arrays_mb": max(arrays) / 1e6,
    }  # fmt: skip


def report(rows: list[dict[str, Any]], failed: list[str]) -> str:
    """Markdown."""
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax", "numpy", "av"))
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpu if line.startswith("model name")), platform.machine())
    segment = LENGTH * HEIGHT * WIDTH * 12 / 1e6
    lines = [
        "# Wan-Animate against the number of segments",
        "",
        "Made by `benchmarks/animate.py`, which says how it measures; a small random model, no checkpoint.",
        f"Segments of {LENGTH} frames of {HEIGHT} x {WIDTH} in float32, {segment:.1f} MB each; {STEPS} steps.",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores of {model}, shared with other work; "
        f"Python {platform.python_version()}, {versions}.",
        "",
        "| form | segments | frames | resident after the first, MB | growth after it, MB | arrays, MB | s a segment | "
        "of the last four |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['form']} | {r['segments']} | {r['frames']} | {r['resident_mb']:.0f} | {r['growth_mb']:.0f} "
            f"| {r['arrays_mb']:.1f} | {r['seconds']:.2f} | {r['last']:.2f} |"
        )
    return "\n".join([*lines, *(f"\nFailed: {name}." for name in failed)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="run one form:segments in this process and print its row")
    parser.add_argument("--folder", type=Path, help="with --case: where the driving videos are")
    parser.add_argument("--only", default="", help="run the forms that contain this text")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="numbers of segments, 2 or more")
    parser.add_argument("--out", default="animate", help="path of the results, without suffix")
    args = parser.parse_args()
    if args.case:
        form, count = args.case.split(":")
        print("ROW " + json.dumps(measure(form, int(count), args.folder)), flush=True)
        return
    rows, failed = [], []
    cases = [f"{form}:{n}" for form in FORMS if args.only in form for n in args.counts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            command = [sys.executable, os.path.abspath(__file__), "--case", case, "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
            if done.returncode or not found:
                failed.append(case)
                print(f"{case} failed with exit code {done.returncode}", file=sys.stderr)
                continue
            print(found[0], flush=True)
            rows.append(json.loads(found[0]))
    if rows:
        Path(f"{args.out}.json").write_text(json.dumps(rows, indent=1) + "\n")
        Path(f"{args.out}.md").write_text(report(rows, failed))
        print(report(rows, failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
