"""Tiny CogVideoX pipelines in torch, every parameter random, saved as diffusers saves them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import util_cogvideox
import util_text
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from transformers import T5Config, T5EncoderModel
from util_sd3 import t5_tokenizer

Z = 4
VAE: dict[str, Any] = dict(
    block_out_channels=(4, 8, 8, 8), latent_channels=Z, layers_per_block=1, norm_num_groups=2, sample_height=48,
    sample_width=80, scaling_factor=0.7, down_block_types=("CogVideoXDownBlock3D",) * 4,
    up_block_types=("CogVideoXUpBlock3D",) * 4,
)  # fmt: skip
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
    rescale_betas_zero_snr=True, timestep_spacing="trailing",
)  # fmt: skip
SAMPLE = dict(sample_height=6, sample_width=10)
KINDS: dict[str, dict[str, Any]] = {  # what differs: transformer, autoencoder, shift of the noise levels
    "2b": dict(transformer=SAMPLE, vae=dict(scaling_factor=1.15258426), snr_shift_scale=3.0),
    "5b": dict(transformer=util_cogvideox.KINDS["5b"]),
    "5b-i2v": dict(transformer=util_cogvideox.KINDS["5b-i2v"] | SAMPLE),
    "1.5": dict(transformer=util_cogvideox.KINDS["1.5"]),
    "1.5-i2v": dict(transformer=util_cogvideox.KINDS["1.5-i2v"], vae=dict(invert_scale_latents=True)),
}
SIZE = dict(height=48, width=80, num_frames=9)  # latents 3 x 6 x 10, patches 3 x 3 x 5


def vae(**kw) -> AutoencoderKLCogVideoX:
    """Every parameter random; matrices of about unit gain."""
    model, rng = AutoencoderKLCogVideoX(**(VAE | kw)), np.random.default_rng(3)
    for name, p in model.named_parameters():
        gain, centre = 0.3 if p.ndim == 1 else 1 / np.sqrt(np.prod(p.shape[1:])), p.ndim == 1 and "weight" in name
        p.data = torch.from_numpy(centre + gain * rng.normal(size=tuple(p.shape))).to(p.dtype)
    return model.eval()


def text_encoder(vocab: int) -> T5EncoderModel:
    settings = dict(d_model=24, d_kv=8, d_ff=24, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    return util_text.randomise(T5EncoderModel(T5Config(vocab_size=vocab, **settings)), 5)  # type: ignore[return]


def pipeline(folder: Path, kind: str) -> CogVideoXPipeline | CogVideoXImageToVideoPipeline:
    """A whole tiny pipeline of one of KINDS, saved to `folder`."""
    parts, tokens = KINDS[kind], t5_tokenizer()
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=parts.get("snr_shift_scale", 1.0))
    components: dict[str, Any] = dict(
        tokenizer=tokens, text_encoder=text_encoder(len(tokens)), vae=vae(**parts.get("vae", {})), scheduler=scheduler,
        transformer=util_cogvideox.transformer(1, **parts["transformer"]),
    )  # fmt: skip
    pipe = (CogVideoXImageToVideoPipeline if kind.endswith("i2v") else CogVideoXPipeline)(**components)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def channels_last(x: torch.Tensor) -> np.ndarray:
    """(B, T, C, Y, X) -> (B, T, Y, X, C)."""
    return np.moveaxis(x.detach().float().numpy(), 2, -1)
