"""Projects a step from 1 to 64 chips: counts from compiled programs, times from the rates of chips and links.

    python benchmarks/scaling.py --out benchmarks/scaling     counts what scaling.json lacks (15 minutes on 2 cores for
                                                              all), and projects

Counted: each full-size step is compiled, from shapes, for 2 to 64 CPU devices that are not there (nothing is run). The
program of one device gives the FLOPs of a layer's products and the collectives; attention, which is left out of the
program, is counted by its formula. XLA's CPU compiler widens bfloat16 to float32: an element is counted as two bytes.
Projected: see `step_time`. What it leaves out: small products are slower than large ones, and kernels run in waves.
Where a ring is chosen, whose parts are plain XLA in most cases (jdit/nn/exchange.py), Ulysses with heads of zeros
is counted too, and the faster one is given.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
from typing import Any, NamedTuple

FLAGS = ("--xla_force_host_platform_device_count=64", "--xla_backend_optimization_level=0",
         "--xla_llvm_disable_expensive_passes=true")  # fmt: skip

WAYS = (1, 2, 4, 8, 16, 32, 64)


class Chip(NamedTuple):
    """Rates a second of one chip, and its links.

    matmul, attention, attention_64: achieved FLOPs, the last at head dim 64. memory: bytes to and from its own memory.
    room: bytes of it. near, far: bytes each way, to chips of its host and to others; or, on a torus, of one link each
    way. host: chips of one. late: seconds that a collective takes whatever its size. torus: the topologies by size.
    """

    matmul: float
    attention: float
    attention_64: float
    memory: float
    room: float
    near: float
    far: float
    host: int
    late: float
    torus: dict[int, tuple[int, ...]] | None = None
    wraps: int = 4


CUBES = {2: (2,), 4: (2, 2), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)}
SQUARES = {2: (2,), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8)}
CHIPS = {
    "H100": Chip(640e12, 620e12, 440e12, 3.0e12, 80e9, 250e9, 50e9 * 0.8, 8, 20e-6),
    "v5p": Chip(0.65 * 459e12, 0.5 * 459e12, 0.25 * 459e12, 2.8e12, 95e9, 9e10, 9e10, 0, 5e-6, CUBES, 4),
    "v6e": Chip(0.6 * 918e12, 0.4 * 918e12, 0.2 * 918e12, 1.6e12, 32e9, 9e10, 9e10, 0, 5e-6, SQUARES, 16),
}
SOURCES = """
- H100: products, attention and memory as measured in steps and alone (benchmarks/wan_h200.md, sd3_h200.md,
  NOTES.md; 620 TFLOP/s of cuDNN at head dim 128, 440 at 64). NVLink 4: 250 GB/s each
  way, as measured in an all-to-all of 503 MB between two (the data sheet has 450); between hosts of 8 a 400 Gbit/s
  InfiniBand port a GPU (DGX H100 data sheet), of which 80% is taken.
- v5p, v6e: peaks, memory and one-way link rates of the scaling book (jax-ml.github.io/scaling-book/tpus); shares of
  the peak are **assumed**: 65% and 60% in products, 50% and 40% in attention, half of that at head dim 64.
- Seconds a collective takes at least: assumed.
"""
# variant, latents, rows, which go to a data axis of 2
CASES = {
    "Wan 1.3B 480p": ("wan2.1-t2v-1.3b", (21, 60, 104), 1),
    "Wan 14B 480p": ("wan2.1-t2v-14b", (21, 60, 104), 1),
    "Wan 14B 480p guided": ("wan2.1-t2v-14b", (21, 60, 104), 2),
    "HunyuanVideo 544p": ("hunyuan-video", (33, 68, 120), 1),
    "HunyuanVideo 720p": ("hunyuan-video", (33, 90, 160), 1),
    "SD3.5-large guided": ("sd3.5-large", (128, 128), 2),
    "Qwen-Image guided": ("qwen-image", (166, 166), 2),
}
SPREAD = ("Wan 14B 480p", "Wan 14B 480p guided", "HunyuanVideo 544p", "HunyuanVideo 720p", "Qwen-Image guided")
"""Whose weights are over half of a v6e's memory: on it they are spread over all chips (FSDP)."""
MEASURED = {
    "Wan 1.3B 480p": (0.4741, 0.2519), "Wan 14B 480p": (2.5889, 1.3626), "HunyuanVideo 544p": (6.9979, 3.6328),
    "SD3.5-large guided": (0.1232, 0.0635), "Qwen-Image guided": (0.4401, 0.2310),
}  # fmt: skip
"""Seconds of a step on one H100, while the other one has its own, and on two (benchmarks/mesh.md)."""


def wanted() -> list[tuple[str, int, bool]]:
    """Case, ways, and whether weights are spread."""
    both = lambda case, ways: (False, True) if case in SPREAD and ways > 1 else (False,)
    return [(case, ways, spread) for case in CASES for ways in WAYS for spread in both(case, ways)]


def config(case: str) -> Any:
    from jdit import zoo

    return dataclasses.replace(zoo.VARIANTS[CASES[case][0]].components["transformer"], dtype="bfloat16")


def mesh_sizes(case: str, ways: int) -> dict[str, int]:
    """Rows of guidance first, then the sequence."""
    data = min(CASES[case][2], ways)
    return {"data": data, "sequence": ways // data}


def attention_flop(case: str) -> float:
    """Of one step, all layers and rows: 4 queries keys width each."""
    from jdit.nn.hunyuan_video import HunyuanVideoConfig
    from jdit.nn.wan import WanConfig

    cfg, (_, size, rows) = config(case), CASES[case]
    patches = math.prod(size) // 4
    if isinstance(cfg, WanConfig):
        return rows * cfg.layers * 4 * patches * (patches + 512) * cfg.width
    text = 256 if isinstance(cfg, HunyuanVideoConfig) else 333 if case.startswith("SD3") else 128
    blocks = cfg.layers + getattr(cfg, "single_layers", 0)
    return rows * blocks * 4 * (patches + text) ** 2 * cfg.width


def replace_attention():
    """Attention that costs nothing and needs all that attention needs, in the program that is counted."""
    import jax.numpy as jnp

    from jdit.nn import attention, exchange

    def nothing(q, k, v, lengths=None, causal=False):
        return q + (k[:, :1] + v[:, -1:]).astype(q.dtype)

    def partial(q, k, v, bias):
        return nothing(q, k, v).astype(jnp.float32), q[..., 0].astype(jnp.float32) + bias.max()

    attention.BACKENDS.clear()
    attention.BACKENDS["counted"] = nothing
    exchange.attention_with_lse = partial
    exchange.attention_to_all = lambda q, k, v: partial(q, k, v, jnp.zeros(1))


def lowered(case: str, ways: int, spread: bool = False, exchange: str = "auto", **depth: int):
    import jax
    import programs

    from jdit.sharding import Rules, make_mesh

    rules = Rules(embed=("data", "sequence") if spread else None, exchange=exchange)
    _, size, rows = CASES[case]
    program = programs.of(dataclasses.replace(config(case), rules=rules, **depth), size, rows)
    mesh = make_mesh(**mesh_sizes(case, ways))
    with jax.set_mesh(mesh):
        module, x, *_ = program.abstract(mesh, rules)
        return jax.jit(program.step).lower(module, x, *program.prepared())


@functools.cache
def depths(case: str) -> float:
    """FLOPs of all layers over those of a program in which a loop's body is counted once: from programs of one and of
    two layers of each stack, unrolled, on one device."""
    from jdit.nn import layers

    cfg, scan = config(case), layers.scan_blocks
    one = {"layers": 2 if case.startswith("SD3") else 1}  # the last of SD3's is another stack
    one |= {"single_layers": 1} if hasattr(cfg, "single_layers") else {}
    layers.scan_blocks = lambda *a, **kw: scan(*a, **kw | {"unroll": True})
    flops = lambda **more: lowered(case, 1, **one | more).cost_analysis()["flops"]
    base = flops()
    rest = sum((getattr(cfg, name) - n) * (flops(**{name: n + 1}) - base) for name, n in one.items())
    layers.scan_blocks = scan
    return (base + rest) / base


def count(case: str, ways: int, spread: bool, exchange: str) -> dict[str, Any]:
    """FLOPs of products, and collectives of the program of one device."""
    from collectives import collectives

    compiled = lowered(case, ways, spread, exchange).compile()
    found = collectives(compiled.as_text())
    return {
        "case": case, "ways": ways, "spread": spread, "exchange": exchange,
        "tflop": compiled.cost_analysis()["flops"] * depths(case) / 1e12,
        "collectives": [[c.kind, c.devices, c.times, elements(c.shapes) * 2] for c in found],
    }  # fmt: skip


def elements(shapes: tuple[str, ...]) -> int:
    return sum(math.prod(int(n) for n in s[s.index("[") + 1 : -1].split(",") if n) for s in shapes)


def collective_time(chip: Chip, kind: str, size: float, group: int, ways: int) -> float:
    """Seconds of one collective whose result has `size` bytes, in groups of neighbours of a mesh of `ways`."""
    if kind == "collective-permute":
        crosses = chip.torus is None and ways > chip.host
        return chip.late + size / (chip.far if crosses else chip.near)
    twice = 2 if kind == "all-reduce" else 1
    if chip.torus is None:
        here = min(group, chip.host)
        near, far = size * (here - 1) / group / chip.near, size * (group - here) / group / chip.far
        if kind != "all-to-all":  # each byte comes to a host once, by any of its ports
            near, far = size * (group - 1) / group / chip.near, far / here
        return chip.late + twice * max(near, far)
    sides = chip.torus[group]
    open_ended = [2 if side < chip.wraps else 1 for side in sides]  # no link from the last chip back to the first
    both = 2 * chip.near
    if kind == "all-to-all":  # one axis after another
        return chip.late + sum(size * side * o / (4 * both) for side, o in zip(sides, open_ended))
    return chip.late + twice * size * max(open_ended) / (both * len(sides)) * (1 if max(sides) > 2 else 0.5)


def ring(counted: dict[str, Any]) -> bool:
    """Whether keys go round: permutes in the layers."""
    return any(kind == "collective-permute" and times > 1 for kind, _, times, _ in counted["collectives"])


def step_time(chip: Chip, counted: dict[str, Any]) -> dict[str, float]:
    """Seconds of products, of attention, of links, and of packing what all-to-alls send (read and written twice).

    Attention of a ring's parts is taken to move 12 bytes of memory a score, but that of others, and of rings whose
    parts are cuDNN's (those of GPUs, of sequences of one part), to run at the chip's rate, with the heads that were
    added.
    """
    case, ways, cfg = counted["case"], counted["ways"], config(counted["case"])
    rate = chip.attention_64 if cfg.head_dim == 64 else chip.attention
    if ring(counted) and not (chip.torus is None and case.startswith("Wan")):
        rate = min(rate, 4 * cfg.head_dim * chip.memory / 12)
    sequence = mesh_sizes(case, ways)["sequence"]
    more = -(-cfg.heads // sequence) * sequence / cfg.heads if counted["exchange"] == "ulysses" else 1
    links = packing = 0.0
    for kind, devices, times, size in counted["collectives"]:
        links += times * collective_time(chip, kind, size, devices or ways, ways)
        packing += times * 4 * size / chip.memory if kind == "all-to-all" else 0
    return {
        "products": counted["tflop"] * 1e12 / chip.matmul, "attention": more * attention_flop(case) / ways / rate,
        "links": links, "packing": packing,
    }  # fmt: skip


def project(counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[tuple, dict[str, Any]] = {}
    for name, chip in CHIPS.items():
        for counted in counts:
            case, ways = counted["case"], counted["ways"]
            if counted["spread"] != (name == "v6e" and case in SPREAD and ways > 1):
                continue
            parts = step_time(chip, counted)
            computed = parts["products"] + parts["attention"]
            row = {
                "chip": name, "case": case, "chips": ways, **mesh_sizes(case, ways), **parts,
                "form": "ring" if ring(counted) else counted["exchange"], "seconds": sum(parts.values()),
                "overlapped": max(computed, parts["links"]) + parts["packing"],
            }  # fmt: skip
            best = rows.setdefault((name, case, ways), row)
            if row["seconds"] < best["seconds"]:
                rows[name, case, ways] = row
    return list(rows.values())


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds a step and the speed-up, and what was measured beside what is projected."""
    by = {(r["chip"], r["case"], r["chips"]): r for r in rows}
    lines = ["**Projected, not measured**, by benchmarks/scaling.py. Seconds a step where nothing overlaps, and how",
             "many times as fast as one chip; in brackets if links were used wholly behind the products.",
             "r: keys go round part of the devices; z: heads of zeros were added.", "",
             "Rates:", SOURCES]  # fmt: skip
    for chip in CHIPS:
        lines += [f"## {chip}", "", f"| chips | {' | '.join(CASES)} |", "|---" * (len(CASES) + 1) + "|"]
        for ways in WAYS:
            cells = []
            for case in CASES:
                r, one = by[chip, case, ways], by[chip, case, 1]
                hidden = one["seconds"] / r["overlapped"]
                mark = {"ring": " r", "ulysses": " z", "auto": ""}[r["form"]]
                times = f" {one['seconds'] / r['seconds']:.1f}x ({hidden:.1f}){mark}" if ways > 1 else ""
                cells.append(f"{r['seconds']:.3g} s{times}")
            lines.append(f"| {ways} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["One chip of v6e cannot hold the larger models; the figure is of its arithmetic alone.", "",
              "## Where a step of two H100s goes", "",
              "| | mesh | products, ms | attention | links | packing | projected | measured | times one, projected "
              "| measured |", "|---" * 10 + "|"]  # fmt: skip
    for case in CASES:
        r, one = by["H100", case, 2], by["H100", case, 1]
        mesh = " ".join(f"{a}={r[a]}" for a in ("data", "sequence") if r[a] > 1)
        cells = [f"{1e3 * r[p]:.1f}" for p in ("products", "attention", "links", "packing", "seconds")]
        first, real = MEASURED.get(case, (None, None))
        cells += [f"{1e3 * real:.0f}" if real else "", f"{one['seconds'] / r['seconds']:.2f}"]
        cells.append(f"{first / real:.2f}" if first and real else "")
        lines.append(f"| {case} | {mesh} | {' | '.join(cells)} |")
    lines += ["", "Measured: benchmarks/mesh.md."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="scaling", help="path of the results, without suffix")
    args = parser.parse_args()
    # before jax is imported; the partitioner's work does not depend on optimisation, and nothing is run
    os.environ |= {"XLA_FLAGS": " ".join(FLAGS), "JAX_PLATFORMS": "cpu"}
    path, counts = f"{args.out}.json", []
    if os.path.exists(path):
        with open(path) as f:
            counts = json.load(f)["counts"]
    have = {(c["case"], c["ways"], c["spread"], c["exchange"]) for c in counts}
    replace_attention()
    for case, ways, spread in wanted():
        for exchange in ("auto", "ulysses"):
            rings = any(ring(c) for c in counts if (c["case"], c["ways"], c["spread"]) == (case, ways, spread))
            if (case, ways, spread, exchange) not in have and (exchange == "auto" or rings):
                counts.append(count(case, ways, spread, exchange))
                print(json.dumps(counts[-1]), flush=True)
    rows = project(counts)
    with open(path, "w") as f:
        json.dump({"counts": counts, "projected": rows}, f)
    with open(f"{args.out}.md", "w") as f:
        f.write(report(rows))


if __name__ == "__main__":
    main()
