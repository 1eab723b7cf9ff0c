"""Tiny Qwen-Image transformers in torch, every parameter random, and their port."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from util_port import ported as ported
from util_sd3 import noise, randomise

CLASS = "QwenImageTransformer2DModel"
KINDS = {
    "image": {},
    "edit-2511": dict(zero_cond_t=True),
    "layered": dict(use_additional_t_cond=True, use_layer3d_rope=True),
    "patch-1": dict(patch_size=1, in_channels=5, out_channels=3, num_layers=1),
}
SIZES = [(6, 10), (8, 4), (4, 14)]
"""Latent rows and columns of the picture that is made, and of the given ones."""
LENGTHS = (9, 4)


def transformer(*, seed: int = 1, **kw) -> QwenImageTransformer2DModel:
    cfg: dict[str, Any] = dict(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return randomise(QwenImageTransformer2DModel(**(cfg | kw)), seed)


def saved(folder: Path, **kw) -> QwenImageTransformer2DModel:
    model = transformer(**kw)
    model.save_pretrained(folder)
    return model


def pack(x: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, H, W) to tokens, as upstream's pipelines pack."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), c * patch**2)


def unpack(x: torch.Tensor, patch: int, height: int, width: int) -> torch.Tensor:
    """Tokens to (B, C, H, W), as upstream's pipelines unpack."""
    b, _, c = x.shape
    x = x.view(b, height // patch, width // patch, c // patch**2, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // patch**2, height, width)


class Inputs:
    """Latents of the picture that is made (several, for `made` layers), of `given` others, and prompts."""

    def __init__(
        self, config, *, given: int = 0, made: int = 1, lengths: tuple[int, ...] | None = LENGTHS, sizes=SIZES
    ):
        channels, batch = config.in_channels // config.patch_size**2, 2
        self.patch, self.made, self.lengths = config.patch_size, made, lengths
        self.pictures = [noise(i, batch, channels, *sizes[0]) for i in range(made)]
        self.pictures += [noise(10 + i, batch, channels, *sizes[1 + i]) for i in range(given)]
        self.text = noise(20, batch, max(LENGTHS), config.joint_attention_dim)
        self.t = torch.tensor([913.3, 20.5])
        self.kind = torch.tensor([0, 1]) if config.use_additional_t_cond else None

    def theirs(self, model) -> np.ndarray:
        """Channels last, layers after the batch where there are several."""
        cast = lambda x: x.to(model.dtype)
        grids = [(1, x.shape[2] // self.patch, x.shape[3] // self.patch) for x in self.pictures]
        mask = None
        if self.lengths is not None:
            mask = torch.arange(self.text.shape[1]) < torch.tensor(self.lengths)[:, None]
        with torch.no_grad():
            out = model(
                hidden_states=cast(torch.cat([pack(x, self.patch) for x in self.pictures], 1)), timestep=self.t / 1000,
                encoder_hidden_states=cast(self.text), encoder_hidden_states_mask=mask, img_shapes=[grids] * 2,
                additional_t_cond=self.kind,
            ).sample.float()  # fmt: skip
        size = self.pictures[0].shape[2:]
        parts = out[:, : self.made * grids[0][1] * grids[0][2]].chunk(self.made, 1)
        made = [unpack(part, self.patch, *size).movedim(1, -1) for part in parts]
        return (torch.stack(made, 1) if self.made > 1 else made[0]).numpy()

    def ours(self, call, module) -> np.ndarray:
        last = [x.movedim(1, -1).numpy() for x in self.pictures]
        x = np.stack(last[: self.made], 1) if self.made > 1 else last[0]
        kw = {} if self.kind is None else dict(kind=self.kind.numpy())
        if self.lengths is not None:
            kw["text_lengths"] = np.array(self.lengths)
        out = call(module, x, self.t.numpy(), self.text.numpy(), pictures=tuple(last[self.made :]), **kw)
        return np.asarray(out, np.float32)
