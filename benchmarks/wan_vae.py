"""Wan 2.1's autoencoder at full size, random weights, bfloat16, 81 x 480 x 832: jdit beside diffusers.

    python benchmarks/wan_vae.py --out benchmarks/wan_vae_h200     every case; writes .json and .md, also when one fails
    python benchmarks/wan_vae.py --only jdit                       the cases that contain this text
    python benchmarks/wan_vae.py --frames 161 --release 2.2        another length, Wan 2.2's autoencoder (704 x 1280)
    python benchmarks/wan_vae.py --tiny                            tiny models on any device: checks the script

A case is `who:form:what`. jdit's forms are the two ways to compute a causal convolution (jdit.nn.vae.causal.FORMS),
and "stream", a chunk a call from Python; diffusers' are eager and torch.compile. Each runs in a process of its own with
empty compilation caches. Compile time is the first call's time less a later call's. Peak memory is the allocator's,
weights and result included. What jdit decodes leaves as uint8, as its pipelines have it;
diffusers' decoder gives bfloat16. Needs a GPU for figures that mean anything.
"""

import argparse
import datetime
import json
import math
import sys
from typing import Any, NamedTuple

import harness

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


def jdit_work(form: str, what: str, job: Job) -> harness.Work:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from convert import autoencoder_kl_wan as wan
    from jdit.nn.vae import causal
    from jdit.nn.vae.autoencoder_kl_wan import CHUNK, AutoencoderKLWan

    causal.FORM = "taps" if form == "stream" else form
    cfg = wan.config(job.upstream, dtype="bfloat16")
    gain = lambda shape: 0.1 if len(shape) == 1 else math.prod(shape[:-1]) ** -0.5  # unit variance through the layers
    vae = harness.jax_weights(lambda: AutoencoderKLWan(cfg, rngs=nnx.Rngs(0)), gain)
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

    return harness.jax_work(call, tiny=True)  # the ceiling is not asked for


def diffusers_work(form: str, what: str, job: Job) -> harness.Work:
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
        if what == "decode":
            return vae.decode(latents, return_dict=False)[0]
        return vae.encode(pixels, return_dict=False)[0].parameters

    return harness.torch_work(call, tiny=True)


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
        who, form, what = args.case.split(":")
        work = (jdit_work if who == "jdit" else diffusers_work)(form, what, job)
        print("ROW " + json.dumps(harness.measure(args.case, work, REPEATS)), flush=True)
        return
    passed = ["--release", args.release, "--frames", str(args.frames), *(["--tiny"] if args.tiny else [])]
    rows, failed = [], []
    for case in (c for c in CASES if args.only in c):
        row = harness.run_case(__file__, case, passed)
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
