"""A step on two GPUs beside the same step on each of them alone, full size, random weights, bfloat16.

    python benchmarks/mesh.py --out benchmarks/mesh        every case; writes .json and .md, also when a case fails
    python benchmarks/mesh.py --only wan                   the cases that contain one of these texts (a,b)
    python benchmarks/mesh.py --exchange gather            another form of attention's exchange (jdit.nn.exchange)
    python benchmarks/mesh.py --tiny                       tiny models on two CPU devices: checks the script

A video's tokens are spread over the devices (sequence), without guidance; a picture's guided step has its two
predictions on different devices (data). Cases run one after another, each in a process of its own that has all GPUs.
A step is the transformer and an Euler update; short ones run several in one program, as sampling does. The programs
take turns, so that all of them meet warm GPUs (which run at the clock that 700 W allow): a time is the median of its
calls. Two GPUs of a kind are not equally fast: "times as fast" is of the mean of the two, one after the other, and of
that of both at once, each with a step of its own. At once, as on the mesh, neither rests while the other one works.
Text, modulation and what else is made before the loop is not in it. `silent` is the same program with what it sends
taken out (an all-to-all and a permute give back what they were given, a gathering repeats it): the difference is what
communication costs, waiting for the other device included. Memory is the compiler's figure for a device. The two
results are compared.
About 6 minutes on two H100s.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

TINY = "--tiny" in sys.argv
if TINY:
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

import harness  # noqa: E402 (the flags are read when jax is imported)

SPENT, SCALE = 8.0, 4.0  # seconds of timed steps of one GPU, at least three of them; strength of guidance
# variant, latents, mesh axis, steps of a call
CASES = {
    "wan-1.3b 81x480x832": ("wan2.1-t2v-1.3b", (21, 60, 104), "sequence", 4),
    "wan-14b 81x480x832": ("wan2.1-t2v-14b", (21, 60, 104), "sequence", 1),
    "hunyuan-video 129x544x960": ("hunyuan-video", (33, 68, 120), "sequence", 1),
    "sd3.5-large 1024": ("sd3.5-large", (128, 128), "data", 8),
    "qwen-image 1328": ("qwen-image", (166, 166), "data", 4),
}


def config(case: str, tiny: bool, exchange: str) -> Any:
    from jdit import sharding, zoo

    cfg = dataclasses.replace(
        zoo.VARIANTS[CASES[case][0]].components["transformer"], dtype="bfloat16",
        rules=sharding.Rules(exchange=exchange),
    )  # fmt: skip
    if not tiny:
        return cfg
    small: dict[str, Any] = {"heads": 2, "layers": 2, "mlp": 256, "text_dim": 32, "joint_dim": 32, "single_layers": 2}
    names = {f.name for f in dataclasses.fields(cfg)}
    return dataclasses.replace(cfg, **{k: v for k, v in small.items() if k in names})


@contextlib.contextmanager
def silence():
    """Nothing is sent by the exchanges of attention; shapes, copies and products stay."""
    import jax
    import jax.numpy as jnp

    sent = {name: getattr(jax.lax, name) for name in ("all_to_all", "ppermute", "all_gather")}
    # a barrier, else attention to what is sent and to what was there are the same, and made once
    jax.lax.all_to_all = jax.lax.ppermute = lambda x, *a, **kw: jax.lax.optimization_barrier(x)
    jax.lax.all_gather = lambda x, *a, axis, **kw: jnp.concatenate([x] * len(jax.devices()), axis)
    try:
        yield
    finally:
        for name, fn in sent.items():
            setattr(jax.lax, name, fn)


def measure(case: str, tiny: bool, exchange: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import programs
    from collectives import collectives
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jdit import sampling, sharding
    from jdit.pipeline import executor

    _, size, axis, steps = CASES[case]
    guided, rows = axis == "data", 2 if axis == "data" else 1
    size = tuple(min(n, 5 if i == 0 and len(size) == 3 else 16) for i, n in enumerate(size)) if tiny else size
    program = programs.of(config(case, tiny, exchange), size, rows)
    module = harness.jax_weights(program.make)
    keys = jax.random.split(jax.random.key(1), 1 + len(program.given))

    def draw(key, a):
        if a.dtype == jnp.int32:  # lengths of the prompts
            return jnp.array([20, 100][:rows], jnp.int32)
        return jax.random.normal(key, a.shape, a.dtype) if a.ndim > 1 else jnp.full(a.shape, 500.0, a.dtype)

    x = jax.random.normal(keys[0], (1, *program.x.shape[1:]))
    given = [draw(key, a) for key, a in zip(keys[1:], program.given)]

    mesh = sharding.make_mesh(**{axis: len(jax.devices())})
    put = lambda a, *spec, **kw: jax.device_put(a, NamedSharding(mesh, P(*spec)), **kw)
    leaves = sharding.leaves(module)
    del module  # donated: there is no room for two copies of all weights
    spread = sharding.assemble(program.make, {path: put(leaves.pop(path), donate=True) for path in list(leaves)})
    on = lambda a, device: next(s.data for s in a.addressable_shards if s.device == device)
    alone = lambda i: jax.tree.map(lambda a: on(a, jax.devices()[i]), spread)
    placed = [put(a, *["data"] * guided) for a in given]

    table = sampling.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, steps)

    def call(module, x, prepared):
        """The steps of one call."""
        velocity = lambda x, _: program.step(module, x, *prepared)
        return sampling.solve(sampling.classifier_free(velocity, SCALE) if guided else velocity, x, table)

    def build(what: str, mesh, module, x, given) -> tuple[Callable[[], Any], dict[str, Any]]:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            prepared = jax.jit(program.before)(module, *given)
            start = time.perf_counter()
            # a function of its own each time: what was traced before `silence` is not to be found again
            lowered = jax.jit(lambda *a: call(*a), compiler_options=executor.compiler_options()).lower(
                module, x, prepared
            )
            compiled = lowered.compile()
            compile_s = time.perf_counter() - start
        memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        kinds = {c.kind for c in found}
        return lambda: compiled(module, x, prepared), {
            f"{what}_compile_s": compile_s, f"{what}_gb": peak / 1e9,
            f"{what}_results_gb": sum(c.bytes * c.times for c in found) / 1e9 / steps,
            f"{what}_collectives": {k: sum(c.times for c in found if c.kind == k) / steps for k in kinds},
        }  # fmt: skip

    device = jax.devices()[0]
    row = {
        "case": case,
        "axis": axis,
        "devices": len(jax.devices()),
        "exchange": exchange,
        "device": device.device_kind,
    }
    there = lambda a: jax.device_put(a, jax.devices()[1])
    runs = {
        "one": build("one", None, alone(0), x, given),
        "other": build("other", None, alone(1), there(x), [there(a) for a in given]),
        "mesh": build("mesh", mesh, spread, put(x), placed),
    }
    if not guided:
        with silence():
            runs["silent"] = build("silent", mesh, spread, put(x), placed)
    want, got = (np.asarray(runs[what][0](), np.float64) for what in ("one", "mesh"))
    if not np.isfinite(got).all():
        raise FloatingPointError("NaN or infinity")
    start = np.asarray(x, np.float64)
    row |= {"error": float(np.linalg.norm(got - want) / np.linalg.norm(want - start))}
    timed = lambda what: harness.times(runs[what][0], jax.block_until_ready, 1)[0]
    times: dict[str, list[float]] = {what: [] for what in (*runs, "both")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        while len(times["one"]) < 3 or sum(times["one"]) < SPENT:
            for what in runs:
                times[what].append(timed(what))
            times["both"].append(statistics.fmean(pool.map(timed, ("one", "other"))))
    for what, taken in times.items():
        middle = statistics.median(taken)
        row |= {f"{what}_s": middle / steps, f"{what}_spread": (max(taken) - min(taken)) / middle}
    for _, facts in runs.values():
        row |= facts
    return row | {"versions": f"jax {jax.__version__}"}


def report(rows: list[dict[str, Any]], failed: list[str]) -> str:
    first = rows[0]
    lines = [
        f"{datetime.date.today()}, {first['devices']} x {first['device']}, {first['versions']}; bfloat16, random "
        f"weights, medians of {SPENT:.0f} seconds of one GPU, three calls at least. Results of collectives are of a "
        "device; the difference is of the update.",
        "",
        "| step | mesh | each alone, ms | both at once, ms | mesh, ms | times as fast: as each, as at once | spread "
        "| silent, ms | sending, ms | results, GB | collectives | one, GB | mesh, GB a device | compile, s "
        "| difference |",
        "|---" * 15 + "|",
    ]
    for r in rows:
        silent = r.get("silent_s")
        sent = "" if silent is None else f"{1e3 * (r['mesh_s'] - silent):.1f}"
        mesh = f"{r['axis']}={r['devices']}" + (f", {r['exchange']}" if r.get("exchange", "auto") != "auto" else "")
        kinds = ", ".join(f"{n:g} {kind}" for kind, n in sorted(r["mesh_collectives"].items())) or "none"
        lines.append(
            f"| {r['case']} | {mesh} | {1e3 * r['one_s']:.1f}, {1e3 * r['other_s']:.1f} | {1e3 * r['both_s']:.1f} "
            f"| {1e3 * r['mesh_s']:.1f} | {(r['one_s'] + r['other_s']) / 2 / r['mesh_s']:.2f}, "
            f"{r['both_s'] / r['mesh_s']:.2f} | {max(r['one_spread'], r['mesh_spread']):.1%} "
            f"| {'' if silent is None else f'{1e3 * silent:.1f}'} | {sent} | {r['mesh_results_gb']:.2f} | {kinds} "
            f"| {r['one_gb']:.1f} | {r['mesh_gb']:.1f} | {r['one_compile_s']:.0f}, {r['mesh_compile_s']:.0f} "
            f"| {r['error']:.1e} |"
        )
    return "\n".join([*lines, *(f"\nFailed: {name}." for name in failed)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="run one case in this process and print its row")
    parser.add_argument("--only", default="", help="run the cases that contain one of these texts (a,b)")
    parser.add_argument("--exchange", default="auto", help="form of attention's exchange")
    parser.add_argument("--out", default="mesh", help="path of the results, without suffix")
    parser.add_argument("--tiny", action="store_true", help="tiny models on two CPU devices, to check the script")
    args = parser.parse_args()
    if args.case:
        print("ROW " + json.dumps(measure(args.case, args.tiny, args.exchange)), flush=True)
        return
    rows, failed = [], []
    for case in (c for c in CASES if any(text in c for text in args.only.split(","))):
        row = harness.run_case(__file__, case, ["--exchange", args.exchange, *["--tiny"] * args.tiny])
        (failed if row is None else rows).append(case if row is None else row)
        if rows:
            with open(f"{args.out}.json", "w") as f:
                json.dump(rows, f, indent=1)
            with open(f"{args.out}.md", "w") as f:
                f.write(report(rows, failed))
    if rows:
        with open(f"{args.out}.md") as f:
            print(f.read())
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
