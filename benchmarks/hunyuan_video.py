"""HunyuanVideo 13B at full size, random weights, bfloat16, 129 frames: jdit beside diffusers + torch.compile.

    python benchmarks/hunyuan_video.py --out benchmarks/hunyuan_video_h100  every case; writes .json and .md
    python benchmarks/hunyuan_video.py --only 544,decode                    the cases that contain one of these texts
    python benchmarks/hunyuan_video.py --tiny                               tiny models on any device: checks the script

`step SIZE` is a sampling run of one step with embedded guidance, of one prompt of WORDS tokens padded to TEXT, on given
text states: 119,056 tokens at 720 x 1280, 67,576 at 544 x 960. jdit's has its tables of modulation and refined text in
it. `decode SIZE` is the autoencoder by tiles of frames, rows and columns, the same tiles on both sides; jdit's frames
leave as uint8, as in its pipelines, diffusers' decoder gives bfloat16. Of its transformer the repeated blocks are
compiled, as its guide advises. Compile time is the first call's time less a later call's; the time to the first result
counts from the start of the process, weights made on the device, not loaded. Needs a GPU for figures that mean
anything, and torch and diffusers for the peer's cases.
"""

import math

import harness

FRAMES, TEXT, WORDS = 129, 256, 60
SIZES = {"544": (544, 960), "720": (720, 1280)}
WIDTH, LAYERS, SINGLES, Z = 3072, 20, 40, 16
LEVELS = (
    (512, 512, 1, 2),
    (512, 512, 2, 2),
    (512, 256, 2, 2),
    (256, 128, 1, 1),
)  # c in, c out, frames, rows and columns
CASES = [f"{who}:{what} {size}" for size in SIZES for what in ("step", "decode") for who in ("jdit", "diffusers")]


def latent_size(size: str, tiny: bool) -> tuple[int, int, int]:
    frames, (height, width) = (FRAMES, SIZES[size]) if not tiny else (21, (32, 288))
    return (frames - 1) // 4 + 1, height // 8, width // 8


def tflop(what: str) -> float:
    """Matrix products and convolutions; norms, refiner, modulation, blending and solver not counted."""
    kind, size = what.split()
    t, y, x = latent_size(size, False)
    if kind == "step":
        n = t * y * x // 4 + TEXT
        return (LAYERS + SINGLES) * (2 * n * 12 * WIDTH**2 + 4 * n * n * WIDTH) / 1e12
    parts = [[min(tile, n - i) for i in range(0, n, step)] for n, tile, step in ((t, 5, 3), (y, 32, 24), (x, 32, 24))]
    return sum(tile_flop(a, b, c) for a in parts[0] for b in parts[1] for c in parts[2]) / 1e12


def tile_flop(t: int, y: int, x: int) -> float:
    """Of the decoder's 3 x 3 x 3 convolutions and its attention, on a tile of latents."""
    wide = LEVELS[0][0]
    total = t * y * x * (27 * (Z * wide + 4 * wide**2) + 4 * wide**2 + 2 * t * y * x * wide)
    for before, c, time, space in LEVELS:
        total += t * y * x * 27 * (before * c + 5 * c * c)
        if space > 1:
            t, y, x = (t - 1) * time + 1, y * space, x * space
            total += t * y * x * 27 * c * c
    return 2 * (total + t * y * x * 27 * LEVELS[-1][1] * 3)


def jdit_work(kind: str, size: str, tiny: bool) -> harness.Work:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jdit import sampling
    from jdit.nn.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
    from jdit.nn.vae.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from jdit.nn.vae.autoencoder_kl_hunyuan_video_config import AutoencoderKLHunyuanVideoConfig
    from jdit.pipeline import executor, hunyuan_stages
    from jdit.pipeline.given import GivenFrames
    from jdit.structs import Text

    latents = jax.random.normal(jax.random.key(1), (1, *latent_size(size, tiny), Z))
    if kind == "decode":
        small = dict(channels=(8, 8, 8, 8), groups=2, layers=1) if tiny else {}
        cfg = AutoencoderKLHunyuanVideoConfig(dtype="bfloat16", **small)
        gain = lambda shape: 0.1 if len(shape) == 1 else math.prod(shape[:-1]) ** -0.5  # unit variance
        vae = harness.jax_weights(lambda: AutoencoderKLHunyuanVideo(cfg, rngs=nnx.Rngs(0)), gain)
        decode = lambda vae, z: hunyuan_stages.decode(vae, z, "uint8", True, False, False)
        whole = executor.compiled(decode)
        return harness.jax_work(lambda: whole(vae, latents), tiny)
    few = dict(heads=2, layers=2, single_layers=2, text_dim=64) if tiny else {}
    cfg = HunyuanVideoConfig(**few, dtype="bfloat16")
    net = harness.jax_weights(lambda: HunyuanVideo(cfg, rngs=nnx.Rngs(0)))
    draw = lambda *shape: jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
    text = Text(draw(1, TEXT, cfg.text_dim), draw(1, cfg.pooled_dim), lengths=jnp.full(1, WORDS))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 7.0}
    table = sampling.from_config(config, 1, sigmas=np.ones(1))

    def denoise(net, x, text, table, scale):
        tables = hunyuan_stages.modulate(net, text, table, scale)
        given = (text, GivenFrames(), tables, table, scale, None, None)
        return hunyuan_stages.denoise(net, x, *given, two_passes=False, report=False)

    run = executor.compiled(denoise)
    return harness.jax_work(lambda: run(net, latents, text, table, jnp.float32(6.0)), tiny)


def diffusers_work(kind: str, size: str, tiny: bool) -> harness.Work:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1)
    t, y, x = latent_size(size, tiny)
    if kind == "decode":
        with torch.device(device):
            vae = diffusers.AutoencoderKLHunyuanVideo(**(small if tiny else {}))
        vae = vae.to(torch.bfloat16).eval().requires_grad_(False)
        for name, p in vae.named_parameters():
            scale, norm = 0.1 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5, p.ndim == 1 and "weight" in name
            torch.nn.init.normal_(p, float(norm), scale)
        vae.enable_tiling()
        vae.decoder = torch.compile(vae.decoder)  # what is around it blends tiles in Python
        z = draw(1, Z, t, y, x) * 0.3
        return harness.torch_work(lambda: vae.decode(z, return_dict=False)[0], tiny)
    few = dict(num_attention_heads=2, num_layers=2, num_single_layers=2, text_embed_dim=64) if tiny else {}
    transformer = harness.torch_weights(lambda: diffusers.HunyuanVideoTransformer3DModel(**few))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    vae = diffusers.AutoencoderKLHunyuanVideo(**small)  # only its size factors are used
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, vae, scheduler, None, None)
    pipe.set_progress_bar_config(disable=True)
    transformer.compile_repeated_blocks()
    given = dict(
        prompt_embeds=draw(1, TEXT, transformer.config.text_embed_dim), pooled_prompt_embeds=draw(1, 768),
        prompt_attention_mask=(torch.arange(TEXT, device=device) < WORDS)[None].long(), height=8 * y, width=8 * x,
        latents=draw(1, Z, t, y, x).float(), num_frames=4 * t - 3, num_inference_steps=1, guidance_scale=6.0,
        output_type="latent",
    )  # fmt: skip
    return harness.torch_work(lambda: pipe(**given).frames, tiny)


def work(case: str, tiny: bool) -> harness.Work:
    who, what = case.split(":")
    return (jdit_work if who == "jdit" else diffusers_work)(*what.split(), tiny)


if __name__ == "__main__":
    about = f"HunyuanVideo 13B, bfloat16, {FRAMES} frames, a step with embedded guidance, random weights."
    harness.main(__file__, __doc__, CASES, work, tflop, about, repeats=2)
