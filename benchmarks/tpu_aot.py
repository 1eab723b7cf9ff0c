"""Every family's step compiled ahead of time for TPU topologies, without a chip: time, memory and collectives.

    pip install "libtpu==0.0.42.*"                       the one that jax 0.10.2 names; no chip and no driver
    python benchmarks/tpu_aot.py --out benchmarks/tpu_aot
    python benchmarks/tpu_aot.py --only v5p

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
from jdit.sharding import MESH_AXES, Rules

CHIPS = {"v5p": ("v5p:2x2x2", 95), "v6e": ("v6e:2x4", 32)}
"""Topology of eight chips, and GB of a chip (cloud.google.com/tpu/docs: v5p, v6e)."""
FSDP = Rules(embed=("data", "sequence"))
# chip, variant, latents, rows; the mesh (data, sequence, tensor); rules
CASES = {
    "v6e wan2.1-14b 480p": ("wan2.1-t2v-14b", (21, 60, 104), 2, (2, 4, 1), FSDP),
    "v6e wan2.1-1.3b 480p": ("wan2.1-t2v-1.3b", (21, 60, 104), 2, (2, 4, 1), Rules()),
    "v6e hunyuan-video 720p": ("hunyuan-video", (33, 90, 160), 1, (1, 8, 1), FSDP),
    "v6e sd3.5-large 1024": ("sd3.5-large", (128, 128), 2, (2, 2, 1), Rules()),
    "v6e qwen-image 1328": ("qwen-image", (166, 166), 2, (2, 4, 1), FSDP),
    "v6e cogvideox-5b 480p": ("cogvideox-5b", (13, 60, 90), 2, (2, 4, 1), Rules()),
    "v6e wan2.2-animate-14b 480p": ("wan2.2-animate-14b", (21, 60, 104), 1, (1, 8, 1), FSDP),
    "v5p wan2.1-14b 720p": ("wan2.1-t2v-14b", (21, 90, 160), 2, (2, 4, 1), FSDP),
    "v5p hunyuan-video 720p": ("hunyuan-video", (33, 90, 160), 1, (1, 8, 1), FSDP),
}


def measure(case: str) -> dict:
    variant, size, rows, sizes, rules = CASES[case]
    topology, _ = CHIPS[case.split()[0]]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[: np.prod(sizes)]).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    like = zoo.VARIANTS[variant].components["transformer"]
    program = programs.of(dataclasses.replace(like, dtype="bfloat16", rules=rules), size, rows)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(program.whole).lower(*program.abstract(mesh, rules))
        middle = time.perf_counter()
        compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    found: dict[str, list[float]] = {}
    for c in collectives(text):
        n, size = found.get(c.kind, (0, 0.0))
        found[c.kind] = [n + 1, size + c.bytes / 1e9]
    return {
        "lower_s": middle - start, "compile_s": time.perf_counter() - middle, "collectives": found,
        "arguments_gb": memory.argument_size_in_bytes / 1e9, "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }  # fmt: skip


def report(rows: list[dict]) -> str:
    lines = [
        f"jax {jax.__version__}, bfloat16, ahead of time: nothing was run. GB are of a device; collectives are",
        "instructions of the program (those of the scanned layers run once a layer) and GB of their results.",
        "",
        "| step | mesh | lower, s | compile, s | arguments, GB | temporary, GB | of | kernels | collectives |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        case = r["case"]
        mesh = " ".join(f"{a}={n}" for a, n in zip(MESH_AXES, CASES[case][3]) if n > 1)
        moved = ", ".join(f"{n} {kind} ({size:.2f})" for kind, (n, size) in r.get("collectives", {}).items())
        cells = (
            [""] * 4
            if "error" in r
            else [f"{r[k]:.1f}" for k in ("lower_s", "compile_s", "arguments_gb", "temporary_gb")]
        )
        last = r.get("error", moved)
        lines.append(
            f"| {' | '.join([case, mesh, *cells, str(CHIPS[case.split()[0]][1]), str(r.get('kernels', '')), last])} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="steps that contain one of these texts (a,b)")
    parser.add_argument("--out", default="tpu_aot", help="path of the results, without suffix")
    args = parser.parse_args()
    rows = []
    for case in (c for c in CASES if any(text in c for text in args.only.split(","))):
        try:
            rows.append({"case": case, **measure(case)})
        except jax.errors.JaxRuntimeError as e:  # what does not fit is a result
            rows.append({"case": case, "error": str(e)[:200].replace("\n", " ")})
        print(json.dumps(rows[-1]), flush=True)
        with open(f"{args.out}.json", "w") as f:
            json.dump(rows, f, indent=1)
        with open(f"{args.out}.md", "w") as f:
            f.write(report(rows))


if __name__ == "__main__":
    main()
