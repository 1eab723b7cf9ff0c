"""Tiny Qwen2.5-VL models and their inputs, as transformers has them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import transformers
from flax import nnx
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from util_text import load, randomise

from convert import qwen2_5_vl as conv
from jdit.nn.text.qwen2_5_vl import Qwen2_5VL

IMAGE = 80
TEXT = dict(
    vocab_size=90, hidden_size=40, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-4,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 2, 2]},
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    depth=4, hidden_size=24, intermediate_size=20, num_heads=2, patch_size=4, window_size=16, out_hidden_size=40,
    fullatt_block_indexes=[1, 3],
)  # fmt: skip
"""Windows of 2 x 2 merged tokens, each of 8 x 8 pixels."""
SIZES = [(24, 40), (16, 8), (40, 24)]
"""Rows and columns of pictures: grids of 3 x 5, 2 x 1 and 5 x 3 merged tokens."""


def upstream(seed=0, text=TEXT, vision=VISION):
    config = transformers.Qwen2_5_VLConfig(text_config=dict(text), vision_config=dict(vision), image_token_id=IMAGE)
    return randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), seed)


def read(folder: Path, dtype="float32", **how):
    return conv.config(json.loads((folder / "config.json").read_text()), dtype=dtype, **how)


def ported(folder: Path, dtype="float32", **how):
    cfg = read(folder, dtype, **how)
    cast = {"bfloat16": ml_dtypes.bfloat16}.get(dtype)
    return load(folder, lambda: Qwen2_5VL(cfg, rngs=nnx.Rngs(0)), conv.rules(cfg), cast)


def pictures(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, *size, 3)).astype(np.float32) for size in sizes]


def upstream_pixels(pictures):
    """(pixel_values, image_grid_thw) by transformers' own image processor, nothing resized or rescaled."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False
    )
    out = processor(
        [np.moveaxis(p[0], -1, 0) for p in pictures], return_tensors="np", input_data_format="channels_first"
    )
    return torch.tensor(out["pixel_values"]), torch.tensor(out["image_grid_thw"])


def prompts(grids, before=(5, 2), after=(9, 3), seed=0):
    """Right-padded token ids (2, N) and lengths: text, then each picture's tokens with text between, then text."""
    rng = np.random.default_rng(seed)
    text = lambda n: rng.integers(3, IMAGE, n).tolist()
    rows = []
    for first, last in zip(before, after):
        row = text(first)
        for h, w in grids:
            row += [*text(2), *[IMAGE] * (h * w)]
        rows.append(row + text(last))
    lengths = np.array([len(r) for r in rows])
    return np.array([r + [0] * (max(lengths) - len(r)) for r in rows]), lengths
