"""Qwen-Image at full size (20B), random weights, bfloat16: jdit beside diffusers + torch.compile.

    python benchmarks/qwen_image.py --out benchmarks/qwen_image_h100  every case; writes .json and .md even if one fails
    python benchmarks/qwen_image.py --only "step 1328,decode"         the cases that contain one of these texts
    python benchmarks/qwen_image.py --tiny                            tiny models on any device: checks the script

`step SIZE` is a guided sampling run (Euler, STEPS steps) of a picture of SIZE x SIZE pixels on given text states, of
TEXT tokens; a step is the run's time over STEPS, with modulation tables and solver. jdit has both predictions in one
batch, diffusers makes one after the other, as its pipeline does. `edit SIZE` is the same with a second picture of that
size beside the noise. `decode SIZE` is the autoencoder; jdit's picture leaves as uint8, as in its pipelines, diffusers'
decoder gives bfloat16. Of diffusers' transformer the repeated blocks are compiled, as its guide advises. Compile time
is the first call's time less a later call's; the time to the first result counts from the start of the process, weights
made on the device, not loaded. Needs a GPU of 80 GB for figures that mean anything, and torch and diffusers for the
peer's cases.
"""

import math

import harness

STEPS, TEXT, SIZES = 4, 128, (1328, 1024)
LAYERS, HEADS, HEAD_DIM, JOINT = 60, 24, 128, 3584
CHANNELS, BLOCKS, Z = (96, 192, 384, 384), 2, 16
WHAT = [*(f"step {size}" for size in SIZES), "edit 1024", *(f"decode {size}" for size in SIZES)]
CASES = [f"{who}:{what}" for what in WHAT for who in ("jdit", "diffusers")]
SCHEDULER = dict(
    use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
    shift_terminal=0.02,
)  # fmt: skip


def side(what: str, tiny: bool) -> int:
    """Latent pixels a side."""
    return (64 if tiny else int(what.split()[1])) // 8


def tflop(what: str) -> float:
    """Matrix products and convolutions; norms, modulation and solver not counted."""
    n = side(what, False)
    if what.startswith("decode"):
        return decode_flop(n) / 1e12
    d, seen = HEADS * HEAD_DIM, 2 if what.startswith("edit") else 1
    tokens = TEXT + seen * n * n // 4
    return 2 * LAYERS * (2 * tokens * 12 * d * d + 4 * tokens * tokens * d) / 1e12


def decode_flop(n: int) -> float:
    """Of the decoder's convolutions on one frame, which see it alone (a third of their taps), and of its attention."""
    wide = CHANNELS[::-1]
    total, before = n * n * (9 * (Z * wide[0] + 4 * wide[0] ** 2) + 4 * wide[0] ** 2 + 2 * n * n * wide[0]), wide[0]
    for level, c in enumerate(wide):
        total += n * n * 9 * (before * c + (2 * BLOCKS + 1) * c * c)
        if level < len(wide) - 1:
            n, before = 2 * n, c // 2
            total += n * n * 9 * c * before
    return 2 * (total + n * n * 9 * wide[-1] * 3)


def jdit_work(what: str, tiny: bool) -> harness.Work:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jdit import sampling
    from jdit.nn.qwen_image import QwenImage, QwenImageConfig
    from jdit.nn.vae.autoencoder_kl_qwen_image import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
    from jdit.pipeline import executor, qwen_stages
    from jdit.structs import Text

    key, n = jax.random.key(2), side(what, tiny)
    latents = jax.random.normal(key, (1, n, n, Z))
    if what.startswith("decode"):
        cfg = AutoencoderKLQwenImageConfig(dtype="bfloat16", **(dict(width=8, layers=1) if tiny else {}))
        gain = lambda shape: 0.1 if len(shape) == 1 else math.prod(shape[:-1]) ** -0.5  # unit variance
        vae = harness.jax_weights(lambda: AutoencoderKLQwenImage(cfg, rngs=nnx.Rngs(0)), gain)
        whole = executor.compiled(qwen_stages.decode, (2, 3, 4))
        return harness.jax_work(lambda: whole(vae, latents * 0.3, "uint8", False, False), tiny)
    size = dict(heads=2, layers=2, text_dim=64) if tiny else {}
    net = harness.jax_weights(lambda: QwenImage(QwenImageConfig(**size, dtype="bfloat16"), rngs=nnx.Rngs(0)))
    states = jax.random.normal(key, (2, TEXT, net.cfg.text_dim), jnp.bfloat16)
    text = Text(states, lengths=jnp.array([TEXT // 2, TEXT]))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **SCHEDULER}
    sigmas = [1 - i / STEPS for i in range(STEPS)]
    table = sampling.from_config(config, STEPS, mu=sampling.dynamic_mu(config, n * n // 4), sigmas=sigmas)
    pictures = (latents[:, ::-1],) if what.startswith("edit") else ()

    def denoise(net, x, text, pictures, table, scale):
        mods = qwen_stages.modulate(net, table)
        return qwen_stages.denoise(
            net, x, text, pictures, None, None, mods, table, scale, None, normalize=True, two_passes=False, report=False
        )

    run = executor.compiled(denoise)
    return harness.jax_work(lambda: run(net, latents, text, pictures, table, jnp.float32(4.0)), tiny, STEPS)


def diffusers_work(what: str, tiny: bool) -> harness.Work:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    n = side(what, tiny)
    small = dict(base_dim=8, num_res_blocks=1)
    if what.startswith("decode"):
        with torch.device(device):
            vae = diffusers.AutoencoderKLQwenImage(**(small if tiny else {}))
        vae = vae.to(torch.bfloat16).eval().requires_grad_(False)
        for name, p in vae.named_parameters():
            norm = name.endswith("gamma")
            scale = 0.1 if p.ndim == 1 or norm else math.prod(p.shape[1:]) ** -0.5
            torch.nn.init.normal_(p, float(norm), scale)
        vae.decoder = torch.compile(vae.decoder)  # the loop around it keeps its cache in Python
        z = draw(1, Z, 1, n, n) * 0.3
        return harness.torch_work(lambda: vae.decode(z, return_dict=False)[0], tiny)
    size = dict(num_attention_heads=2, num_layers=2, joint_attention_dim=64) if tiny else {}
    transformer = harness.torch_weights(lambda: diffusers.QwenImageTransformer2DModel(**size))
    transformer.compile_repeated_blocks(fullgraph=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    given, pictures = what.startswith("edit"), draw(1, n * n // 4, 4 * Z)
    shapes = [[(1, n // 2, n // 2)] * (2 if given else 1)]
    texts = [draw(1, length, transformer.config.joint_attention_dim) for length in (TEXT, TEXT // 2)]
    noise = draw(1, n * n // 4, 4 * Z)

    def run():
        """The loop of the pipeline, of which only the two calls and the guidance cost time."""
        mu = diffusers.pipelines.qwenimage.pipeline_qwenimage.calculate_shift(n * n // 4, 256, 8192, 0.5, 0.9)
        scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)], mu=mu, device=device)
        x = noise
        for t in scheduler.timesteps:
            tokens = torch.cat([x, pictures], 1) if given else x
            told = dict(hidden_states=tokens, timestep=t.expand(1).to(x.dtype) / 1000, img_shapes=shapes)
            cond, uncond = (
                transformer(encoder_hidden_states=text, return_dict=False, **told)[0][:, : x.shape[1]].clone()
                for text in texts
            )
            both = uncond + 4.0 * (cond - uncond)
            both = both * (cond.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))
            x = scheduler.step(both, t, x, return_dict=False)[0]
        return x

    return harness.torch_work(run, tiny, STEPS)


def work(case: str, tiny: bool) -> harness.Work:
    who, what = case.split(":")
    return (jdit_work if who == "jdit" else diffusers_work)(what, tiny)


if __name__ == "__main__":
    about = f"Qwen-Image, 20B, bfloat16, {STEPS} steps with guidance, {TEXT} tokens of text, random weights."
    harness.main(__file__, __doc__, CASES, work, tflop, about, repeats=3)
