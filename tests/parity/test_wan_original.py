"""Wan's transformer in the layout of the original releases: names, config.json, single files, shards, two experts."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import util_wan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.numpy import save_file

from convert import registry, stream, wan, write
from convert.source import open_source
from convert.table import ConversionError
from jdit import sharding
from jdit.sharding import dotted

pytestmark = pytest.mark.torch

SPEC = importlib.util.find_spec("diffsynth_engine")
FILE = "diffusion_pytorch_model.safetensors"
PREFIX = "model.diffusion_model."
RELEASE = {  # config.json of the original I2V and FLF2V releases, sizes of the tiny one
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 32, "eps": 1e-6, "ffn_dim": 40, "freq_dim": 16,
    "in_dim": 6, "model_type": "flf2v", "num_heads": 4, "num_layers": 2, "out_dim": 5, "text_len": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def flf2v(tmp_path_factory):
    """Original-layout tensors of a transformer that has everything, its diffusers tensors, and its port."""
    folder = tmp_path_factory.mktemp("wan")
    model = util_wan.saved(folder, **util_wan.KINDS["flf2v"])
    module = util_wan.ported(folder)
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    tensors = {t.key: t.load() for t in write.outputs(leaves, wan.original_rules(module.cfg))}
    return tensors, {k: v.numpy() for k, v in model.state_dict().items()}, module


def leaves_of(part) -> dict[str, np.ndarray]:
    targets = registry.of_config(part.cfg).targets(part.cfg)
    return {dotted(p): np.asarray(v) for p, v in stream.load_leaves(part.reader, part.rules, targets).items()}


def same(part, module) -> bool:
    got, want = leaves_of(part), {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    return part.cfg == module.cfg and got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)


def release(folder: Path, tensors: dict[str, np.ndarray], **fields) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps(RELEASE | fields))
    return folder


def test_diffusers_reads_our_names(flf2v):
    tensors, want, _ = flf2v
    found = convert_wan_transformer_to_diffusers({PREFIX + k: torch.from_numpy(v.copy()) for k, v in tensors.items()})
    found["condition_embedder.image_embedder.pos_embed"] = found.pop("img_emb.emb_pos")  # left out of its table
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[k].numpy(), want[k]) for k in want)


@pytest.mark.skipif(SPEC is None, reason="the published table of names comes with diffsynth-engine, not installed")
def test_published_names(flf2v):
    """A second table, which has the positions too: diffusers' tensors renamed by it are our original tensors."""
    tensors, theirs, _ = flf2v
    assert SPEC is not None and SPEC.submodule_search_locations
    table = Path(SPEC.submodule_search_locations[0]) / "conf" / "models" / "wan" / "dit" / "wan_dit_keymap.json"
    names = json.loads(table.read_text())["diffusers"]
    renamed = {}
    for key, value in theirs.items():
        stem, dot, last = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "")
        if stem.startswith("blocks."):
            _, i, inner = stem.split(".", 2)
            stem = f"blocks.{i}.{names['rename_dict'][inner]}"
        else:
            stem = names["global_rename_dict"][stem]
        renamed[stem + dot + last] = value
    assert renamed.keys() == tensors.keys()
    assert all(np.array_equal(renamed[k], tensors[k]) for k in tensors)


def test_release_folder(flf2v, tmp_path):
    tensors, _, module = flf2v
    source = open_source(release(tmp_path / "wan", tensors))
    assert source.family == "wan" and same(source.parts["transformer"], module)


def test_sharded_release_with_other_weights_beside_it(flf2v, tmp_path):
    """As published: shards, an index and config.json, with files of other components in the same folder."""
    tensors, _, module = flf2v
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(RELEASE))
    assert same(open_source(tmp_path).parts["transformer"], module)
    save_file({f"{PREFIX}x": np.zeros(1, np.float32)}, tmp_path / "Wan2.1_VAE.safetensors")
    with pytest.raises(ConversionError, match=r"Wan2.1_VAE.safetensors: not a model that is known"):
        open_source(tmp_path)


def test_single_files(flf2v, tmp_path):
    """With the prefix and without; the heads of a file that has no config.json beside it are of 128 dims."""
    tensors, _, module = flf2v
    for name, prefix in (("plain", ""), ("prefixed", PREFIX)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "wan.safetensors"
        save_file({prefix + k: v for k, v in tensors.items()}, file)
        cfg = open_source(file).parts["transformer"].cfg
        assert (cfg.heads, cfg.head_dim) == (1, 32)
        (file.parent / "config.json").write_text(json.dumps(RELEASE))
        assert same(open_source(file).parts["transformer"], module)


def test_published_sizes():
    """14B FLF2V read off its shapes, without a config.json."""
    cfg = wan.config(dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514))
    leaves = {dotted(p): s for p, s in registry.of_config(cfg).targets(cfg).items()}
    views = {p: np.broadcast_to(np.zeros((), np.float32), s.shape) for p, s in leaves.items()}
    shapes = {t.key: t.shape for t in write.outputs(views, wan.original_rules(cfg))}
    assert wan.original_config(shapes) == cfg


def test_two_experts(flf2v, tmp_path):
    tensors, _, module = flf2v
    other = {k: v + 1 for k, v in tensors.items()}
    release(tmp_path / "high_noise_model", tensors)
    release(tmp_path / "low_noise_model", other)
    parts = open_source(tmp_path).parts
    assert parts.keys() == {"transformer", "transformer_2"} and same(parts["transformer"], module)
    assert np.array_equal(leaves_of(parts["transformer_2"])["patch.bias"], other["patch_embedding.bias"])
    second = tmp_path / "low_noise_model" / FILE
    parts = open_source(tmp_path / "high_noise_model", parts={"transformer_2": second}).parts
    assert np.array_equal(leaves_of(parts["transformer_2"])["patch.bias"], other["patch_embedding.bias"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ffn_dim": 44}, r"ffn_dim=44 \(it is 40\)"),
        ({"num_heads": 5}, "width 32 cannot have num_heads=5"),
        ({"window_size": [4, 4]}, r"window_size=\(4, 4\) \(it is \(-1, -1\)\)"),
        ({"vace_layers": [0]}, r"vace_layers=\(0,\) \(not known\)"),
    ],
)
def test_config_that_does_not_fit(flf2v, tmp_path, fields, message):
    with pytest.raises(ConversionError, match=message):
        open_source(release(tmp_path / "wan", flf2v[0], **fields))


def test_missing_tensor():
    with pytest.raises(ConversionError, match=r"not a Wan transformer: tensor patch_embedding\.weight is missing"):
        wan.original_config({})
