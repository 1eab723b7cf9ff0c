"""Wan-Animate at full size, random weights, bfloat16, 77 x 480 x 832: jdit beside diffusers + torch.compile.

    python benchmarks/animate_speed.py --out benchmarks/animate_h100     both sides; writes .json and .md
    python benchmarks/animate_speed.py --only jdit                       one of them
    python benchmarks/animate_speed.py --tiny                            tiny models on any device: checks the script

A case is a whole call for one segment, STEPS steps without guidance (the model's default), on given text states: the
picture and the driving frames, uint8 on the host, to frames. Each further step of a longer run takes what a step of
"denoise" does. The stages are those of the last call: "encode" is the picture through image encoder and autoencoder
and the segment's frames and poses through the autoencoder, "face" the driving face (jdit: once a segment; diffusers
does it in every step), "rest" resizing, noise, and what else is on the host. Waiting for the device after each stage is
part of both sides. diffusers' pipeline gives its autoencoder float32 pixels; they are cast, so that both sides compute
in bfloat16. Compiled are the repeated blocks of its transformer, as its guide advises, and the adapters; not the face's
encoders and the autoencoder, whose changing shapes are compiled again and again (wan_vae.py has the decoder compiled).
Needs a GPU for figures that mean anything, and torch and diffusers for the peer's case. Memory against the number of
segments is in animate.py.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import animate
import harness

STEPS, TEXT = 4, 512
CASES = ["jdit:segment", "diffusers:segment"]
KINDS = {"encode_image": "encode", "encode_reference": "encode", "encode_segment": "encode", "encode_face": "face"}
SMALL_VAE = dict(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
SMALL = dict(
    num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=16, ffn_dim=64, num_layers=4, image_dim=32,
    added_kv_proj_dim=32, inject_face_latents_blocks=2, motion_encoder_size=32, motion_style_dim=8, motion_dim=4,
    motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=4,
    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 4, "32": 4},
)  # fmt: skip
SMALL_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=56)
VISION = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)


def size(tiny: bool) -> tuple[int, int, int]:
    return (9, 64, 96) if tiny else (77, 480, 832)


def segment_tflop(what: str) -> float:
    """Matrix products of the transformer's STEPS steps; autoencoder, encoders, norms and solver not counted."""
    d, mlp, layers, adapters = 5120, 13824, 40, 8
    frames, height, width = size(False)
    n = ((frames - 1) // 4 + 2) * (height // 16) * (width // 16)  # one latent frame more: the picture's
    layer = 2 * n * (6 * d * d + 2 * d * mlp) + 4 * n * n * d + 4 * n * (TEXT + 257) * d
    return STEPS * (layers * layer + adapters * 4 * n * d * d) / 1e12


def given(tiny: bool, side: int) -> dict[str, Any]:
    """The picture and the driving frames, uint8."""
    import numpy as np

    frames, height, width = size(tiny)
    clip = lambda seed, h, w: np.stack([animate.picture(seed + i, h, w) for i in range(frames)])
    return {"image": animate.picture(0, height, width), "pose_video": clip(1, height, width),
            "face_video": clip(500, side, side)}  # fmt: skip


def jdit_work(tiny: bool) -> harness.Work:
    from convert import registry
    from jdit import zoo
    from jdit.sharding import Rules

    configs = animate.small() if tiny else dict(zoo.VARIANTS["wan2.2-animate-14b"].components)
    configs.pop("text_encoder", None)
    configs = {name: registry.placed(cfg, "bfloat16", Rules()) for name, cfg in configs.items()}
    frames, height, width = size(tiny)
    pipe = animate.pipeline(configs, steps=STEPS, guidance=1.0, fps=30.0, segment_frames=frames)
    text = animate.prompt(TEXT, configs["transformer"].text_dim, "bfloat16")
    material = given(tiny, configs["transformer"].face_size)
    stages: dict[str, float] = {}

    def call():
        start = time.perf_counter()
        out = pipe(text, height=height, width=width, **material)
        stages.clear()
        for name, spent in out.timings.items():
            kind = KINDS.get(name.split("[")[0], name.split("[")[0])
            kind = kind if kind in ("encode", "face", "denoise", "decode") else "rest"
            stages[kind] = stages.get(kind, 0.0) + spent
        stages["rest"] = time.perf_counter() - start - sum(s for kind, s in stages.items() if kind != "rest")
        return out.pixels

    return with_stages(harness.jax_work(call, tiny), stages)


def diffusers_work(tiny: bool) -> harness.Work:
    import diffusers
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    keep = diffusers.WanAnimateTransformer3DModel._keep_in_fp32_modules
    transformer = harness.torch_weights(
        lambda: diffusers.WanAnimateTransformer3DModel(**(SMALL if tiny else {})), keep or ()
    )
    settings: Any = dict(SMALL_VISION if tiny else VISION, image_size=224, hidden_act="gelu")
    encoder = harness.torch_weights(lambda: CLIPVisionModel(CLIPVisionConfig(**settings)))
    vae = harness.torch_weights(lambda: diffusers.AutoencoderKLWan(**(SMALL_VAE if tiny else {})))
    for name, p in vae.named_parameters():
        one = name.endswith("gamma") or p.ndim == 1
        torch.nn.init.normal_(p, float(name.endswith("gamma")), 0.1 if one else math.prod(p.shape[1:]) ** -0.5)
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    pipe = diffusers.WanAnimatePipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, image_processor=CLIPImageProcessor(),
        image_encoder=encoder, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    transformer.compile_repeated_blocks()
    for adapter in transformer.face_adapter:
        adapter.compile()
    stages: dict[str, float] = {}
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def timed(kind: str, fn: Callable) -> Callable:
        def wrapped(*args, **kw):
            wait()
            start = time.perf_counter()
            out = fn(*args, **kw)
            wait()
            stages[kind] = stages.get(kind, 0.0) + time.perf_counter() - start
            return out

        return wrapped

    encode = vae.encode
    vae.encode = timed("encode", lambda x, *a, **kw: encode(x.to(vae.dtype), *a, **kw))
    vae.decode = timed("decode", vae.decode)
    pipe.encode_image = timed("encode", pipe.encode_image)
    transformer.forward = timed("denoise", transformer.forward)
    frames, height, width = size(tiny)
    device = vae.encoder.conv_in.weight.device
    material = given(tiny, transformer.config.motion_encoder_size)
    videos = {n: [Image.fromarray(f) for f in v] for n, v in material.items() if n != "image"}
    text = torch.randn(1, TEXT, transformer.config.text_dim, device=device, dtype=torch.bfloat16)
    arguments = dict(
        image=Image.fromarray(material["image"]), prompt_embeds=text, height=height, width=width, guidance_scale=1.0,
        segment_frame_length=frames, num_inference_steps=STEPS, output_type="pt", **videos,
    )  # fmt: skip

    def call():
        stages.clear()
        start = time.perf_counter()
        out = pipe(**arguments).frames
        wait()
        stages["rest"] = time.perf_counter() - start - sum(stages.values())
        return out

    return with_stages(harness.torch_work(call, tiny), stages)


def with_stages(work: harness.Work, stages: dict[str, float]) -> harness.Work:
    """Facts that also hold the seconds of each stage of the last call."""
    facts = work.facts
    return work._replace(facts=lambda: facts() | {"stages": dict(stages)})


def work(case: str, tiny: bool) -> harness.Work:
    return (jdit_work if case.startswith("jdit") else diffusers_work)(tiny)


if __name__ == "__main__":
    frames, height, width = size(False)
    about = f"bfloat16, a segment of {frames} x {height} x {width}, {STEPS} steps without guidance, random weights."
    harness.main(__file__, __doc__, CASES, work, segment_tflop, about, repeats=2)
