"""What full-size models take with their modulation weights and encoders resident, and without.

    python benchmarks/modulation_memory.py                       from shapes and compiled programs, on any device
    python benchmarks/modulation_memory.py --measure             peak memory of whole calls, on a GPU
    python benchmarks/modulation_memory.py --only sd3.5-large    variants of this name; may be given several times

Both write benchmarks/modulation_memory.json and from it modulation_memory.md; what was not made again is kept.

From shapes: bytes of the weights, of those that modulation is made from, and of the table of all steps, for the
variant's usual call in bfloat16; the memory plan's peak of weights and tables with everything resident, with encoders
that are freed before the transformer is read, and with its modulation weights freed before the rest of it is read; and
the arguments of the loop's program, compiled at the size of the usual call, when it makes modulation in its steps of
weights that it keeps and when it is given the table. No weights are made: modules are abstract, and what the stages
hand on is zeros.

Measured: one call of --steps steps with zeros for weights (encoders, loop, autoencoder), a process for each way; the
peak is the allocator's, everything that XLA needs beside the weights included.
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIANTS = ("qwen-image", "sd3.5-medium", "sd3.5-large", "cogvideox-5b", "wan2.1-t2v-14b")
WAYS = ("all resident", "encoders freed", "modulation freed, too")
HERE = Path(__file__).with_suffix("")


class Characters:
    """A token a character."""

    def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(ids=[0] * len(text))


class Tokenizer:
    """Stands for any: ids of nothing."""

    max_length, pad_id, backend = 77, 0, Characters()

    def encode(self, texts, max_length):
        return self.encode_with_lengths(texts, max_length)[0]

    def encode_with_lengths(self, texts, max_length):
        import numpy as np

        return np.zeros((len(texts), max_length), np.int32), np.full(len(texts), max_length, np.int32)


class Model:
    """A variant in bfloat16 whose weights are abstract or zeros."""

    def __init__(self, name: str):
        from jdit import zoo
        from jdit.pipeline.base import Parts
        from jdit.pipeline.executor import Weights
        from jdit.pipeline.families import PIPELINES

        self.variant = v = zoo.VARIANTS[name]
        configs = {n: dataclasses.replace(c, dtype="bfloat16") for n, c in v.components.items()}
        names = {n.replace("text_encoder", "tokenizer") for n in configs if "text_encoder" in n}
        tokenizers: Any = {n: Tokenizer() for n in names}
        parts = Parts(v.family, name, configs, tokenizers, v.scheduler, v.plan, v.settings or {})
        self.pipe = PIPELINES[v.family](parts, Weights({}))
        self.configs, self.encoders = configs, tuple(n for n in configs if "encoder" in n)
        self.transformers = tuple(n for n in configs if n.startswith("transformer"))

    def make(self, name: str):
        from jdit import sharding, zoo

        cfg = self.configs[name]
        return sharding.Make(zoo.MODULES[type(cfg)], cfg)

    def zeros(self, entry: str):
        """A component or a part of one."""
        import jax.numpy as jnp

        from jdit import sharding, zoo
        from jdit.nn import parts

        name, part = parts.parse(entry)
        module, leaves = zoo.MODULES[type(self.configs[name])], sharding.abstract(self.make(name))[1]
        held = {p: jnp.zeros(a.shape, a.dtype) for p, a in leaves.items() if parts.holds(module, part, p)}
        return sharding.assemble(self.make(name), held, held)

    def sizes(self, way: str) -> dict[str, int]:
        """What comes and goes by itself."""
        from jdit import zoo
        from jdit.nn import parts
        from jdit.pipeline import memory, modulation

        stages = self.pipe.usual_stages()
        size = lambda n, e: modulation.weight_bytes(zoo.MODULES[type(c := self.configs[n])], c, parts.parse(e)[1])
        of = lambda n: memory.entries(stages, n) if way == WAYS[2] else [n]
        return {e: size(n, e) for n in self.configs for e in of(n)}

    def waiting(self, way: str) -> list[str]:
        return [] if way == WAYS[0] else [e for e in self.sizes(way) if not e.startswith("vae")]


def from_shapes(name: str) -> dict[str, Any]:
    from jdit.nn import parts
    from jdit.pipeline import memory

    model = Model(name)
    stages, sizes, tables = model.pipe.usual_stages(), model.sizes(WAYS[2]), model.pipe.tables()
    peak = lambda way: max(r.bytes for r in memory.follow(stages, model.sizes(way), model.waiting(way), tables))
    row: dict[str, Any] = {
        "modulation": sum(b for e, b in sizes.items() if parts.parse(e)[1] == parts.MODULATION),
        "transformer": sum(b for e, b in sizes.items() if e.startswith("transformer")),
        "encoders": sum(sizes[e] for e in model.encoders), "table": sum(tables.values()),
        "steps": model.variant.plan.steps, "plan": {way: peak(way) for way in WAYS},
    }  # fmt: skip
    return row | {"loop in steps": loop_arguments(model, False), "loop with table": loop_arguments(model, True)}


def loop_arguments(model: Model, tabled: bool) -> int:
    """Bytes that the compiled program of the sampling loop is given."""
    import jax
    import numpy as np
    from flax import nnx

    from jdit.pipeline import executor, modulation

    found: dict[str, int] = {}
    abstract = executor.Weights({n: nnx.eval_shape(model.make(n)) for n in model.configs})

    def call(stage, weights, values):
        """Shapes in the place of numbers, and the loop compiled."""
        modules, given = [weights[n] for n in stage.weights], [values[n] for n in stage.reads]
        if stage.name.startswith("denoise"):
            program = executor.compiled(stage.fn, executor._static(stage)).lower(*modules, *given).compile()
            found[stage.name] = program.memory_analysis().argument_size_in_bytes
        out = executor.check_wiring([stage], {n: weights[n] for n in stage.weights}, dict(zip(stage.reads, given)))
        fill = lambda a: np.zeros(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a
        return {n: jax.tree.map(fill, out[n]) for n in stage.writes}

    kept, keep = (executor._call, modulation.tabled), model.pipe.weights
    try:
        executor._call, modulation.tabled, model.pipe.weights = call, lambda *_: tabled, abstract
        model.pipe("", output="latents")
    finally:
        (executor._call, modulation.tabled), model.pipe.weights = kept, keep
    return max(found.values())


def measured(name: str, way: str, steps: int) -> dict[str, Any]:
    """One call, in this process."""
    import jax

    from jdit.pipeline.executor import Weights

    model = Model(name)
    waiting = model.waiting(way)
    resident = [e for e in model.sizes(way) if e not in waiting]
    read = lambda e: jax.block_until_ready(model.zeros(e))
    model.pipe.weights = Weights({e: read(e) for e in resident}, {e: (lambda e=e: read(e)) for e in waiting})
    out = model.pipe("", steps=steps)
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {"peak": stats.get("peak_bytes_in_use", 0), "seconds": out.timings, "device": device.device_kind,
            "jax": jax.__version__, "steps": steps}  # fmt: skip


def gb(n: float) -> str:
    return f"{n / 1e9:.2f}"


def report(rows: dict[str, Any]) -> str:
    shapes = {n: r["shapes"] for n, r in rows.items() if "shapes" in r}
    out = ["# Memory with the modulation weights resident, and without", "",
           "Made by `benchmarks/modulation_memory.py`, which says how. GB of 10^9 bytes, bfloat16.", "",
           "## From shapes, for a usual call", "",
           "| variant | transformer | of it for modulation | share | encoders | table | of steps "
           "| loop's program is given, modulation in its steps | with the table |",
           "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    columns = ("encoders", "table", "steps", "loop in steps", "loop with table")
    for n, r in shapes.items():
        said = " | ".join(str(r[c]) if c == "steps" else gb(r[c]) for c in columns)
        share = f"{r['modulation'] / r['transformer']:.0%}"
        out.append(f"| {n} | {gb(r['transformer'])} | {gb(r['modulation'])} | {share} | {said} |")
    ways = [f"| variant | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    out += ["", "Peak of weights and tables over a call's stages, by the memory plan:", "", *ways]
    out += [f"| {n} | {' | '.join(gb(r['plan'][way]) for way in WAYS)} |" for n, r in shapes.items()]
    runs = {n: r["measured"] for n, r in rows.items() if r.get("measured")}
    if runs:
        one = next(iter(next(iter(runs.values())).values()))
        said = f"{one['steps']} steps, {one['device']}, jax {one['jax']}"
        out += ["", "## Measured", "", f"Peak of a whole call, {said}:", "", *ways]
        peak = lambda r, way: gb(r[way]["peak"]) if way in r else "failed"
        out += [f"| {n} | {' | '.join(peak(r, way) for way in WAYS)} |" for n, r in runs.items()]
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a variant; may be given several times")
    parser.add_argument("--measure", action="store_true", help="measure calls instead")
    parser.add_argument("--steps", type=int, default=4, help="of a measured call")
    parser.add_argument("--out", type=Path, default=HERE, help="path of the results, without suffix")
    parser.add_argument("--case", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print("ROW " + json.dumps(measured(args.only[0], args.case, args.steps)))
        return
    store = args.out.with_suffix(".json")
    rows: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for name in args.only or VARIANTS:
        row = rows.setdefault(name, {})
        if args.measure:
            row["measured"] = {way: r for way in WAYS if (r := run_case(name, way, args.steps))}
        else:
            row["shapes"] = from_shapes(name) | {"date": str(datetime.date.today())}
        store.write_text(json.dumps(rows, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(report(rows))
    print(report(rows))


def run_case(name: str, way: str, steps: int) -> dict[str, Any] | None:
    """A measured call in a process of its own; None where it fails, as for want of memory."""
    command = [sys.executable, __file__, "--only", name, "--case", way, "--steps", str(steps)]
    env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    rows = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return json.loads(rows[0]) if rows and not done.returncode else None


if __name__ == "__main__":
    main()
