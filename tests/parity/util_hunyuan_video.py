"""Tiny HunyuanVideo transformers in torch, every parameter random, and their port."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideoTransformer3DModel
from util_port import ported as ported
from util_sd3 import noise, randomise

CLASS = "HunyuanVideoTransformer3DModel"
KINDS = {
    "text": {},
    "no guidance": dict(guidance_embeds=False, qk_norm=None, mlp_ratio=3.0),
    "token_replace": dict(image_condition_type="token_replace"),
    "latent_concat": dict(image_condition_type="latent_concat", in_channels=9, guidance_embeds=False),
    "patches of frames": dict(patch_size=1, patch_size_t=2, in_channels=3, out_channels=None),
}
SIZES = 4, 6, 10
LENGTHS = (7, 3)


def transformer(*, seed: int = 1, **kw) -> HunyuanVideoTransformer3DModel:
    cfg: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=3,
        num_refiner_layers=2, text_embed_dim=24, pooled_projection_dim=20, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return randomise(HunyuanVideoTransformer3DModel(**(cfg | kw)), seed)


def saved(folder: Path, **kw) -> HunyuanVideoTransformer3DModel:
    model = transformer(**kw)
    model.save_pretrained(folder)
    return model


class Inputs:
    """Latents, two prompts and their times and guidance."""

    def __init__(self, config, *, lengths: tuple[int, ...] = LENGTHS, sizes: tuple[int, ...] = SIZES):
        batch, self.lengths = len(lengths), lengths
        self.x = noise(1, batch, config.in_channels, *sizes)
        self.text = noise(2, batch, max(LENGTHS), config.text_embed_dim)
        self.pooled = noise(3, batch, config.pooled_projection_dim)
        self.t = torch.tensor([913.3, 20.5])
        self.guidance = torch.tensor([6000.0, 3300.0]) if config.guidance_embeds else None

    @property
    def mask(self) -> torch.Tensor:
        return (torch.arange(self.text.shape[1]) < torch.tensor(self.lengths)[:, None]).int()

    def theirs(self, model) -> np.ndarray:
        """Channels last."""
        cast = lambda x: x.to(model.dtype)
        with torch.no_grad():
            out = model(
                cast(self.x), self.t, cast(self.text), self.mask, cast(self.pooled),
                guidance=self.guidance,
            ).sample  # fmt: skip
        return out.float().movedim(1, -1).numpy()

    def given(self) -> tuple[Any, ...]:
        """Arguments of our call, as NumPy arrays."""
        guidance = None if self.guidance is None else self.guidance.numpy()
        return self.x.movedim(1, -1).numpy(), self.t.numpy(), self.text.numpy(), self.pooled.numpy(), guidance

    def ours(self, call, module) -> np.ndarray:
        lengths = None if min(self.lengths) == self.text.shape[1] else np.array(self.lengths)
        return np.asarray(call(module, *self.given(), text_lengths=lengths), np.float32)
