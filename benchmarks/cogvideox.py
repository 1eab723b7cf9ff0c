"""CogVideoX-5B at full size, random weights, bfloat16, 49 x 480 x 720: jdit beside diffusers + torch.compile.

    python benchmarks/cogvideox.py --out benchmarks/cogvideox_h100   every case; writes .json and .md, also if one fails
    python benchmarks/cogvideox.py --only step,decode                the cases that contain one of these texts
    python benchmarks/cogvideox.py --tiny                            tiny models on any device: checks the script

`step` is a guided sampling run (DDIM, STEPS steps, both rows in one batch) on given text states: 17,776 tokens; a step
is the run's time over STEPS, with modulation tables and solver. `decode` is the autoencoder on 13 latent frames; jdit's
frames leave as uint8, as in its pipelines, diffusers' decoder gives bfloat16. `attention` is one call of a layer, two
rows of 48 heads of 64, by each of jdit's backends and by torch's own choice. Compile time is the first call's time less
a later call's; the time to the first result counts from the start of the process, weights made on the device, not
loaded. Needs a GPU for figures that mean anything, and torch and diffusers for the peer's cases.
"""

import math

import harness

STEPS, FRAMES, HEIGHT, WIDTH, TEXT = 3, 49, 480, 720, 226
HEADS, HEAD_DIM, LAYERS = 48, 64, 42
CHANNELS, BLOCKS, Z = (128, 256, 256, 512), 3, 16
BACKENDS = ("cudnn", "chunked")
CASES = [f"{who}:{what}" for what in ("step", "decode") for who in ("jdit", "diffusers")]
CASES += [*(f"jdit:attention {name}" for name in BACKENDS), "diffusers:attention sdpa"]
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
    rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False,
)  # fmt: skip


def latent_size(tiny: bool) -> tuple[int, int, int]:
    frames, height, width = (FRAMES, HEIGHT, WIDTH) if not tiny else (9, 48, 80)
    return (frames - 1) // 4 + 1, height // 8, width // 8


def tokens(tiny: bool) -> int:
    return TEXT + math.prod(latent_size(tiny)) // 4


def tflop(what: str) -> float:
    """Matrix products and convolutions; norms, modulation and solver not counted."""
    d, n = HEADS * HEAD_DIM, tokens(False)
    if what == "step":
        return 2 * LAYERS * (2 * n * 12 * d * d + 4 * n * n * d) / 1e12
    return (2 * 4 * n * n * d if what.startswith("attention") else decode_flop()) / 1e12


def decode_flop() -> float:
    """Of the decoder's 3 x 3 x 3 convolutions, and the 3 x 3 ones after each doubling."""
    (t, y, x), wide = latent_size(False), CHANNELS[::-1]
    total, before = t * y * x * 27 * (Z * wide[0] + 4 * wide[0] ** 2), wide[0]
    for level, c in enumerate(wide):
        total += t * y * x * 27 * (before * c + (2 * BLOCKS + 1) * c * c)
        if level < len(wide) - 1:
            t, y, x, before = 2 * t - 1 if level < 2 else t, 2 * y, 2 * x, c
            total += t * y * x * 9 * c * c
    return 2 * (total + t * y * x * 27 * wide[-1] * 3)


def jdit_work(what: str, tiny: bool) -> harness.Work:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jdit import sampling
    from jdit.nn.attention import attention
    from jdit.nn.cogvideox import CogVideoX, CogVideoXConfig
    from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
    from jdit.nn.vae.autoencoder_kl_cogvideox_config import AutoencoderKLCogVideoXConfig
    from jdit.pipeline import calls, executor

    key = jax.random.key(2)
    if what.startswith("attention"):
        heads = 2 if tiny else HEADS
        shape = (2, tokens(tiny), heads, HEAD_DIM)
        q, k, v = (jax.random.normal(part, shape, jnp.bfloat16) for part in jax.random.split(key, 3))
        one = executor.compiled(lambda q, k, v: attention(q, k, v, implementation=what.split()[1]))
        return harness.jax_work(lambda: one(q, k, v), tiny)
    if what == "decode":
        small = dict(channels=(8, 8, 8, 8), groups=2, layers=1) if tiny else {}
        cfg = AutoencoderKLCogVideoXConfig(dtype="bfloat16", **small)
        gain = lambda shape: 0.1 if len(shape) == 1 else math.prod(shape[:-1]) ** -0.5  # unit variance
        vae = harness.jax_weights(lambda: AutoencoderKLCogVideoX(cfg, rngs=nnx.Rngs(0)), gain)
        z = jax.random.normal(key, (1, *latent_size(tiny), Z)) * 0.3
        whole = executor.compiled(lambda vae, z: vae.decode(z, finish=lambda x: calls.to_pixels(x, "uint8")))
        return harness.jax_work(lambda: whole(vae, z), tiny)
    size = dict(heads=2, layers=2, text_dim=64) if tiny else dict(heads=HEADS, layers=LAYERS)
    cfg = CogVideoXConfig(**size, rotary=True, dtype="bfloat16")
    net = harness.jax_weights(lambda: CogVideoX(cfg, rngs=nnx.Rngs(0)))
    text = jax.random.normal(key, (2, TEXT, cfg.text_dim), jnp.bfloat16)
    latents = jax.random.normal(key, (1, *latent_size(tiny), cfg.in_channels))
    table = sampling.from_config({"_class_name": "CogVideoXDDIMScheduler", **SCHEDULER}, STEPS)

    def denoise(net, x, text, table, scale):
        states, rows = net.embed_text(text), net.modulation_table(jnp.asarray(table.timestep, jnp.float32))
        model = sampling.classifier_free(lambda x, t, row: net.velocity(x, row, states), scale)
        return sampling.solve(model, x, table, per_step=rows)

    run = executor.compiled(denoise)
    return harness.jax_work(lambda: run(net, latents, text, table, jnp.float32(6.0)), tiny, STEPS)


def diffusers_work(what: str, tiny: bool) -> harness.Work:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    if what.startswith("attention"):
        q, k, v = (draw(2, 2 if tiny else HEADS, tokens(tiny), HEAD_DIM) for _ in range(3))
        return harness.torch_work(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), tiny)
    small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1)
    t, y, x = latent_size(tiny)
    if what == "decode":
        with torch.device(device):
            vae = diffusers.AutoencoderKLCogVideoX(**(small if tiny else {}))
        vae = vae.to(torch.bfloat16).eval().requires_grad_(False)
        for name, p in vae.named_parameters():
            scale, norm = 0.1 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5, p.ndim == 1 and "weight" in name
            torch.nn.init.normal_(p, float(norm), scale)
        vae.decoder = torch.compile(vae.decoder)  # the loop around it keeps its cache in Python
        z = draw(1, Z, t, y, x) * 0.3
        return harness.torch_work(lambda: vae.decode(z, return_dict=False)[0], tiny)
    size = dict(num_attention_heads=2, num_layers=2, text_embed_dim=64)
    size = size if tiny else dict(num_attention_heads=HEADS, num_layers=LAYERS)
    transformer = harness.torch_weights(
        lambda: diffusers.CogVideoXTransformer3DModel(use_rotary_positional_embeddings=True, **size)
    )
    width = transformer.config.text_embed_dim
    vae = diffusers.AutoencoderKLCogVideoX(**small)  # only its size factors are used
    pipe = diffusers.CogVideoXPipeline(None, None, vae, transformer, diffusers.CogVideoXDDIMScheduler(**SCHEDULER))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = torch.compile(transformer, fullgraph=True)
    given = dict(
        prompt_embeds=draw(1, TEXT, width), negative_prompt_embeds=draw(1, TEXT, width), latents=draw(1, t, Z, y, x),
        height=8 * y, width=8 * x, num_frames=4 * t - 3, num_inference_steps=STEPS, guidance_scale=6.0,
        output_type="latent",
    )  # fmt: skip
    return harness.torch_work(lambda: pipe(**given).frames, tiny, STEPS)


def work(case: str, tiny: bool) -> harness.Work:
    who, what = case.split(":")
    return (jdit_work if who == "jdit" else diffusers_work)(what, tiny)


if __name__ == "__main__":
    about = f"CogVideoX-5B, bfloat16, {FRAMES} x {HEIGHT} x {WIDTH}, {STEPS} steps with guidance, random weights."
    harness.main(__file__, __doc__, CASES, work, tflop, about, repeats=3)
