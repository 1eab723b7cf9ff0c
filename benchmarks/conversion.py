"""Conversion of a full-size Stable Diffusion 3.5-large checkpoint: time, memory, kills and damage.

    python benchmarks/conversion.py SCRATCH --out benchmarks/conversion      everything; writes .json and .md
    python benchmarks/conversion.py SCRATCH --parts kills damage          some parts; --out keeps the others' results
    python benchmarks/conversion.py SCRATCH --scale tiny                  checks the script, not the speed

SCRATCH is a folder on the disk to be measured (made if it is missing); what the script writes there it removes. The
full size needs 50 GB. The checkpoint is generated: a diffusers folder of bfloat16 normals with the release's names and
shapes, in shards of 5 GB that follow the layers. CLIP-G, T5 and the tokenizers are left out.

- `speed`: a plain copy (`cp -r`, then every file synced) and `jdit convert` take turns; then `--check` and the way
  back, whose tensors are compared with the source byte by byte. Each run starts with the dirty pages of the machine
  written out, its target gone, and its source out of the page cache (fadvise; `drop_caches` needs root). Each is a
  process of its own, start-up included; memory is the kernel's peak resident set of that process.
- `kills`: SIGKILL at ten random moments of a conversion; what is left must not load, the next run must succeed.
- `damage`: broken checkpoints, PyTorch's and ours; each must be refused in one line that names file and tensor.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, where convert.py would hide the package of that name

from benchmarks.checkpoints import SHARD_BYTES, jdit_cases, upstream_cases  # noqa: E402

JDIT = [sys.executable, "-m", "jdit"]
TOOL = [sys.executable, "-m", "benchmarks.checkpoints"]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "400"}
PARTS = ["speed", "kills", "damage"]


# --- processes


class Run(NamedTuple):
    seconds: float
    processor: float  # seconds of all threads, children included
    peak: int  # bytes
    code: int
    said: str


def run(*command: str | Path) -> Run:
    """Run to the end; peak resident set from the kernel's account of this one child."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=ENV, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        processor = usage.ru_utime + usage.ru_stime
        return Run(seconds, processor, usage.ru_maxrss * 1024, process.returncode, log.read().decode().strip())


def must(*command: str | Path) -> Run:
    done = run(*command)
    if done.code:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.code}\n{done.said}")
    return done


def made(folder: Path, scale: str) -> Path:
    if not folder.exists():
        must(*TOOL, "generate", folder, "--scale", scale)
    return folder


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def cold(source: Path) -> None:
    """Nothing left to write on the machine, and the source's pages given up."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- the parts


def speed(scratch: Path, scale: str, rounds: int) -> dict:
    source, copy, out, back = made(scratch / "source", scale), *(scratch / n for n in ("copy", "jdit", "back"))
    if (free := shutil.disk_usage(scratch).free) < 2.1 * size(source):
        raise SystemExit(f"{scratch}: {free / 1e9:.0f} GB free, two more checkpoints must fit")
    copy_command = 'cp -r "$0" "$1" && find "$1" -exec sync {} +'
    takes: dict[str, list[Run]] = {"copy": [], "convert": []}
    for _ in range(rounds):
        for name, target, command in (
            ("copy", copy, ["sh", "-c", copy_command, source, copy]),
            ("convert", out, [*JDIT, "convert", source, out]),
        ):
            cold(source)
            takes[name].append(must(*command))
            tell(name, takes[name][-1])
            remove(target)
    cold(source)
    takes["convert --check"] = [must(*JDIT, "convert", source, out, "--check")]
    cold(out)
    takes["convert --to diffusers"] = [must(*JDIT, "convert", out, back, "--to", "diffusers")]
    for name in ("convert --check", "convert --to diffusers"):
        tell(name, takes[name][0])
    must(*TOOL, "compare", source, back)
    result = {"bytes": size(source), "rows": {n: rows(runs) for n, runs in takes.items()}}
    for path in (source, out, back):
        remove(path)
    return result


def rows(runs: list[Run]) -> dict:
    return {
        "seconds": [round(r.seconds, 1) for r in runs],
        "median": round(statistics.median(r.seconds for r in runs), 1),
        "processor": round(statistics.median(r.processor for r in runs), 1),
        "peak_gib": round(max(r.peak for r in runs) / 2**30, 2),
    }


def kills(scratch: Path, scale: str, times: int) -> dict:
    """SIGKILL in each tenth of the run, at a random moment of it, in random order."""
    source, out = made(scratch / "small", scale), scratch / "kills" / "out"
    out.parent.mkdir(exist_ok=True)
    lengths = []
    for _ in range(2):  # the first warms the page cache
        lengths.append(must(*JDIT, "convert", source, out).seconds)
        remove(out)
    rng = random.Random(0)
    moments = [min(lengths) * (i + rng.random()) / times for i in range(times)]
    rng.shuffle(moments)
    events = []
    while moments:
        process = subprocess.Popen(
            [*JDIT, "convert", str(source), str(out)], env=ENV, cwd=ROOT, stderr=subprocess.DEVNULL
        )
        time.sleep(moment := moments.pop())
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # the signal came after the renaming: then it must be whole, and an earlier moment is taken
            assert os.listdir(out.parent) == ["out"], os.listdir(out.parent)
            must(*JDIT, "inspect", out)
            remove(out)
            moments.append(moment * 0.9)
            continue
        partial = list(out.parent.iterdir())
        left = sum(map(size, partial))
        for path in {out, *partial}:
            look = run(*JDIT, "inspect", path)
            assert look.code == 2 and "\n" not in look.said, f"killed after {moment:.1f} s, {path}: {look}"
        again = must(*JDIT, "convert", source, out, "--check")
        assert "every tensor agrees" in again.said and os.listdir(out.parent) == ["out"], again.said
        must(*JDIT, "inspect", out)
        remove(out)
        events.append({"killed_after_s": round(moment, 2), "partial_gb": round(left / 1e9, 3)})
        say(f"killed after {moment:.1f} s: {left / 1e9:.2f} GB partial, nothing loads, the next run is whole")
    result = {"bytes": size(source), "whole_run_s": round(min(lengths), 1), "kills": events}
    remove(source)
    remove(out.parent)
    return result


def damage(scratch: Path) -> list[dict]:
    whole, ours, broken, out = made(scratch / "tiny", "tiny"), *(scratch / n for n in ("tiny_jdit", "broken", "out"))
    must(*JDIT, "convert", whole, ours, "--check")
    found = []
    for base, cases, to in ((whole, upstream_cases, ()), (ours, jdit_cases, ("--to", "diffusers"))):
        for what, file, harm, words in cases(base):
            remove(broken)
            shutil.copytree(base, broken)
            harm(broken / file)
            done = run(*JDIT, "convert", broken, out, *to)
            lacks = [w for w in (str(broken / file), *words) if w not in done.said]
            assert not out.exists() and not list(scratch.glob(".out.*")), f"{what}: something was written"
            ok = done.code == 2 and "\n" not in done.said and not lacks
            message = done.said.replace(f"{broken}/", "").replace(str(broken), ".")
            found.append({"layout": "jdit" if to else "diffusers", "what": what, "message": message, "ok": ok})
            say(f"{'ok  ' if ok else 'FAIL'} {what}: {message}" + f" (lacks {lacks})" * bool(lacks))
    for path in (whole, ours, broken):
        remove(path)
    return found


# --- the report


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("jax", "flax", "orbax-checkpoint", "tensorstore", "numpy")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    return f"{os.cpu_count()} cores, {memory:.0f} GiB of memory; Python {platform.python_version()}, {versions}"


def report(results: dict) -> str:
    """The results as a page."""
    out = [
        "# Conversion of Stable Diffusion 3.5-large",
        "",
        "Made by `benchmarks/conversion.py`, which says how it measures.",
    ]
    table = lambda *head: ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    if one := results.get("speed"):
        plain = one["rows"]["copy"]["median"]
        out += [
            "",
            "## Time and memory",
            "",
            f"{one['bytes'] / 1e9:.2f} GB of bfloat16. {one['when']}: {one['machine']}.",
        ]
        out += table("", "seconds, each run", "median", "MB/s", "times the copy", "processor, s", "peak memory, GiB")
        for name, r in one["rows"].items():
            rate, ratio = one["bytes"] / r["median"] / 1e6, r["median"] / plain
            cells = [name, ", ".join(map(str, r["seconds"])), r["median"], f"{rate:.0f}", f"{ratio:.2f}"]
            out.append(f"| {' | '.join(map(str, [*cells, r['processor'], r['peak_gib']]))} |")
        out += ["", "The tensors that came back equal the source byte by byte."]
    if one := results.get("kills"):
        about = (
            f"{one['bytes'] / 1e9:.2f} GB; a whole run takes {one['whole_run_s']} s. {one['when']}: {one['machine']}."
        )
        out += ["", "## Kills", "", about, "After each, `jdit inspect` refuses what is left; the next run succeeds,"]
        out += ["every tensor agrees with its source, and the debris is gone."]
        out += table("killed after, s", "written by then, GB")
        for e in sorted(one["kills"], key=lambda e: e["killed_after_s"]):
            out.append(f"| {e['killed_after_s']} | {e['partial_gb']} |")
    if one := results.get("damage"):
        out += ["", "## Damage", "", f"{one['when']}. Exit code 2, nothing written, and this one line:"]
        out += table("layout", "what was done", "what `jdit convert` says", "")
        for c in one["cases"]:
            verdict = "" if c["ok"] else "not good enough"
            out.append(f"| {c['layout']} | {c['what']} | `{c['message']}` | {verdict} |")
    return "\n".join(out) + "\n"


def tell(name: str, r: Run) -> None:
    load = os.getloadavg()[0]
    say(f"{name}: {r.seconds:.1f} s, processor {r.processor:.1f} s, {r.peak / 2**30:.2f} GiB; load average {load:.1f}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--scale", choices=list(SHARD_BYTES), default="full", help="of the speed part")
    parser.add_argument("--rounds", type=int, default=3, help="copies and conversions that take turns")
    parser.add_argument("--times", type=int, default=10, help="kills")
    parser.add_argument("--out", type=Path, help="stem of the .json and .md to write")
    args = parser.parse_args()
    scratch = args.scratch.absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    kept = args.out and args.out.with_suffix(".json")
    results = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for part in args.parts:
        if part == "speed":
            found = speed(scratch, args.scale, args.rounds)
        elif part == "kills":
            found = kills(scratch, "tiny" if args.scale == "tiny" else "small", args.times)
        else:
            found = {"cases": damage(scratch)}
        results[part] = found | {"when": f"{datetime.date.today()}", "machine": machine()}
        if args.out:
            kept.write_text(json.dumps(results, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(report(results))
    if not all(case["ok"] for case in results.get("damage", {}).get("cases", [])):
        sys.exit(1)


if __name__ == "__main__":
    main()
