"""What the loop costs beside the network: a step of jdit's solvers and of diffusers' schedulers, on the same CPU.

    python benchmarks/sampling.py --out benchmarks/sampling      every case; writes .json and .md
    python benchmarks/sampling.py --only unipc --rounds 3        the cases that contain this text, fewer repetitions

The network gives back its input (behind a barrier, so that XLA cannot see through it); what is left is the solver and
the loop. The machine is one that others use too: each side is a process of its own on one and the same core, they take
turns, run by run, and what is counted is processor time, of all threads. Medians, and ratios of them, are what counts.
float32, 50 steps. jdit's run is one compiled call, the reference's a Python loop over `scheduler.step`. `prepare` is
what each run needs before it: the table, or `set_timesteps`. Compile time is that of the solver alone, in a process
that has compiled something before.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

STEPS = 50
SHAPES = {  # channels first, as upstream has it
    "Wan 1.3B, 81 frames at 480 x 832": (1, 16, 21, 60, 104),
    "SD3, 1024 x 1024": (1, 16, 128, 128),
    "tiny": (1, 16, 8, 8),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0, "solver_order": 2}
SOLVERS = {
    "unipc-2": {"_class_name": "UniPCMultistepScheduler", **FLOW},
    "dpm++-2": {"_class_name": "DPMSolverMultistepScheduler", **FLOW},
    "euler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "cogvideox-ddim": {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction",
                       "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "snr_shift_scale": 1.0},
}  # fmt: skip
CORE = {os.cpu_count() - 1}
MIN_SECONDS = 0.2  # a run is repeated until it takes so long


def reference(connection):
    os.sched_setaffinity(0, CORE)
    import diffusers
    import torch

    torch.set_num_threads(1)

    def prepare(solver):
        config = {k: v for k, v in SOLVERS[solver].items() if k != "_class_name"}
        scheduler = getattr(diffusers, SOLVERS[solver]["_class_name"])(**config)
        return lambda: (scheduler.set_timesteps(STEPS), scheduler)[1]

    def loop(solver, shape):
        x, make = torch.randn(shape), prepare(solver)
        scheduler = make()

        @torch.no_grad()
        def run():
            scheduler.set_timesteps(STEPS)
            start = time.process_time()
            sample = x
            for t in scheduler.timesteps:
                sample = scheduler.step(sample, t, sample, return_dict=False)[0]
            return time.process_time() - start

        return run

    serve(connection, prepare, loop)


def jdit(connection):
    os.sched_setaffinity(0, CORE)
    import jax
    import jax.numpy as jnp

    from jdit import sampling

    def prepare(solver, steps=STEPS):
        return lambda: sampling.from_config(SOLVERS[solver], steps)

    solve = lambda x, table: sampling.solve(lambda x, t: jax.lax.optimization_barrier(x), x, table)

    def loop(solver, shape):
        batch, channels, *rest = shape
        x = jax.random.normal(jax.random.key(0), (batch, *rest, channels))
        table = jax.tree.map(jnp.asarray, prepare(solver)())
        run = jax.jit(solve)
        run(x, table).block_until_ready()

        def timed():
            start = time.process_time()
            run(x, table).block_until_ready()
            return time.process_time() - start

        return timed

    def compile_time(solver, shape, steps):
        batch, channels, *rest = shape
        x, table = jnp.zeros((batch, *rest, channels)), prepare(solver, steps)()
        jax.clear_caches()
        start = time.process_time()
        jax.jit(solve).lower(x, table).compile()
        return time.process_time() - start

    serve(connection, prepare, loop, compile_time)


def serve(connection, prepare, loop, compile_time=None):
    """Answer (what, solver, shape, ...) with seconds: of a run, of a preparation, of a compilation."""
    runs = {}
    while (message := connection.recv()) is not None:
        what, solver, shape, *rest = message
        if what == "compile":
            connection.send(compile_time(solver, shape, *rest))
            continue
        if message not in runs:
            once = loop(solver, shape) if what == "run" else clock(prepare(solver))
            once()
            runs[message] = once, max(1, round(MIN_SECONDS / once()))
        once, times = runs[message]
        connection.send(sum(once() for _ in range(times)) / times)


def clock(call):
    def timed():
        start = time.process_time()
        call()
        return time.process_time() - start

    return timed


def measure(only: str, rounds: int) -> list[dict]:
    context, sides = multiprocessing.get_context("spawn"), {}
    for target in (reference, jdit):
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there,), daemon=True)
        process.start()
        sides[target.__name__] = here, process

    def ask(side, *message):
        sides[side][0].send(message)
        return sides[side][0].recv()

    rows = []
    for solver in [s for s in SOLVERS if only in s]:
        for name, shape in SHAPES.items():
            takes = {f"{side}_{what}": [] for side in sides for what in ("run", "prepare")}
            for _ in range(rounds + 1):  # the first warms up
                for side in sides:
                    for what in ("run", "prepare"):
                        takes[f"{side}_{what}"].append(ask(side, what, solver, shape))
            row = {"solver": solver, "shape": name, "mebibytes": 4 * math.prod(shape) / 2**20}
            for what, seconds in takes.items():
                row[what] = statistics.median(seconds[1:])
                row[f"{what}_all"] = seconds[1:]
            compiles = {
                steps: [ask("jdit", "compile", solver, shape, steps) for _ in range(4)][1:] for steps in (5, 50)
            }
            row |= {f"compile_{steps}": statistics.median(seconds) for steps, seconds in compiles.items()}
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if not k.endswith("_all")}), flush=True)
    for connection, process in sides.values():
        connection.send(None)
        process.join()
    return rows


def processor() -> str:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return models[0] if models else platform.processor()


def report(results: dict) -> str:
    out = [
        "# The loop beside the network",
        "",
        "Made by `benchmarks/sampling.py`, which says how it measures. The network gives back its input; float32,",
        "50 steps, one core, processor time. The machine is shared and noisy: the two sides took turns, run by run;",
        f"medians of {results['rounds']} rounds, and the quartiles of the ratio of a round's two neighbours.",
        "",
        f"{results['when']}, {results['machine']}.",
        "",
        "| solver | latent | jdit, us a step | diffusers, us a step | ratio | quartiles | table, ms |"
        " set_timesteps, ms | compile 5 steps, s | 50 steps, s |",
        "|---" * 10 + "|",
    ]
    for r in results["rows"]:
        ratios = [a / b for a, b in zip(r["jdit_run_all"], r["reference_run_all"])]
        low, _, high = statistics.quantiles(ratios, n=4)
        cells = [r["solver"], f"{r['shape']} ({r['mebibytes']:.2g} MiB)", f"{r['jdit_run'] / STEPS * 1e6:.0f}",
                 f"{r['reference_run'] / STEPS * 1e6:.0f}", f"{r['jdit_run'] / r['reference_run']:.2f}",
                 f"{low:.2f} to {high:.2f}", f"{r['jdit_prepare'] * 1e3:.2f}", f"{r['reference_prepare'] * 1e3:.2f}",
                 f"{r['compile_5']:.2f}", f"{r['compile_50']:.2f}"]  # fmt: skip
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the solvers that contain this text")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="stem of the .json and .md to write")
    args = parser.parse_args()
    rows = measure(args.only, args.rounds)
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "torch", "diffusers", "numpy"))
    machine = f"{os.cpu_count()} cores of {processor()}; Python {platform.python_version()}, {versions}"
    results = {"when": f"{datetime.date.today()}", "machine": machine, "rounds": args.rounds, "rows": rows}
    page = report(results)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
