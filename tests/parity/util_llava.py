"""Tiny LLaVA models and their prompts, as transformers has them."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from flax import nnx
from util_text import load, randomise

from convert import llava as conv
from jdit.nn.text.llava import Llava

IMAGE, PAD, VOCAB = 71, 72, 80
SIDE, TOKENS = 12, 9
"""Pixels of a side, and tokens, of a picture."""
TEXT: dict[str, Any] = dict(
    model_type="llama", vocab_size=VOCAB, hidden_size=24, intermediate_size=28, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-4, rope_theta=500.0,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    model_type="clip_vision_model", hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
    image_size=SIDE, patch_size=4, layer_norm_eps=1e-3,
)  # fmt: skip


def upstream(seed: int = 0, text=TEXT, vision=VISION, **more) -> transformers.LlavaForConditionalGeneration:
    settings = dict(image_token_index=IMAGE, pad_token_id=PAD) | more
    config = transformers.LlavaConfig(text_config=dict(text), vision_config=dict(vision), **settings)
    return randomise(transformers.LlavaForConditionalGeneration(config), seed)


def read(folder: Path, dtype="float32"):
    return conv.config(json.loads((folder / "config.json").read_text()), dtype=dtype)


def ported(folder: Path, dtype="float32") -> Llava:
    cfg = read(folder, dtype)
    cast = {"bfloat16": ml_dtypes.bfloat16}.get(dtype)
    return load(folder, lambda: Llava(cfg, rngs=nnx.Rngs(0)), conv.rules(cfg), cast)


def pictures(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)


def prompts(count: int = TOKENS, before=(5, 2), after=(9, 3), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded token ids (2, N) and lengths: text, a picture's `count` tokens, text."""
    rng = np.random.default_rng(seed)
    text = lambda n: rng.integers(3, IMAGE, n).tolist()
    rows = [[*text(b), *[IMAGE] * count, *text(a)] for b, a in zip(before, after)]
    lengths = np.array([len(r) for r in rows])
    return np.array([r + [PAD] * (max(lengths) - len(r)) for r in rows]), lengths


def theirs(model, ids, lengths, pixels, skip: int = 0) -> np.ndarray:
    """Upstream's states, with the mask and positions of its pipeline."""
    mask = torch.tensor(np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    pixels = torch.tensor(np.moveaxis(pixels, -1, 1)).to(model.dtype)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids), attention_mask=mask, position_ids=positions, pixel_values=pixels,
            output_hidden_states=True,
        )  # fmt: skip
    return out.hidden_states[-1 - skip].float().numpy()
