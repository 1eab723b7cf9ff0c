"""Wan 2.1's autoencoder at full size, random weights, bfloat16, 81 x 480 x 832: jdit beside diffusers.

    python benchmarks/wan_vae.py --out benchmarks/wan_vae_h200     every case; writes .json and .md, also when one fails
    python benchmarks/wan_vae.py --only jdit                       the cases that contain this text
    python benchmarks/wan_vae.py --frames 161 --release 2.2        another length, Wan 2.2's autoencoder (704 x 1280)
    python benchmarks/wan_vae.py --tiny                            tiny models on any device: checks the script

A case is `who:form:what`. jdit's forms are the two ways to compute a causal convolution (jdit.nn.vae.causal.FORMS),
and "stream", a chunk a call from Python; diffusers' are eager and torch.compile. Each runs in a process of its own with
empty compilation caches. Compile time is the first call's time less a later call's. Peak memory is the allocator's,
without preallocation, weights and result included. What jdit decodes leaves as uint8, as its pipelines have it;
diffusers' decoder gives bfloat16. Needs a GPU for figures that mean anything.
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
from collections.abc import Callable
from typing import Any, NamedTuple

REPEATS = 5
FORMS = {"jdit": ("taps", "conv3d", "stream"), "diffusers": ("eager", "compile")}
CASES = [f"{who}:{form}:{what}" for what in ("decode", "encode") for who, forms in FORMS.items() for form in forms]
SIZES = {"2.1": (480, 832), "2.2": (704, 1280)}
UPSTREAM = {
    "2.1": {},
    "2.2": dict(
        base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16,
    ),
}  # fmt: skip


class Job(NamedTuple):
    """What is measured: the release's config for diffusers, frames and pixels."""

    upstream: dict[str, Any]
    frames: int
    height: int
    width: int

    @property
    def latent(self) -> tuple[int, int, int, int]:
        f = self.upstream.get("scale_factor_spatial", 8)
        return 1 + (self.frames - 1) // 4, self.height // f, self.width // f, self.upstream.get("z_dim", 16)


class Work(NamedTuple):
    """One call, how to wait for its result, and what to note once it has run."""

    call: Callable[[], Any]
    ready: Callable[[Any], Any]
    facts: Callable[[], dict[str, Any]]


def jdit_work(form: str, what: str, job: Job) -> Work:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from convert import autoencoder_kl_wan as wan
    from jdit import sharding
    from jdit.nn.vae import causal
    from jdit.nn.vae.autoencoder_kl_wan import CHUNK, AutoencoderKLWan

    causal.FORM = "taps" if form == "stream" else form
    cfg = wan.config(job.upstream, dtype="bfloat16")
    make = lambda: AutoencoderKLWan(cfg, rngs=nnx.Rngs(0))
    shapes = sharding.abstract(make)[1]

    def draw(seed: int, path, like) -> jax.Array:
        """Hashed indices, of unit gain; norms about 1. Generators compile slowly."""
        n = jax.lax.iota(jnp.uint32, math.prod(like.shape)) * jnp.uint32(2654435761) + jnp.uint32(seed * 40503)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            n = (n ^ (n >> shift)) * jnp.uint32(factor)
        unit = ((n >> 8).astype(jnp.float32) / 2**24 - 0.5) * 12**0.5
        gain = 0.1 if len(like.shape) == 1 else math.prod(like.shape[:-1]) ** -0.5
        return (unit * gain + (path[-1] == "scale")).astype(like.dtype).reshape(like.shape)

    weights = jax.jit(lambda: [draw(i, *item) for i, item in enumerate(shapes.items())])()
    vae = sharding.assemble(make, dict(zip(shapes, weights)))
    key = jax.random.key(1)
    to_bytes = lambda x: jnp.round((x / 2 + 0.5) * 255).astype(jnp.uint8)
    latents = jax.random.normal(key, (1, *job.latent)) * 0.3
    pixels = jax.random.uniform(key, (1, job.frames, job.height, job.width, 3), jnp.bfloat16, -1, 1)
    given = latents if what == "decode" else pixels
    if form != "stream":
        whole = jax.jit(
            (lambda vae, z: vae.decode(z, finish=to_bytes)) if what == "decode" else (lambda vae, x: vae.moments(x))
        )
        call = lambda: whole(vae, given)
    else:
        size = 1 if what == "decode" else CHUNK

        def chunk(vae, x, cache):
            out, cache = (vae.decode_chunk if what == "decode" else vae.encode_chunk)(x, cache)
            return (to_bytes(out) if what == "decode" else out), cache

        step = jax.jit(chunk, donate_argnums=2)

        def call():
            out, cache = step(vae, given[:, :1], None)
            for i in range(1, given.shape[1], size):
                out, cache = step(vae, given[:, i : i + size], cache)
            return out

    def facts() -> dict[str, Any]:
        if not np.isfinite(np.asarray(call(), np.float32)).all():
            raise FloatingPointError("NaN or infinity")
        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        return {"peak_gb": peak, "device": device.device_kind, "versions": f"jax {jax.__version__}"}

    return Work(call, jax.block_until_ready, facts)


def diffusers_work(form: str, what: str, job: Job) -> Work:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        vae = diffusers.AutoencoderKLWan(**job.upstream).to(torch.bfloat16).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        if name.endswith("gamma") or p.ndim == 1:
            torch.nn.init.normal_(p, float(name.endswith("gamma")), 0.1)
        else:
            torch.nn.init.normal_(p, std=math.prod(p.shape[1:]) ** -0.5)
    t, h, w, c = job.latent
    latents = torch.randn(1, c, t, h, w, device=device, dtype=torch.bfloat16) * 0.3
    pixels = torch.rand(1, 3, job.frames, job.height, job.width, device=device, dtype=torch.bfloat16) * 2 - 1
    if form == "compile":  # the two networks: the loop around them keeps its cache in Python
        vae.decoder, vae.encoder = torch.compile(vae.decoder), torch.compile(vae.encoder)

    def call():
        with torch.no_grad():
            if what == "decode":
                return vae.decode(latents, return_dict=False)[0]
            return vae.encode(pixels, return_dict=False)[0].parameters

    def ready(_):
        if device == "cuda":
            torch.cuda.synchronize()

    def facts() -> dict[str, Any]:
        if not torch.isfinite(call()).all():
            raise FloatingPointError("NaN or infinity")
        on_gpu = device == "cuda"
        return {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        }

    return Work(call, ready, facts)


def measure(case: str, job: Job) -> dict[str, Any]:
    """One case, in this process."""
    who, form, what = case.split(":")
    work = (jdit_work if who == "jdit" else diffusers_work)(form, what, job)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work.ready(work.call())
        times.append(time.perf_counter() - start)
    first, *rest = times
    middle = statistics.median(rest)
    spread = (max(rest) - min(rest)) / middle
    return {"case": case, "time_s": middle, "spread": spread, "compile_s": first - middle, **work.facts()}


def run_case(case: str, passed: list[str]) -> dict[str, Any] | None:
    """One case in a process of its own; None if it fails."""
    command = [sys.executable, os.path.abspath(__file__), "--case", case, *passed]
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env | {"TRITON_CACHE_DIR": f"{cache}/t"})
    found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or not found:
        print(f"{case} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    print(found[0], flush=True)
    return json.loads(found[0])


def report(rows: list[dict[str, Any]], job: Job, release: str, failed: list[str]) -> str:
    by = {r["case"]: r for r in rows}
    versions = ", ".join(sorted({r["versions"] for r in rows}))
    lines = [
        f"{datetime.date.today()}, {rows[0]['device']}, {versions}; Wan {release}'s autoencoder, bfloat16, "
        f"{job.frames} x {job.height} x {job.width}, random weights.",
        "",
        "| what | who | form | s | x diffusers eager | spread | compile, s | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        who, form, what = r["case"].split(":")
        peer = by.get(f"diffusers:eager:{what}")
        ratio = f"{r['time_s'] / peer['time_s']:.2f}" if peer else ""
        lines.append(
            f"| {what} | {who} | {form} | {r['time_s']:.3f} | {ratio} | {r['spread']:.1%} | {r['compile_s']:.1f} "
            f"| {r['peak_gb']:.2f} |"
        )
    return "\n".join([*lines, *(f"\nFailed: {name}." for name in failed)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="run one case in this process and print its row")
    parser.add_argument("--only", default="", help="run the cases that contain this text")
    parser.add_argument("--release", choices=UPSTREAM, default="2.1")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--out", default="wan_vae", help="path of the results, without suffix")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check the script")
    args = parser.parse_args()
    small = dict(base_dim=8, decoder_base_dim=8, num_res_blocks=1)
    if args.tiny:
        job = Job({**UPSTREAM[args.release], **small}, 9, 64, 96)
    else:
        job = Job(UPSTREAM[args.release], args.frames, *SIZES[args.release])
    if args.case:
        print("ROW " + json.dumps(measure(args.case, job)), flush=True)
        return
    passed = ["--release", args.release, "--frames", str(args.frames), *(["--tiny"] if args.tiny else [])]
    rows, failed = [], []
    for case in (c for c in CASES if args.only in c):
        row = run_case(case, passed)
        if row is None:
            failed.append(case)
        else:
            rows.append(row)
        if rows:
            with open(f"{args.out}.json", "w") as f:
                json.dump(rows, f, indent=1)
            with open(f"{args.out}.md", "w") as f:
                f.write(report(rows, job, args.release, failed))
    if rows:
        with open(f"{args.out}.md") as f:
            print(f.read())
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
