"""Tiny CogVideoX transformers in torch, every parameter random, and their port through the real converter."""

from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from util_port import ported as ported
from util_sd3 import noise, randomise

CLASS = "CogVideoXTransformer3DModel"
TINY = dict(
    num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=20, text_embed_dim=24,
    num_layers=3, sample_width=14, sample_height=10, sample_frames=9, max_text_seq_length=11,
    spatial_interpolation_scale=1.4, temporal_interpolation_scale=0.8,
)  # fmt: skip
ROTARY = dict(use_rotary_positional_embeddings=True)
NEW = ROTARY | dict(patch_size_t=2, patch_bias=False, sample_width=30, sample_height=30, num_layers=2)
KINDS = {
    "2b": {},
    "5b": ROTARY,
    "5b-i2v": ROTARY | dict(in_channels=8, use_learned_positional_embeddings=True, num_layers=2),
    "1.5": NEW,
    "1.5-i2v": NEW | dict(in_channels=8, ofs_embed_dim=20),
    "other": dict(
        attention_bias=False, norm_elementwise_affine=False, norm_eps=1e-2, activation_fn="gelu", patch_bias=False,
        patch_size=1, temporal_compression_ratio=2, sample_frames=5, out_channels=3, num_layers=1,
    ),
}  # fmt: skip
"""Configs that differ in every field that changes numbers."""


def transformer(seed: int = 1, **kw) -> CogVideoXTransformer3DModel:
    model = randomise(CogVideoXTransformer3DModel(**(TINY | kw)), seed)
    if model.config.use_learned_positional_embeddings:  # a buffer
        pos = model.patch_embed.pos_embedding
        pos.data = 0.5 * noise(seed + 7, *pos.shape)
    return model


def saved(folder: Path, **kw) -> CogVideoXTransformer3DModel:
    model = transformer(**kw)
    model.save_pretrained(folder)
    return model


def inputs(config, *, sizes: tuple[int, int, int] | None = None, batch: int = 2) -> dict[str, torch.Tensor]:
    """Latents of the sample size, or of other frames, rows and columns."""
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    own = (frames + frames % (config.patch_size_t or 1), config.sample_height, config.sample_width)
    own = (4, 6, 10) if config.patch_size_t else own
    frames, rows, columns = sizes or own
    return {
        "hidden_states": noise(0, batch, frames, config.in_channels, rows, columns),
        "encoder_hidden_states": noise(1, batch, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.tensor([913, 20])[:batch],
    }


def ours(given: dict[str, torch.Tensor]) -> tuple:
    """`given` as arguments of the port: (x, t, text)."""
    x, t, text = (given[n].float().numpy() for n in ("hidden_states", "timestep", "encoder_hidden_states"))
    return np.moveaxis(x, 2, -1), t, text


def rotary(model, sizes) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The table that upstream's pipeline makes for latents of frames, rows and columns."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    pipe = CogVideoXPipeline(None, None, None, model, None)  # type: ignore[arg-type]
    frames, rows, columns = sizes
    return pipe._prepare_rotary_positional_embeddings(8 * rows, 8 * columns, frames, torch.device("cpu"))


def theirs(model, given: dict[str, torch.Tensor]) -> np.ndarray:
    x = given["hidden_states"]
    ofs = None if model.config.ofs_embed_dim is None else x.new_full((1,), 2.0)
    turn = rotary(model, (x.shape[1], *x.shape[3:]))
    with torch.no_grad():
        return np.moveaxis(model(**given, ofs=ofs, image_rotary_emb=turn).sample.float().numpy(), 2, -1)
