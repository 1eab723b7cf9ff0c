"""Qwen-Image in single files: what they are taken for, what lies beside them, and the way back."""

import json

import numpy as np
import pytest
import torch
import transformers
import util_qwen_image
from safetensors.torch import load_file, save_file
from test_qwen_image_files import named, quantised
from util_sd3 import randomise

from convert import qwen2_5_vl, qwen_image, stream
from convert.convert import convert, targets
from convert.source import open_source

pytestmark = pytest.mark.torch

SPLIT = dict(attention_head_dim=32, axes_dims_rope=(4, 14, 14), num_layers=1)
"""Heads that are split as the releases' are, which a file does not tell."""


@pytest.fixture(scope="module")
def dit():
    return {zero: util_qwen_image.transformer(zero_cond_t=zero, **SPLIT) for zero in (False, True)}


@pytest.fixture(scope="module")
def encoder():
    """Heads of 128 in the language model and of 80 in the tower."""
    text = dict(
        vocab_size=50, hidden_size=256, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=80, intermediate_size=20, num_heads=1, out_hidden_size=256)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=151655)
    return randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), 3)


def published(model) -> dict[str, torch.Tensor]:
    """Under the names of the releases."""
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    rename = lambda k: next((new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)), k)
    return {rename(k): v.contiguous() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_what_a_transformer_is_taken_for(dit, prefix, tmp_path):
    plain, marked = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({prefix + k: v for k, v in dit[False].state_dict().items()}, plain)
    save_file(named(dit[True].state_dict(), prefix), marked)
    for file, family, model in ((plain, "qwen-image", dit[False]), (marked, "qwen-image-edit-plus", dit[True])):
        source = open_source(file)
        part = source.parts["transformer"]
        assert source.family == family and part.cfg == qwen_image.config(dict(model.config))
        assert not stream.problems(part.reader, part.rules, targets(part.cfg))


def test_way_back_keeps_the_mark(dit, tmp_path):
    dit[True].save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "jdit")
    convert(tmp_path / "jdit", tmp_path / "one.safetensors", to="original", check=True)
    back, want = load_file(tmp_path / "one.safetensors"), named(dit[True].state_dict(), "model.diffusion_model.")
    assert back.keys() == want.keys() and all(torch.equal(back[k], want[k]) for k in want)


def test_a_bundle_of_all_components(dit, encoder, tmp_path):
    """The prefixes of ComfyUI's checkpoints; and the encoder alone, in scaled float8, beside a transformer."""
    prefix = "text_encoders.qwen25_7b."
    whole = {f"model.diffusion_model.{k}": v for k, v in dit[False].state_dict().items()}
    whole |= {f"{prefix}transformer.{k}": v for k, v in published(encoder).items()}
    whole |= {f"{prefix}logit_scale": torch.ones(())}
    save_file(whole, tmp_path / "bundle.safetensors")
    (tmp_path / "text_encoders").mkdir()
    tensors, _ = quantised(published(encoder), False, blocks=("model.layers", "visual.blocks"))
    save_file(tensors, tmp_path / "text_encoders" / "qwen_2.5_vl_7b_fp8_scaled.safetensors")
    save_file(dict(dit[False].state_dict()), tmp_path / "dit.safetensors")
    read = json.loads(json.dumps(encoder.config.to_dict()))
    for file, dtype in (("bundle", np.float32), ("dit", None)):
        part = open_source(tmp_path / f"{file}.safetensors").parts["text_encoder"]
        # layers with full attention are as published, whatever the depth
        assert part.cfg.language == qwen2_5_vl.config(read).language and part.cfg.vision.width == 80
        assert not stream.problems(part.reader, part.rules, targets(part.cfg))
        kernel = part.reader.tensors["model.layers.0.self_attn.q_proj.weight"].dtype
        assert kernel == dtype if dtype else str(kernel) == "bfloat16"
