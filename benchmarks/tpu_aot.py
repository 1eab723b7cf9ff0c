"""Every family's step compiled ahead of time for TPU topologies, without a chip: time, memory and collectives.

    pip install "libtpu==0.0.42.*"                       the one that jax 0.10.2 names; no chip and no driver
    python benchmarks/tpu_aot.py --out benchmarks/tpu_aot
    python benchmarks/tpu_aot.py --only wan,v5p

Full-size architectures in bfloat16, weights as shapes. What compiles fits the fast memory of the chip, kernels
included; memory is what the compiler says that a device needs at once. Nothing here is a time of execution.
"""

import argparse
import dataclasses
import json
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # libtpu is asked for programs alone

import jax
import numpy as np
import programs
from collectives import collectives
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jdit import zoo
from jdit.nn.hunyuan_video import HunyuanVideoConfig
from jdit.sharding import MESH_AXES, Rules

CHIPS = {"v5p": ("v5p:2x2x2", 95), "v6e": ("v6e:2x4", 32)}
"""Topology of eight chips, and GB of a chip (cloud.google.com/tpu/docs: v5p, v6e)."""
FSDP = Rules(embed=("data", "sequence"))
# variant, latents, rows; the mesh (data, sequence, tensor); rules
CASES = {
    "sd3.5-large 1024": ("sd3.5-large", (128, 128), 2, (2, 2, 1), Rules()),
    "qwen-image 1328": ("qwen-image", (166, 166), 2, (2, 4, 1), FSDP),
    "cogvideox-5b 480p": ("cogvideox-5b", (13, 60, 90), 2, (2, 4, 1), Rules()),
    "wan2.1-1.3b 480p": ("wan2.1-t2v-1.3b", (21, 60, 104), 2, (2, 4, 1), Rules()),
    "wan2.1-14b 480p": ("wan2.1-t2v-14b", (21, 60, 104), 2, (2, 4, 1), FSDP),
    "wan2.1-14b 720p": ("wan2.1-t2v-14b", (21, 90, 160), 2, (2, 4, 1), FSDP),
    "wan2.2-ti2v-5b 704p": ("wan2.2-ti2v-5b", (31, 44, 80), 2, (2, 4, 1), Rules()),
    "wan2.2-animate-14b 720p": ("wan2.2-animate-14b", (21, 90, 160), 1, (1, 8, 1), FSDP),
    "hunyuan-video 720p": (None, (33, 90, 160), 1, (1, 8, 1), FSDP),
}


def measure(chip: str, case: str) -> dict:
    variant, size, rows, sizes, rules = CASES[case]
    topology, _ = CHIPS[chip]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[: np.prod(sizes)]).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    like = zoo.VARIANTS[variant].components["transformer"] if variant else HunyuanVideoConfig()
    program = programs.of(dataclasses.replace(like, dtype="bfloat16", rules=rules), size, rows)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(program.whole).lower(*program.abstract(mesh, rules))
        middle = time.perf_counter()
        compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    found = collectives(text)
    kinds = sorted({c.kind for c in found})
    return {
        "chip": chip, "case": case, "mesh": dict(zip(MESH_AXES, sizes)), "lower_s": middle - start,
        "compile_s": time.perf_counter() - middle, "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9, "kernels": text.count("custom_call_target=\"tpu_custom_call\""),
        "collectives": {k: [sum(c.times for c in found if c.kind == k),
                            sum(c.times * c.bytes for c in found if c.kind == k) / 1e9] for k in kinds},
    }  # fmt: skip


def report(rows: list[dict]) -> str:
    lines = [
        f"jax {jax.__version__}, eight chips (sd3.5-large four), bfloat16; nothing was run. Collectives: how often a step "
        "and GB of results on a device.", "",
        "| chip | step | mesh | lower, s | compile, s | weights and inputs, GB | temporary, GB | of | kernels | collectives |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        mesh = " ".join(f"{a}={n}" for a, n in r["mesh"].items() if n > 1)
        moved = ", ".join(f"{k} {n} ({size:.2f})" for k, (n, size) in r["collectives"].items())
        if "error" in r:
            lines.append(f"| {r['chip']} | {r['case']} | {mesh} | | | | | {CHIPS[r['chip']][1]} | | {r['error']} |")
            continue
        lines.append(
            f"| {r['chip']} | {r['case']} | {mesh} | {r['lower_s']:.1f} | {r['compile_s']:.0f} | {r['arguments_gb']:.1f} "
            f"| {r['temporary_gb']:.1f} | {CHIPS[r['chip']][1]} | {r['kernels']} | {moved} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="chips and steps that contain all of these texts (a,b)")
    parser.add_argument("--out", default="tpu_aot", help="path of the results, without suffix")
    args = parser.parse_args()
    rows = []
    for chip in CHIPS:
        for case in CASES:
            if not all(text in f"{chip} {case}" for text in args.only.split(",")):
                continue
            try:
                rows.append(measure(chip, case))
            except jax.errors.JaxRuntimeError as e:  # what does not fit is a result
                sizes = dict(zip(MESH_AXES, CASES[case][3]))
                rows.append({"chip": chip, "case": case, "mesh": sizes, "collectives": {}, "error": str(e)[:200]})
            print(json.dumps(rows[-1]), flush=True)
            with open(f"{args.out}.json", "w") as f:
                json.dump(rows, f, indent=1)
            with open(f"{args.out}.md", "w") as f:
                f.write(report(rows))


if __name__ == "__main__":
    main()
