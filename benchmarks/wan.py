"""Wan 2.1 at full size, random weights, bfloat16, 81 x 480 x 832: jdit beside diffusers + torch.compile.

    python benchmarks/wan.py --out benchmarks/wan_h200     every case; writes .json and .md, also when a case fails
    python benchmarks/wan.py --only 1.3b                   the cases that contain this text
    python benchmarks/wan.py --tiny                        tiny models on any device: checks the script, not the speed

A case is a guided sampling run (UniPC, STEPS steps) on given text states: 32,760 tokens, two rows. A step is the run's
time over STEPS, everything that a user waits for included (modulation tables, text keys and values, solver). jdit runs
both rows in one batch, diffusers' pipeline one after the other; of its transformer the repeated blocks are compiled, as
its guide advises. Compile time is the first call's time less a later call's; the time to the first result counts from
the start of the process, weights made on the device, not loaded. The autoencoder has a benchmark of its own
(wan_vae.py). Needs a GPU for figures that mean anything, and torch and diffusers for the peer's cases.
"""

import dataclasses

import harness

STEPS, FRAMES, HEIGHT, WIDTH, TEXT = 3, 81, 480, 832, 512
MODELS = {"1.3b": (12, 8960, 30), "14b": (40, 13824, 40)}  # heads of 128, mlp, layers
CASES = [f"{who}:{model}" for model in MODELS for who in ("jdit", "diffusers")]
SCHEDULER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def latent_size(tiny: bool) -> tuple[int, int, int]:
    frames, height, width = (FRAMES, HEIGHT, WIDTH) if not tiny else (9, 64, 96)
    return (frames - 1) // 4 + 1, height // 8, width // 8


def step_tflop(model: str) -> float:
    """Matrix products of a guided step (two rows); norms, modulation, text keys and values and solver not counted."""
    heads, mlp, layers = MODELS[model]
    d, (t, y, x) = heads * 128, latent_size(False)
    n = t * y * x // 4
    layer = 2 * n * (6 * d * d + 2 * d * mlp) + 4 * n * n * d + 4 * n * TEXT * d
    return 2 * layers * layer / 1e12


def jdit_work(model: str, tiny: bool) -> harness.Work:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jdit import sampling
    from jdit.nn.wan import Wan, WanConfig
    from jdit.pipeline import executor

    heads, mlp, layers = MODELS[model]
    cfg = WanConfig(heads=heads, mlp=mlp, layers=layers, dtype="bfloat16")
    cfg = dataclasses.replace(cfg, heads=2, mlp=256, layers=2) if tiny else cfg
    wan = harness.jax_weights(lambda: Wan(cfg, rngs=nnx.Rngs(0)))
    key = jax.random.key(2)
    text = jax.random.normal(key, (2, TEXT, cfg.text_dim), jnp.bfloat16)
    latents = jax.random.normal(key, (1, *latent_size(tiny), cfg.in_channels))
    table = sampling.from_config({"_class_name": "UniPCMultistepScheduler", **SCHEDULER}, STEPS)

    def denoise(wan, x, text, table, scale):
        context, rows = wan.embed_context(text), wan.modulation_table(jnp.asarray(table.timestep, jnp.float32))
        model = sampling.classifier_free(lambda x, t, row: wan.velocity(x, row, context), scale)
        return sampling.solve(model, x, table, per_step=rows)

    run = executor.compiled(denoise)
    return harness.jax_work(lambda: run(wan, latents, text, table, jnp.float32(5.0)), tiny, STEPS)


def diffusers_work(model: str, tiny: bool) -> harness.Work:
    import diffusers
    import torch

    heads, mlp, layers = MODELS[model] if not tiny else (2, 256, 2)
    keep = diffusers.WanTransformer3DModel._keep_in_fp32_modules
    transformer = harness.torch_weights(
        lambda: diffusers.WanTransformer3DModel(num_attention_heads=heads, ffn_dim=mlp, num_layers=layers), keep
    )
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)  # only its size factors are used
    scheduler = diffusers.UniPCMultistepScheduler(**SCHEDULER)
    pipe = diffusers.WanPipeline(None, None, vae, scheduler, transformer)
    pipe.set_progress_bar_config(disable=True)
    transformer.compile_repeated_blocks(fullgraph=True)
    device = transformer.patch_embedding.weight.device
    draw = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device=device, dtype=dtype)
    t, y, x = latent_size(tiny)
    given = dict(
        prompt_embeds=draw(1, TEXT, 4096), negative_prompt_embeds=draw(1, TEXT, 4096),
        latents=draw(1, 16, t, y, x, dtype=torch.float32), height=8 * y, width=8 * x, num_frames=4 * t - 3,
        num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
    )  # fmt: skip
    return harness.torch_work(lambda: pipe(**given).frames, tiny, STEPS)


def work(case: str, tiny: bool) -> harness.Work:
    who, model = case.split(":")
    return (jdit_work if who == "jdit" else diffusers_work)(model, tiny)


if __name__ == "__main__":
    about = f"bfloat16, {FRAMES} x {HEIGHT} x {WIDTH}, {STEPS} steps with guidance, random weights."
    harness.main(__file__, __doc__, CASES, work, step_tflop, about, repeats=3)
