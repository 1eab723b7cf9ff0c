"""Tiny Wan-Animate pipelines in torch, every parameter random, saved as diffusers saves them, and what drives them."""

from pathlib import Path

import numpy as np
import torch
import util_text
import util_wan_animate
from diffusers import UniPCMultistepScheduler, WanAnimatePipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from util_sd3 import t5_tokenizer
from util_wan_pipeline import VAE_21, VISION, Z, text_encoder, vae

SIDE = 16
TRANSFORMER = dict(
    patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=8, in_channels=2 * Z + 4, latent_channels=Z,
    out_channels=Z, text_dim=20, freq_dim=16, ffn_dim=40, num_layers=4, image_dim=22, added_kv_proj_dim=32,
    inject_face_latents_blocks=2, motion_encoder_size=SIDE, motion_style_dim=10, motion_dim=3, motion_encoder_dim=12,
    face_encoder_hidden_dim=14, face_encoder_num_heads=2,
    motion_encoder_channel_sizes={"4": 10, "8": 6, "16": 5},
)  # fmt: skip


def pipeline(folder: Path) -> WanAnimatePipeline:
    """A whole tiny pipeline, saved to `folder`."""
    tokens = t5_tokenizer()
    side = {"height": 28, "width": 28}
    pipe = WanAnimatePipeline(
        tokenizer=tokens, text_encoder=text_encoder(len(tokens)), vae=vae(**VAE_21),
        transformer=util_wan_animate.transformer(**TRANSFORMER),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side),
        image_encoder=util_text.randomise(CLIPVisionModel(CLIPVisionConfig(**VISION)), 6),  # type: ignore[arg-type]
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def clip(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """A video of uint8 noise that differs from frame to frame."""
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), np.uint8)


def pictures(video: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in video]


def run_upstream(pipe: WanAnimatePipeline, noises: list[torch.Tensor], **kw):
    """Upstream's result where each segment starts from its own given noise."""
    left = list(noises)
    pipe.prepare_latents = lambda *a, **k: left.pop(0).clone()  # type: ignore[method-assign]
    with torch.no_grad():
        return pipe(**kw).frames
