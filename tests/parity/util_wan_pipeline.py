"""Tiny Wan pipelines in torch, every parameter random, saved as diffusers saves them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import util_text
import util_wan
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from util_sd3 import t5_tokenizer

from convert import write
from jdit.sharding import dotted, leaves

Z = 4
VAE_21: dict[str, Any] = dict(
    base_dim=4, z_dim=Z, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.3, -0.2, 0.1, -0.5],
    latents_std=[1.3, 0.8, 2.1, 0.6],
)  # fmt: skip
VAE_22 = VAE_21 | dict(
    decoder_base_dim=6, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16
)
VISION = dict(
    hidden_size=22, intermediate_size=30, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14,
    hidden_act="gelu", projection_dim=20,
)  # fmt: skip
TEXT = dict(in_channels=Z, out_channels=Z)
FRAMES = dict(in_channels=2 * Z + 4, out_channels=Z)
TOKENS = dict(image_dim=22, added_kv_proj_dim=32)
KINDS: dict[str, dict[str, Any]] = {
    "t2v": dict(transformer=TEXT),
    "i2v": dict(transformer=FRAMES | TOKENS),
    "flf2v": dict(transformer=FRAMES | TOKENS | dict(pos_embed_seq_len=10)),
    "t2v-experts": dict(transformer=TEXT, boundary_ratio=0.875),
    "i2v-experts": dict(transformer=FRAMES, boundary_ratio=0.9),
    "5b": dict(transformer=TEXT, expand_timesteps=True),
}


def vae(**kw) -> AutoencoderKLWan:
    """Every parameter random; matrices of about unit gain."""
    model, rng = AutoencoderKLWan(**kw), np.random.default_rng(3)
    for name, p in model.named_parameters():
        gain = 0.3 if p.ndim == 1 or name.endswith("gamma") else 1 / np.sqrt(np.prod(p.shape[1:]))
        p.data = torch.from_numpy(name.endswith("gamma") + gain * rng.normal(size=tuple(p.shape))).to(p.dtype)
    return model.eval()


def text_encoder(vocab: int, **kw) -> UMT5EncoderModel:
    settings = dict(d_model=20, d_kv=12, d_ff=24, num_layers=2, num_heads=3) | kw
    return util_text.randomise(UMT5EncoderModel(UMT5Config(vocab_size=vocab, **settings)), 5)  # type: ignore[return]


def pipeline(folder: Path, kind: str, *, shift: float = 3.0, **kw) -> WanPipeline | WanImageToVideoPipeline:
    """A whole tiny pipeline of one of KINDS, saved to `folder`. `kw` are fields of the autoencoder's config."""
    parts = dict(KINDS[kind])
    own, tokens = parts.pop("transformer"), t5_tokenizer()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    vae_config = (VAE_22 if kind == "5b" else VAE_21) | kw
    components: dict[str, Any] = dict(
        tokenizer=tokens, text_encoder=text_encoder(len(tokens)), vae=vae(**vae_config), scheduler=scheduler,
        transformer=util_wan.transformer(1, **own),
    )  # fmt: skip
    if "boundary_ratio" in parts:
        components["transformer_2"] = util_wan.transformer(2, **own)
    if own.get("image_dim"):
        components["image_encoder"] = util_text.randomise(CLIPVisionModel(CLIPVisionConfig(**VISION)), 6)
        side = {"height": 28, "width": 28}
        components["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side)
    pipe = (WanImageToVideoPipeline if own["in_channels"] != Z else WanPipeline)(**components, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().float().numpy(), 1, -1)


def original_names(module, rules, prefix: str = "") -> dict[str, np.ndarray]:
    tensors = {dotted(p): np.asarray(v) for p, v in leaves(module).items()}
    return {prefix + t.key: t.load().copy() for t in write.outputs(tensors, rules)}
