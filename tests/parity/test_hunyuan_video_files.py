"""HunyuanVideo from the original release and from single files: the same tensors as from the diffusers folder."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_hunyuan_video_pipeline import PROMPTS, QUICK
from util_hunyuan_pipeline import pipeline
from util_sd3 import error

import jdit
from convert import registry, stream, write
from convert.convert import convert
from convert.source import open_source
from jdit.sharding import dotted

pytestmark = pytest.mark.torch

FAMILY = registry.FAMILIES["hunyuan-video"]
BESIDE = {
    "transformer": "hunyuan_video_t2v_720p_bf16", "vae": "hunyuan_video_vae_bf16",
    "text_encoder": "text_encoders/llava_llama3_fp16", "text_encoder_2": "text_encoders/clip_l",
}  # fmt: skip


def loaded(place) -> dict[str, tuple]:
    """component -> (config, leaves)."""
    source, out = open_source(place), {}
    assert source.family == "hunyuan-video" and not source.misfits()
    assert sorted(source.tokenizers) == ["tokenizer", "tokenizer_2"] and source.scheduler["shift"] == 7.0
    for name, part in source.parts.items():
        leaves = stream.load_leaves(part.reader, part.rules, registry.of_config(part.cfg).targets(part.cfg))
        out[name] = part.cfg, {dotted(p): np.asarray(v) for p, v in leaves.items()}
    source.close()
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A diffusers folder, what it holds, and the tensors of each component by their original names."""
    folder = tmp_path_factory.mktemp("hunyuan")
    pipeline(folder, original=True)
    want, tensors = loaded(folder / "model"), {}
    for name, (cfg, leaves) in want.items():
        own = write.outputs(leaves, FAMILY.originals[name].rules(cfg))
        tensors[name] = {t.key: torch.from_numpy(np.array(t.load())) for t in own}
    return folder / "model", want, tensors


def check(place, want):
    got = loaded(place)
    assert got.keys() == want.keys()
    for name, (cfg, leaves) in got.items():
        assert leaves.keys() == want[name][1].keys()
        assert all(np.array_equal(v, want[name][1][k]) for k, v in leaves.items()), name
        ours = cfg if name != "text_encoder_2" else dataclasses.replace(cfg, eos_token_id=want[name][0].eos_token_id)
        assert ours == want[name][0]


def test_the_original_release(model, tmp_path):
    """Pickled, a float8 copy beside it; encoders as transformers has them, one with an output layer, one with a
    vision tower."""
    folder, want, tensors = model
    for sub in ("hunyuan-video-t2v-720p/transformers", "hunyuan-video-t2v-720p/vae"):
        (tmp_path / sub).mkdir(parents=True)
    states = tmp_path / "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states"
    torch.save({"module": tensors["transformer"]}, f"{states}.pt")
    torch.save(
        {"module": {k: v.to(torch.float8_e4m3fn) for k, v in tensors["transformer"].items()}}, f"{states}_fp8.pt"
    )
    torch.save({"x": torch.ones(1)}, f"{states}_fp8_map.pt")
    autoencoder = {f"vae.{k}": v for k, v in tensors["vae"].items()}
    torch.save({"state_dict": autoencoder}, tmp_path / "hunyuan-video-t2v-720p/vae/pytorch_model.pt")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name.replace("tokenizer", "text_encoder"))
    causal = {f"model.{k}": v for k, v in tensors["text_encoder"].items()} | {"lm_head.weight": torch.ones(3, 24)}
    save_file(causal, tmp_path / "text_encoder" / "model.safetensors")
    seen = ["embeddings.class_embedding", "encoder.layers.1.mlp.fc1.bias", "post_layernorm.weight"]
    more = [f"vision_model.{n}" for n in seen] + ["visual_projection.weight", "text_projection.weight", "logit_scale"]
    clip = tensors["text_encoder_2"] | {name: torch.ones(1) for name in more}
    save_file(clip, tmp_path / "text_encoder_2" / "model.safetensors")
    check(tmp_path, want)
    got, first = (jdit.load(f, dtype="float32")(PROMPTS, **QUICK).latents for f in (tmp_path, folder))
    assert error(got, first) < 1e-6


@pytest.mark.parametrize("prefix", ["", "model.model.", "model.diffusion_model."])
def test_repackaged_files(model, prefix, tmp_path):
    folder, want, tensors = model
    for name, file in BESIDE.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        start = prefix if name == "transformer" else ""
        save_file({start + k: v for k, v in tensors[name].items()}, tmp_path / f"{file}.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name)
    check(tmp_path / f"{BESIDE['transformer']}.safetensors", want)


def test_one_file(model, tmp_path):
    """As `--to original` writes it."""
    folder, want, _ = model
    convert(folder, tmp_path / "jdit")
    convert(tmp_path / "jdit", tmp_path / "one.safetensors", to="original")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name)
    check(tmp_path / "one.safetensors", want)
