"""Tiny Wan-Animate transformers in torch, every parameter random, and what they are given."""

from pathlib import Path

import numpy as np
import torch
import util_wan
from diffusers import WanAnimateTransformer3DModel
from util_sd3 import noise

TINY = util_wan.TINY | dict(
    in_channels=14, latent_channels=5, num_layers=4, image_dim=22, added_kv_proj_dim=32, motion_encoder_size=16,
    motion_encoder_channel_sizes={"4": 16, "8": 12, "16": 8, "32": 3}, motion_style_dim=14, motion_dim=6,
    motion_encoder_dim=18, face_encoder_hidden_dim=10, face_encoder_num_heads=3, inject_face_latents_blocks=2,
    motion_encoder_batch_size=8,
)  # fmt: skip
KINDS = {
    "pairs": {},
    "every": dict(
        num_layers=2, inject_face_latents_blocks=1, added_kv_proj_dim=None, motion_encoder_size=8, freq_dim=15,
        attention_head_dim=10, num_attention_heads=2, cross_attn_norm=False, eps=1e-2, out_channels=None,
        in_channels=16, latent_channels=6, patch_size=(1, 1, 3), motion_encoder_batch_size=5,
    ),
    "one": dict(num_layers=3, inject_face_latents_blocks=3, pos_embed_seq_len=14, patch_size=(2, 2, 1)),
    "no-picture": dict(
        num_layers=1, inject_face_latents_blocks=1, image_dim=None, added_kv_proj_dim=None, latent_channels=None,
        motion_encoder_size=4, face_encoder_num_heads=1,
    ),
}  # fmt: skip
"""Configs that differ in every field that changes numbers."""
ARGUMENTS = (
    "hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "pose_hidden_states",
    "face_pixel_values",
)  # fmt: skip
LAST = ("hidden_states", "pose_hidden_states", "face_pixel_values")
"""Arguments whose channels upstream has second."""


def transformer(seed: int = 1, **kw) -> WanAnimateTransformer3DModel:
    model = util_wan.random(WanAnimateTransformer3DModel(**(TINY | kw)), seed)
    for name, p in model.motion_encoder.named_parameters():  # its layers divide by the root of their fan-in themselves
        gain = 0.3 if name.endswith("bias") else 2.0 if "motion_network" in name else 1.0
        p.data = gain * noise(seed + p.numel(), *p.shape)
    for name, p in [*model.face_encoder.named_parameters(), *model.face_adapter.named_parameters()]:
        p.data = p.data - 1 if name.endswith("bias") else 2 * p.data  # so that the face shows, and not biases alone
    model.face_encoder.padding_tokens.data *= 5
    return model


def saved(folder: Path, **kw) -> WanAnimateTransformer3DModel:
    model = transformer(**kw)
    model.save_pretrained(folder)
    return model


def latent_channels(config) -> int:
    return (config.in_channels - 4) // 2 if config.latent_channels is None else config.latent_channels


def inputs(config, *, grid=(5, 4, 7), batch: int = 2) -> dict[str, torch.Tensor]:
    """Latents of an odd grid, unequal prompts, a pose, and a face of as many frames as fit and one that does not fill
    its latent frame."""
    channels = latent_channels(config)
    given = util_wan.inputs(config, grid=(1, 1, 1), batch=batch)
    frames, *sides = [n * p for n, p in zip(grid, config.patch_size)]
    size = config.motion_encoder_size
    film = batch, 3, 4 * (frames - 2) + 1
    faces = noise(12, *film, size, size) / 2 + noise(13, *film, 1, 1)
    return given | {
        "hidden_states": noise(10, batch, 2 * channels + 4, frames, *sides),
        "pose_hidden_states": noise(11, batch, channels, frames - 1, *sides),
        "face_pixel_values": faces.clip(-1, 1),
    }


def ours(given: dict[str, torch.Tensor]) -> tuple:
    """`given` as arguments of the port: (x, t, text, image, pose, face)."""
    last = lambda name, v: np.moveaxis(v, 1, -1) if name in LAST else v
    return tuple(None if (v := given.get(n)) is None else last(n, v.float().numpy()) for n in ARGUMENTS)
