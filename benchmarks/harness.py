"""What the GPU benchmarks share: random weights on both sides, the matrix-product ceiling, a process a case, results.

A benchmark gives its cases (names `who:what`), a function that makes the Work of one, and the operations that a unit of
work takes; `main` runs each case in a process of its own with empty compilation caches, and writes .json and .md.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

STARTED = time.perf_counter()
CHAIN = 8  # matrix products in a row for the ceiling


class Work(NamedTuple):
    """What a side gives to be timed: a call of `units` steps, how to wait for it, the ceiling's product, and facts."""

    call: Callable[[], Any]
    ready: Callable[[Any], Any]
    product: Callable[[], Any]
    product_size: int
    facts: Callable[[], dict[str, Any]]
    units: int = 1


def jax_weights(make: Callable[[], Any], deviation: Callable[[tuple[int, ...]], float] = lambda shape: 0.02) -> Any:
    """A module with weights of this standard deviation, norms about 1. Hashed indices: generators compile slowly."""
    import jax
    import jax.numpy as jnp

    from jdit import sharding

    _, shapes = sharding.abstract(make)

    def draw(seed: int, path, like):
        n = jax.lax.iota(jnp.uint32, math.prod(like.shape)) * jnp.uint32(2654435761) + jnp.uint32(seed * 40503)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            n = (n ^ (n >> shift)) * jnp.uint32(factor)
        unit = (n >> 8).astype(jnp.float32) / 2**24 - 0.5  # of standard deviation 12**-0.5
        return (unit * deviation(like.shape) * 12**0.5 + (path[-1] == "scale")).astype(like.dtype).reshape(like.shape)

    fill = jax.jit(lambda: [draw(i, *item) for i, item in enumerate(shapes.items())])
    return sharding.assemble(make, dict(zip(shapes, fill())))


def jax_work(call: Callable[[], Any], tiny: bool, units: int = 1) -> Work:
    import jax
    import jax.numpy as jnp
    import numpy as np

    size = 256 if tiny else 8192
    a, b = (jax.random.normal(k, (size, size), jnp.bfloat16) for k in jax.random.split(jax.random.key(2)))
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, CHAIN, lambda _, x: x @ a, b))
    a = a * size**-0.5

    def facts() -> dict[str, Any]:
        if not np.isfinite(np.asarray(call(), np.float32)).all():
            raise FloatingPointError("NaN or infinity")
        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        return {"peak_gb": peak, "device": device.device_kind, "versions": f"jax {jax.__version__}"}

    return Work(call, jax.block_until_ready, lambda: chain(a, b), size, facts, units)


def torch_weights(make: Callable[[], Any], keep: Sequence[str] = ()) -> Any:
    """A bfloat16 module like that of `jax_weights`; modules whose name has a part in `keep` stay float32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        module = make().to(torch.bfloat16).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for name, p in module.named_parameters():
        if any(part in name.split(".") for part in keep):
            p.data = p.data.float()
        torch.nn.init.normal_(p, std=0.02)
    for m in module.modules():
        if "Norm" in type(m).__name__ and isinstance(getattr(m, "weight", None), torch.nn.Parameter):
            m.weight += 1
    return module


def torch_work(call: Callable[[], Any], tiny: bool, units: int = 1) -> Work:
    import diffusers
    import torch

    on_gpu = torch.cuda.is_available()
    size = 256 if tiny else 8192
    draw = lambda: torch.randn(size, size, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16)
    a, b = draw() * size**-0.5, draw()

    def quiet():
        with torch.no_grad():
            return call()

    def product():
        x = b
        for _ in range(CHAIN):
            x = x @ a
        return x

    def facts() -> dict[str, Any]:
        if not torch.isfinite(quiet()).all():
            raise FloatingPointError("NaN or infinity")
        return {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        }

    return Work(quiet, lambda _: torch.cuda.synchronize() if on_gpu else None, product, size, facts, units)


def times(call: Callable[[], Any], ready: Callable[[Any], Any], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        ready(call())
        out.append(time.perf_counter() - start)
    return out


def measure(case: str, work: Work, repeats: int) -> dict[str, Any]:
    """One case, in this process: median time of a unit, spread, compile time, start-up, peak memory, ceiling."""
    work.ready(None)
    row: dict[str, Any] = {"case": case, "startup_s": time.perf_counter() - STARTED}
    times(work.product, work.ready, 1)
    # in short bursts on a chip at rest, where it is fastest: after minutes of load it was 15% lower
    row["ceiling"] = CHAIN * 2 * work.product_size**3 / 1e12 / min(times(work.product, work.ready, 5))
    first = times(work.call, work.ready, 1)[0]
    row["first_call_at_s"] = time.perf_counter() - STARTED
    runs = times(work.call, work.ready, repeats)
    middle = statistics.median(runs)
    row |= {"time_s": middle / work.units, "spread": (max(runs) - min(runs)) / middle, "compile_s": first - middle}
    return row | work.facts()


def run_case(script: str, case: str, passed: Sequence[str]) -> dict[str, Any] | None:
    """One case in a process of its own, with empty compilation caches; None if it fails."""
    command = [sys.executable, os.path.abspath(script), "--case", case, *passed]
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env | {"TRITON_CACHE_DIR": f"{cache}/t"})
    found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or not found:
        print(f"{case} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    print(found[0], flush=True)
    return json.loads(found[0])


def report(rows: Sequence[dict[str, Any]], about: str, tflop: Callable[[str], float], failed: Sequence[str]) -> str:
    """Markdown: the table with ratios to the peer and shares of the ceiling."""
    by = {r["case"]: r for r in rows}
    versions = ", ".join(sorted({r["versions"] for r in rows}))
    ceiling = max(r["ceiling"] for r in rows)
    lines = [
        f"{datetime.date.today()}, {rows[0]['device']}, {versions}; {about} Ceiling of matrix products {ceiling:.0f} "
        "TFLOP/s.",
        "",
        "| what | who | ms | x peer | spread | TFLOP/s | of ceiling | compile, s | x peer | result at, s | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        who, what = r["case"].split(":")
        peer = by.get(f"diffusers:{what}")
        ratio = lambda key, r=r, peer=peer: f"{r[key] / peer[key]:.2f}" if peer else ""
        rate = tflop(what) / r["time_s"]
        lines.append(
            f"| {what} | {who} | {1e3 * r['time_s']:.1f} | {ratio('time_s')} | {r['spread']:.1%} | {rate:.0f} "
            f"| {rate / ceiling:.0%} | {r['compile_s']:.1f} | {ratio('compile_s')} | {r['first_call_at_s']:.1f} "
            f"| {r['peak_gb']:.1f} |"
        )
    staged = {r["case"]: r["stages"] for r in rows if "stages" in r}
    if names := sorted({name for stages in staged.values() for name in stages}):
        lines += ["", "Seconds a stage:", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for case, stages in staged.items():
            lines.append(f"| {case} | {' | '.join(f'{stages[n]:.2f}' if n in stages else '' for n in names)} |")
    return "\n".join([*lines, *(f"\nFailed: {name}." for name in failed)]) + "\n"


def main(
    script: str,
    doc: str | None,
    cases: Sequence[str],
    work: Callable[[str, bool], Work],
    tflop: Callable[[str], float],
    about: str,
    repeats: int = 5,
):
    """The command line of a benchmark.

    Args:
        script: its file. cases: in the order in which they run. work: (case, tiny) -> Work.
        tflop: operations of one unit of a case's `what`, multiply-add = 2. about: a sentence for the report.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=cases, help="run one case in this process and print its row")
    parser.add_argument("--only", default="", help="run the cases that contain one of these texts (a,b)")
    parser.add_argument("--out", default=os.path.basename(script)[:-3], help="path of the results, without suffix")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed calls a case; {repeats} without it")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the script")
    args = parser.parse_args()
    if args.case:
        print("ROW " + json.dumps(measure(args.case, work(args.case, args.tiny), args.repeats)), flush=True)
        return
    rows, failed = [], []
    for case in (c for c in cases if any(text in c for text in args.only.split(","))):
        row = run_case(script, case, [f"--repeats={args.repeats}", *["--tiny"] * args.tiny])
        (failed if row is None else rows).append(case if row is None else row)
        if rows:
            with open(f"{args.out}.json", "w") as f:
                json.dump(rows, f, indent=1)
            with open(f"{args.out}.md", "w") as f:
                f.write(report(rows, about, tflop, failed))
    if rows:
        with open(f"{args.out}.md") as f:
            print(f.read())
    sys.exit(bool(failed))
