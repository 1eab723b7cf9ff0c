"""Tiny HunyuanVideo pipelines in torch, every parameter random, saved as diffusers saves them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import util_hunyuan_video
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from util_cogvideox_vae import randomised
from util_sd3 import WORDS, clip_tokenizer
from util_text import randomise
from util_tokenizers import llama3_folder

from jdit.pipeline.hunyuan_prompts import VIDEO

Z = 4
VAE = dict(block_out_channels=(2, 4, 4, 4), latent_channels=Z, layers_per_block=1, norm_num_groups=2)
LLAMA: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=28, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1,
    rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)  # fmt: skip
SIZE = dict(height=48, width=80, num_frames=9)  # latents 3 x 6 x 10, patches 3 x 3 x 5
LATENTS = (3, 6, 10)


def llama_tokenizer(folder: Path, **how) -> PreTrainedTokenizerFast:
    text = VIDEO.head.replace(VIDEO.tail, " ") + " ".join(WORDS)
    return PreTrainedTokenizerFast.from_pretrained(llama3_folder(folder, text, **how))


def clip_text(folder: Path, original: bool = False) -> dict[str, Any]:
    """CLIP with its tokenizer, by upstream's names; see `encoders`."""
    two = clip_tokenizer(folder / "t2", "<|endoftext|>")
    clip = CLIPTextConfig(
        vocab_size=len(two), hidden_size=20, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=1 if original else 2, eos_token_id=two.eos_token_id, bos_token_id=two.bos_token_id,
        pad_token_id=two.pad_token_id,
    )  # fmt: skip
    return dict(tokenizer_2=two, text_encoder_2=randomise(CLIPTextModel(clip), 4))


def encoders(folder: Path, original: bool = False) -> dict[str, Any]:
    """Both encoders with their tokenizers, by upstream's names; `original` as files without config imply them."""
    one = llama_tokenizer(folder / "t1")
    heads = dict(head_dim=128, num_attention_heads=1, rope_parameters={"rope_theta": 5e5}) if original else {}
    llama = randomise(LlamaModel(LlamaConfig(vocab_size=len(one), **(LLAMA | heads))), 3)
    return dict(tokenizer=one, text_encoder=llama, **clip_text(folder, original))


def vae(**kw) -> AutoencoderKLHunyuanVideo:
    return randomised(AutoencoderKLHunyuanVideo(**(VAE | kw)), seed=5)


def pipeline(folder: Path, original: bool = False, **transformer) -> HunyuanVideoPipeline:
    """A whole tiny pipeline, saved to `folder / "model"`; see `encoders`."""
    groups = dict(block_out_channels=(32,) * 4, norm_num_groups=32) if original else {}
    heads = dict(attention_head_dim=32, rope_axes_dim=(4, 14, 14)) if original else {}
    pipe = HunyuanVideoPipeline(
        **encoders(folder, original), vae=vae(**groups),
        transformer=util_hunyuan_video.transformer(**(heads | transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    return pipe


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().movedim(1, -1).numpy()
