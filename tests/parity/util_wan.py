"""Tiny Wan transformers in torch, every parameter random, and their port through the real converter."""

from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from util_port import ported as ported
from util_sd3 import noise, randomise

TINY = dict(
    patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=8, in_channels=6, out_channels=5, text_dim=20,
    freq_dim=16, ffn_dim=40, num_layers=3, cross_attn_norm=True, eps=1e-6,
)  # fmt: skip
IMAGE = dict(image_dim=22, added_kv_proj_dim=32)
KINDS = {
    "t2v": {},
    "i2v": IMAGE,
    "flf2v": IMAGE | dict(pos_embed_seq_len=14, num_layers=2),
    "picture-in-text": dict(image_dim=22, num_layers=2),
    "other": dict(
        patch_size=(2, 1, 3), attention_head_dim=10, num_attention_heads=2, cross_attn_norm=False, eps=1e-2,
        freq_dim=15, out_channels=None, num_layers=1, qk_norm=None,
    ),
}  # fmt: skip
"""Configs that differ in every field that changes numbers."""
UPSTREAM_TEXT = 512
"""Text tokens that upstream takes for granted where a picture has keys of its own."""


def transformer(seed: int = 1, **kw) -> WanTransformer3DModel:
    return random(WanTransformer3DModel(**(TINY | kw)), seed)


def random(model, seed: int):
    """Every parameter random, tables and positions large enough to show."""
    randomise(model, seed)
    for name, p in model.named_parameters():
        if name.endswith(("scale_shift_table", "pos_embed")):
            p.data = 0.5 * noise(seed + p.numel(), *p.shape)
    return model


def saved(folder: Path, **kw) -> WanTransformer3DModel:
    model = transformer(**kw)
    model.save_pretrained(folder)
    return model


def inputs(config, *, grid=(3, 5, 7), text: int | None = None, batch: int = 2) -> dict[str, torch.Tensor]:
    """Latents of an odd grid, prompts of unequal length padded with zeros, image tokens where they are taken."""
    sizes = [n * p for n, p in zip(grid, config.patch_size)]
    length = text or (UPSTREAM_TEXT if config.added_kv_proj_dim else 11)
    states = noise(1, batch, length, config.text_dim)
    for row, end in enumerate((length - 3, 4)[:batch]):
        states[row, end:] = 0
    out = {"hidden_states": noise(0, batch, config.in_channels, *sizes), "encoder_hidden_states": states}
    out["timestep"] = torch.tensor([913.3, 20.5])[:batch]
    if config.image_dim:
        pictures = 2 if config.pos_embed_seq_len else 1
        out["encoder_hidden_states_image"] = noise(2, pictures * batch, 7, config.image_dim)
    return out


def ours(module, given: dict[str, torch.Tensor]) -> tuple:
    """`given` as arguments of the port: (x, t, text, image)."""
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    x, t, text, image = (None if (v := given.get(n)) is None else v.float().numpy() for n in names)
    return np.moveaxis(x, 1, -1), t, text, image


def theirs(model, given: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return np.moveaxis(model(**given).sample.float().numpy(), 1, -1)
