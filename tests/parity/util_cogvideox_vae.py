"""Tiny CogVideoX autoencoders in torch, every parameter random, and their port through the real converter."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX as Upstream
from util_port import ported as ported

from convert import autoencoder_kl_cogvideox as cog
from convert.component import Component
from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

COMPONENT = Component(cog.CLASS, AutoencoderKLCogVideoX, cog.config, cog.upstream_config, cog.rules)
BLOCKS = dict(down_block_types="CogVideoXDownBlock3D", up_block_types="CogVideoXUpBlock3D")
KINDS = {
    # all four levels: two halve the frames, one does not, the last changes nothing
    "2b": dict(
        block_out_channels=(4, 8, 8, 12), latent_channels=3, layers_per_block=1, norm_num_groups=2, norm_eps=1e-2,
    ),
    "other": dict(
        block_out_channels=(8, 4), latent_channels=5, in_channels=4, out_channels=5, layers_per_block=2, act_fn="swish",
        norm_num_groups=4, temporal_compression_ratio=2.0, scaling_factor=0.7, force_upcast=False, use_quant_conv=True,
        use_post_quant_conv=True, invert_scale_latents=True,
    ),
    "flat": dict(
        block_out_channels=(4, 4, 4), latent_channels=2, layers_per_block=1, norm_num_groups=2, sample_height=48,
        sample_width=40,
    ),
}  # fmt: skip
"""Configs that differ in every field that changes numbers."""


def upstream(kind: str, seed: int = 0) -> Upstream:
    kw = KINDS[kind]
    blocks = {name: (block,) * len(kw["block_out_channels"]) for name, block in BLOCKS.items()}
    return randomised(Upstream(**kw, **blocks), seed)


def randomised(model: torch.nn.Module, seed: int) -> Any:
    """Every parameter random, the norms' about 1; matrices of about unit gain."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        gain = 0.3 if p.ndim == 1 else 1 / np.sqrt(np.prod(p.shape[1:]))
        centre = p.ndim == 1 and name.endswith("weight")
        p.data = torch.from_numpy(centre + gain * rng.normal(size=tuple(p.shape))).to(p.dtype)
    return model.eval().requires_grad_(False)


def last(x) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(x.float().numpy(), 1, -1)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
