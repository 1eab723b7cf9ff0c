"""Stable Diffusion 3.5 at full size, random weights, bfloat16, 1024 x 1024: jdit beside diffusers + torch.compile.

    python benchmarks/sd3.py --out benchmarks/sd3_h200     every case; writes .json and .md, also when a case fails
    python benchmarks/sd3.py --gpus 2                      a case a GPU at a time, two GPUs of one host
    python benchmarks/sd3.py --only vae                    the cases that contain this text
    python benchmarks/sd3.py --tiny                        tiny models on any device: checks the script, not the speed

Every case runs in a process of its own, with empty compilation caches. A model's case is a guided sampling run of STEPS
steps on given text states (batch 2 in the transformer): a step is the run's time over STEPS, everything that a user
waits for included (modulation tables, solver). `vae` is the decoding of one picture. Compile time is the first call's
time less a later call's; start-up is the process's time until the weights are there (made on the device, not loaded).
The ceiling is a bf16 matrix product of 8192^3 on random data, measured in the same processes.
Needs a GPU for figures that mean anything, and torch and diffusers for the peer's cases.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

STARTED = time.perf_counter()
STEPS, SIDE, REPEATS = 28, 1024, 5
CHAIN = 8  # matrix products in a row for the ceiling
TEXT_TOKENS = 77 + 256
MODELS = {"sd3.5-medium": (1536, 24, 13), "sd3.5-large": (2432, 38, 0)}  # width, layers, layers with dual attention
DECODE_TFLOP = 9.75  # convolutions and products of one decode at 1024 x 1024
CASES = [f"{who}:{what}" for what in (*MODELS, "vae") for who in ("jdit", "diffusers")]


class Work(NamedTuple):
    """What a side gives to be timed: one call and how to wait for it, and what to note once it has run."""

    call: Callable[[], Any]
    ready: Callable[[Any], Any]
    product: Callable[[], Any]  # the matrix product that sets the ceiling
    product_size: int
    facts: Callable[[], dict]


def step_tflop(model: str) -> float:
    """Matrix products of a guided step (two rows), multiply-add = 2; norms, modulation and solver not counted."""
    d, layers, dual = MODELS[model]
    image = (SIDE // 16) ** 2
    tokens = image + TEXT_TOKENS
    linear = 2 * 12 * d * d * tokens * layers - 2 * TEXT_TOKENS * 9 * d * d + dual * 2 * 4 * d * d * image
    linear += 2 * TEXT_TOKENS * 4096 * d + 2 * image * 128 * d
    attention = 4 * tokens**2 * d * layers + dual * 4 * image**2 * d
    return 2 * (linear + attention) / 1e12


def jdit_work(what: str, tiny: bool) -> Work:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jdit import sampling, sharding, zoo
    from jdit.nn.mmdit import MMDiT
    from jdit.nn.vae.autoencoder_kl import AutoencoderKL
    from jdit.pipeline import executor, sd3
    from jdit.structs import Text

    side, text_tokens, product_size = (SIDE, TEXT_TOKENS, 8192) if not tiny else (64, 9, 256)
    variant = zoo.VARIANTS["sd3.5-medium" if what == "vae" else what]

    def random(make: Callable[[], nnx.Module]) -> nnx.Module:
        """Weights of standard deviation 0.02, norms about 1: hashed indices, since generators compile slowly."""
        _, shapes = sharding.abstract(make)

        def draw(seed: int, path, like):
            n = jax.lax.iota(jnp.uint32, math.prod(like.shape)) * jnp.uint32(2654435761) + jnp.uint32(seed * 40503)
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
                n = (n ^ (n >> shift)) * jnp.uint32(factor)
            unit = (n >> 8).astype(jnp.float32) / 2**24 - 0.5  # of standard deviation 12**-0.5
            return (unit * 0.02 * 12**0.5 + (path[-1] == "scale")).astype(like.dtype).reshape(like.shape)

        fill = jax.jit(lambda: [draw(i, *item) for i, item in enumerate(shapes.items())])
        return sharding.assemble(make, dict(zip(shapes, fill())))

    key = jax.random.key(2)
    latents = jax.random.normal(key, (1, side // 8, side // 8, 16))
    if what == "vae":
        cfg = dataclasses.replace(variant.components["vae"], dtype="bfloat16")
        cfg = dataclasses.replace(cfg, channels=(8, 8, 8, 8), groups=4) if tiny else cfg
        vae = random(lambda: AutoencoderKL(cfg, rngs=nnx.Rngs(0)))
        decode = executor.compiled(sd3.decode, (2, 3, 4))
        call = lambda: decode(vae, latents, "uint8", False, False)
    else:
        cfg = dataclasses.replace(variant.components["transformer"], dtype="bfloat16")
        cfg = dataclasses.replace(cfg, layers=3, heads=2, joint_dim=64, pooled_dim=64, dual_layers=()) if tiny else cfg
        transformer = random(lambda: MMDiT(cfg, rngs=nnx.Rngs(0)))
        states = jax.random.normal(key, (2, text_tokens, cfg.joint_dim), jnp.bfloat16)
        text = Text(states, jax.random.normal(key, (2, cfg.pooled_dim), jnp.bfloat16))
        table = sampling.from_config(variant.scheduler, STEPS)
        denoise = executor.compiled(sd3.denoise, (6,))
        call = lambda: denoise(transformer, latents, text, table, jnp.float32(4.5), None, False)

    a, b = (jax.random.normal(k, (product_size, product_size), jnp.bfloat16) for k in jax.random.split(key))
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, CHAIN, lambda _, x: x @ a, b))
    a = a * product_size**-0.5

    def facts() -> dict:
        if not np.isfinite(np.asarray(call(), np.float32)).all():
            raise FloatingPointError(f"jdit:{what} made NaN or infinity")
        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        return {"peak_gb": peak, "device": device.device_kind, "versions": f"jax {jax.__version__}"}

    return Work(call, jax.block_until_ready, lambda: chain(a, b), product_size, facts)


def diffusers_work(what: str, tiny: bool) -> Work:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, text_tokens, product_size = (SIDE, TEXT_TOKENS, 8192) if not tiny else (64, 9, 256)
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def random(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            module = make().to(torch.bfloat16).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.02)
        for m in module.modules():
            if "Norm" in type(m).__name__ and isinstance(getattr(m, "weight", None), torch.nn.Parameter):
                m.weight += 1
        return module

    latents = draw(1, 16, side // 8, side // 8)
    if what == "vae":
        vae = random(
            lambda: diffusers.AutoencoderKL(
                block_out_channels=(8, 8, 8, 8) if tiny else (128, 256, 512, 512), norm_num_groups=4 if tiny else 32,
                layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            )
        )  # fmt: skip
        decode = torch.compile(vae.decode, fullgraph=True)
        run = lambda: decode(latents, return_dict=False)[0]
    else:
        d, layers, dual = MODELS[what] if not tiny else (128, 3, 0)
        joint, pooled = (4096, 2048) if not tiny else (64, 64)
        transformer = random(
            lambda: diffusers.SD3Transformer2DModel(
                sample_size=128, num_layers=layers, num_attention_heads=d // 64, joint_attention_dim=joint,
                caption_projection_dim=d, pooled_projection_dim=pooled, pos_embed_max_size=384 if dual else 192,
                dual_attention_layers=tuple(range(dual)), qk_norm="rms_norm",
            )
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(latent_channels=16, block_out_channels=(32,) * 4)  # only its size factor is used
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, None, None, None, None, None, None)
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer = torch.compile(transformer, fullgraph=True)
        given = dict(
            prompt_embeds=draw(1, text_tokens, joint), negative_prompt_embeds=draw(1, text_tokens, joint),
            pooled_prompt_embeds=draw(1, pooled), negative_pooled_prompt_embeds=draw(1, pooled),
            latents=latents, height=side, width=side, num_inference_steps=STEPS, guidance_scale=4.5,
            output_type="latent",
        )  # fmt: skip
        run = lambda: pipe(**given).images

    def call():
        with torch.no_grad():
            return run()

    a, b = draw(product_size, product_size) * product_size**-0.5, draw(product_size, product_size)

    def product():
        x = b
        for _ in range(CHAIN):
            x = x @ a
        return x

    def ready(_):
        if device == "cuda":
            torch.cuda.synchronize()

    def facts() -> dict:
        if not torch.isfinite(call()).all():
            raise FloatingPointError(f"diffusers:{what} made NaN or infinity")
        on_gpu = device == "cuda"
        return {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        }

    return Work(call, ready, product, product_size, facts)


def times(call: Callable[[], Any], ready: Callable[[Any], Any], repeats: int = REPEATS) -> list[float]:
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        ready(call())
        out.append(time.perf_counter() - start)
    return out


def measure(name: str, tiny: bool) -> dict:
    """One case, in this process."""
    who, what = name.split(":")
    work = (jdit_work if who == "jdit" else diffusers_work)(what, tiny)
    work.ready(None)
    row: dict[str, Any] = {"case": name, "startup_s": time.perf_counter() - STARTED}
    times(work.product, work.ready, 1)
    # in short bursts on a chip at rest, where it is fastest: after minutes of load it was 15% lower
    row["ceiling"] = CHAIN * 2 * work.product_size**3 / 1e12 / min(times(work.product, work.ready))
    first = times(work.call, work.ready, 1)[0]
    runs = times(work.call, work.ready)
    row |= work.facts()
    per, tflop = (1, DECODE_TFLOP) if what == "vae" else (STEPS, step_tflop(what))
    row["time_s"] = statistics.median(runs) / per
    row["spread"] = (max(runs) - min(runs)) / statistics.median(runs)
    row["compile_s"] = first - statistics.median(runs)
    row["tflop_per_s"] = tflop / row["time_s"]
    return row


def report(rows: list[dict], gpus: int, failed: list[str]) -> str:
    """Markdown: the table with ratios to the peer and shares of the ceiling, then the two bars."""
    by = {r["case"]: r for r in rows}
    ceiling = max(r["ceiling"] for r in rows)
    versions = ", ".join(sorted({r["versions"] for r in rows}))
    lines = [
        f"{datetime.date.today()}, {rows[0]['device']}, {versions}; bfloat16, 1024 x 1024, {STEPS} steps with "
        f"guidance, random weights. Matrix-product ceiling {ceiling:.0f} TFLOP/s."
        + (f" Up to {gpus} cases ran at the same time, each on its own GPU." if gpus > 1 else ""),
        "",
        "| what | who | ms | x peer | spread | TFLOP/s | of ceiling | compile, s | x peer | start-up, s | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        who, what = r["case"].split(":")
        peer = by.get(f"diffusers:{what}")
        ratio = lambda key, r=r, peer=peer: f"{r[key] / peer[key]:.2f}" if peer else ""
        label = "decode" if what == "vae" else f"{what}, a step"
        lines.append(
            f"| {label} | {who} | {1e3 * r['time_s']:.1f} | {ratio('time_s')} | {r['spread']:.1%} "
            f"| {r['tflop_per_s']:.0f} | {r['tflop_per_s'] / ceiling:.0%} "
            f"| {r['compile_s']:.1f} | {ratio('compile_s')} | {r['startup_s']:.1f} | {r['peak_gb']:.1f} |"
        )
    return "\n".join([*lines, *(f"\nFailed: {name}." for name in failed)]) + "\n"


def run_case(name: str, gpu: str | None, tiny: bool) -> dict | None:
    """One case in a process of its own, with empty compilation caches; None if it fails."""
    command = [sys.executable, os.path.abspath(__file__), "--case", name, *(["--tiny"] if tiny else [])]
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        env |= {"TRITON_CACHE_DIR": f"{cache}/triton"} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or not found:
        print(f"{name} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    print(found[0], flush=True)
    return json.loads(found[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="run one case in this process and print its row")
    parser.add_argument("--only", default="", help="run the cases that contain this text")
    parser.add_argument("--gpus", type=int, default=1, help="cases at a time, each on its own GPU")
    parser.add_argument("--out", default="sd3", help="path of the results, without suffix")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the script")
    args = parser.parse_args()
    if args.case:
        print("ROW " + json.dumps(measure(args.case, args.tiny)), flush=True)
        return
    free: queue.Queue = queue.Queue()
    for i in range(args.gpus):
        free.put(str(i) if args.gpus > 1 else None)
    names = [c for c in CASES if args.only in c]
    done: dict[str, dict | None] = {}

    def work(name: str):
        gpu = free.get()
        done[name] = run_case(name, gpu, args.tiny)
        free.put(gpu)
        if rows := [done[c] for c in CASES if done.get(c)]:
            with open(f"{args.out}.json", "w") as f:
                json.dump(rows, f, indent=1)
            with open(f"{args.out}.md", "w") as f:
                f.write(report(rows, args.gpus, [c for c in names if c in done and done[c] is None]))

    with concurrent.futures.ThreadPoolExecutor(args.gpus) as pool:  # the peer first: it takes longest
        list(pool.map(work, sorted(names, key=lambda c: c.startswith("jdit"))))
    if os.path.exists(f"{args.out}.md"):
        with open(f"{args.out}.md") as f:
            print(f.read())
    sys.exit(any(row is None for row in done.values()))


if __name__ == "__main__":
    main()
