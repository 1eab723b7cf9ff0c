"""Stable Diffusion 3.5 at full size, random weights, bfloat16, 1024 x 1024: jdit beside diffusers + torch.compile.

    python benchmarks/sd3.py --out benchmarks/sd3_h200     every case; writes .json and .md, also when a case fails
    python benchmarks/sd3.py --only vae                    the cases that contain this text
    python benchmarks/sd3.py --tiny                        tiny models on any device: checks the script, not the speed

Every case runs in a process of its own, with empty compilation caches. A model's case is a guided sampling run of STEPS
steps on given text states (batch 2 in the transformer): a step is the run's time over STEPS, everything that a user
waits for included (modulation tables, solver). `vae` is the decoding of one picture. Compile time is the first call's
time less a later call's; start-up is the process's time until the weights are there (made on the device, not loaded).
The ceiling is a bf16 matrix product of 8192^3 on random data, measured in the same processes.
Needs a GPU for figures that mean anything, and torch and diffusers for the peer's cases.
"""

import dataclasses

import harness

STEPS, SIDE = 28, 1024
TEXT_TOKENS = 77 + 256
MODELS = {"sd3.5-medium": (1536, 24, 13), "sd3.5-large": (2432, 38, 0)}  # width, layers, layers with dual attention
DECODE_TFLOP = 9.75  # convolutions and products of one decode at 1024 x 1024
CASES = [f"{who}:{what}" for what in (*MODELS, "vae") for who in ("jdit", "diffusers")]


def step_tflop(model: str) -> float:
    """Matrix products of a guided step (two rows), multiply-add = 2; norms, modulation and solver not counted."""
    d, layers, dual = MODELS[model]
    image = (SIDE // 16) ** 2
    tokens = image + TEXT_TOKENS
    linear = 2 * 12 * d * d * tokens * layers - 2 * TEXT_TOKENS * 9 * d * d + dual * 2 * 4 * d * d * image
    linear += 2 * TEXT_TOKENS * 4096 * d + 2 * image * 128 * d
    attention = 4 * tokens**2 * d * layers + dual * 4 * image**2 * d
    return 2 * (linear + attention) / 1e12


def jdit_work(what: str, tiny: bool) -> harness.Work:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jdit import sampling, zoo
    from jdit.nn import parts
    from jdit.nn.mmdit import MMDiT
    from jdit.nn.vae.autoencoder_kl import AutoencoderKL
    from jdit.pipeline import executor, sd3
    from jdit.structs import Text

    side, text_tokens = (SIDE, TEXT_TOKENS) if not tiny else (64, 9)
    variant = zoo.VARIANTS["sd3.5-medium" if what == "vae" else what]

    key = jax.random.key(2)
    latents = jax.random.normal(key, (1, side // 8, side // 8, 16))
    if what == "vae":
        cfg = dataclasses.replace(variant.components["vae"], dtype="bfloat16")
        cfg = dataclasses.replace(cfg, channels=(8, 8, 8, 8), groups=4) if tiny else cfg
        vae = harness.jax_weights(lambda: AutoencoderKL(cfg, rngs=nnx.Rngs(0)))
        decode = executor.compiled(sd3.decode, (2, 3, 4))
        call = lambda: decode(vae, latents, "uint8", False, False)
    else:
        cfg = dataclasses.replace(variant.components["transformer"], dtype="bfloat16")
        cfg = dataclasses.replace(cfg, layers=3, heads=2, joint_dim=64, pooled_dim=64, dual_layers=()) if tiny else cfg
        transformer = harness.jax_weights(lambda: MMDiT(cfg, rngs=nnx.Rngs(0)))
        states = jax.random.normal(key, (2, text_tokens, cfg.joint_dim), jnp.bfloat16)
        text = Text(states, jax.random.normal(key, (2, cfg.pooled_dim), jnp.bfloat16))
        table = sampling.from_config(variant.scheduler, STEPS)
        modulate, denoise = executor.compiled(sd3.modulate), executor.compiled(sd3.denoise, (8,))
        rest, scale = (None, None, False), jnp.float32(4.5)
        of_time, loop = (parts.take(transformer, p) for p in (parts.MODULATION, parts.LOOP))
        call = lambda: denoise(loop, latents, text, modulate(of_time, text, table), table, scale, *rest)

    return harness.jax_work(call, tiny, 1 if what == "vae" else STEPS)


def diffusers_work(what: str, tiny: bool) -> harness.Work:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, text_tokens = (SIDE, TEXT_TOKENS) if not tiny else (64, 9)
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)

    latents = draw(1, 16, side // 8, side // 8)
    if what == "vae":
        vae = harness.torch_weights(
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
        transformer = harness.torch_weights(
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

    return harness.torch_work(run, tiny, 1 if what == "vae" else STEPS)


def work(case: str, tiny: bool) -> harness.Work:
    who, what = case.split(":")
    return (jdit_work if who == "jdit" else diffusers_work)(what, tiny)


if __name__ == "__main__":
    about = f"bfloat16, {SIDE} x {SIDE}, {STEPS} steps with guidance, random weights."
    harness.main(__file__, __doc__, CASES, work, lambda w: DECODE_TFLOP if w == "vae" else step_tflop(w), about)
