"""Wan's encoders as original releases and repackaged files hold them: recognised, read, written back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.numpy import save_file  # noqa: E402
from test_clip_vision import H_LIKE  # noqa: E402
from test_clip_vision import upstream as vision  # noqa: E402
from test_umt5 import tensors_of  # noqa: E402
from test_umt5 import upstream as umt5  # noqa: E402
from util_tokenizers import t5_folder  # noqa: E402

from convert import clip_vision, registry, stream, t5, write  # noqa: E402
from convert.source import open_source  # noqa: E402
from jdit.sharding import dotted  # noqa: E402

pytestmark = pytest.mark.torch
VIT = H_LIKE | dict(num_attention_heads=16, image_size=28)


def leaves_of(part):
    targets = registry.of_config(part.cfg).targets(part.cfg)
    return {dotted(p): np.asarray(v) for p, v in stream.load_leaves(part.reader, part.rules, targets).items()}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """{component: (transformers' tensors, the same in Wan's names, our config, our leaves)}."""
    folder, out = tmp_path_factory.mktemp("encoders"), {}
    for name, model, rules in (
        ("text_encoder", umt5(), t5.umt5_rules), ("image_encoder", vision(VIT), clip_vision.original_rules)
    ):  # fmt: skip
        tensors = {k: v.copy() for k, v in tensors_of(model).items() if k != "encoder.embed_tokens.weight"}  # tied
        save_file(tensors, folder / f"{name}.safetensors")
        (part,) = open_source(folder / f"{name}.safetensors").parts.values()
        leaves = leaves_of(part)
        named = {t.key: t.load().copy() for t in write.outputs(leaves, rules(part.cfg))}
        out[name] = tensors, named, part.cfg, leaves
    return out


def same(part, known) -> bool:
    got, (_, _, cfg, want) = leaves_of(part), known
    return part.cfg == cfg and got.keys() == want.keys() and all(np.array_equal(got[k], v) for k, v in want.items())


def test_release_folder(encoders, tmp_path):
    """The .pth files of Wan 2.1 image to video, the unused text tower of CLIP, and the tokenizer's folder."""
    pth = {k: torch.from_numpy(v) for k, v in encoders["text_encoder"][1].items()}
    torch.save(pth, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    clip = {f"visual.{k}": torch.from_numpy(v) for k, v in encoders["image_encoder"][1].items()}
    clip |= {
        "visual.head": torch.ones(32, 20),
        "log_scale": torch.ones(()),
        "textual.blocks.0.attn.q.bias": torch.ones(3),
    }
    torch.save(clip, tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    t5_folder(tmp_path / "google" / "umt5-xxl", limit=31)
    source = open_source(tmp_path)
    assert source.family == "wan" and set(source.parts) == set(encoders)
    assert all(same(source.parts[name], encoders[name]) for name in encoders)
    assert source.tokenizers["tokenizer"].max_length == 31


@pytest.mark.parametrize("name", ["text_encoder", "image_encoder"])
@pytest.mark.parametrize("naming", ["transformers", "wan", "inside"])
def test_files_of_their_own(encoders, tmp_path, name, naming):
    tensors, named, _, _ = encoders[name]
    prefix = registry.FAMILIES["wan"].originals[name].prefix
    if naming == "wan":
        tensors = named if name == "text_encoder" else {prefix + k: v for k, v in named.items()}
    elif naming == "inside":
        tensors = {prefix + k: v for k, v in named.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert source.family == "wan" and list(source.parts) == [name]
    assert same(source.parts[name], encoders[name])


def test_repackaged_with_the_rest(encoders, tmp_path):
    """transformers' names below the prefix that single files of several components have."""
    tensors = {f"text_encoders.umt5xxl.transformer.{k}": v for k, v in encoders["text_encoder"][0].items()}
    tensors["text_encoders.umt5xxl.logit_scale"] = np.float32(4.6)[None]
    save_file(tensors, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert source.family == "wan" and same(source.parts["text_encoder"], encoders["text_encoder"])
