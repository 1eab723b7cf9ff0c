"""What is wrong with a checkpoint is said in a line that names file and tensor, and nothing is written."""

import json
import os

import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest
import util_toy as toy

from convert import stream
from convert.hub import resolve
from convert.readers import open_weights
from convert.table import ConversionError
from jdit import checkpoint


def rename(s):
    s["layers.1.up.wieght"] = s.pop("layers.1.up.weight")


def swap_layers(s):
    s["layers.7.q.bias"] = s.pop("layers.2.q.bias")


DAMAGE = {
    "renamed": (rename, ("layers.1.up.wieght: no rule takes it", "layers.1.up.weight: missing, blocks.up.kernel")),
    "renumbered": (swap_layers, ("layers.7.q.bias: no rule", "layers.2.q.bias: missing, blocks.qkv.bias")),
    "deleted": (lambda s: s.pop("gain"), ("gain: missing, gain needs it",)),
    "added": (lambda s: s.update({"lora.a": s["stem.bias"]}), ("lora.a: no rule takes it",)),
    "transposed": (
        lambda s: s.update({"layers.0.up.weight": np.ascontiguousarray(s["layers.0.up.weight"].T)}),
        ("layers.0.up.weight: shape (8, 16) gives (16, 8), blocks.up.kernel wants (8, 16)",),
    ),
    "reshaped": (lambda s: s.update({"stem.weight": s["stem.weight"].reshape(-1)}), ("stem.weight: shape (288,)",)),
    "quantised": (
        lambda s: s.update({"layers.0.norm.bias": s["layers.0.norm.bias"].astype(np.int8)}),
        ("layers.0.norm.bias: int8 for a floating-point parameter",),
    ),
    "a row short": (lambda s: s.update({"stem.bias": s["stem.bias"][:-1]}), ("stem.bias: shape (7,)",)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_in_one_line_before_anything_is_written(tmp_path, how):
    damage, parts = DAMAGE[how]
    tensors = toy.state()
    damage(tensors)
    file = toy.write(tmp_path / "src", tensors)
    reader = open_weights(file)
    for do in (
        lambda: checkpoint.save(tmp_path / "x", {}, {"t": stream.convert_component(reader, toy.RULES, toy.targets())}),
        lambda: stream.load_leaves(reader, toy.RULES, toy.targets()),
    ):
        with pytest.raises(ConversionError) as e:
            do()
        text = str(e.value)
        assert "\n" not in text and str(file) in text and all(p in text for p in parts), text
    assert text == "; ".join(stream.problems(reader, toy.RULES, toy.targets()))
    assert os.listdir(tmp_path) == ["src"]


def test_all_findings_come_in_one_error(tmp_path):
    tensors = toy.state()
    for damage, _ in DAMAGE.values():
        damage(tensors)
    reader = open_weights(toy.write(tmp_path, tensors))
    with pytest.raises(ConversionError) as e:
        stream.load_leaves(reader, toy.RULES, toy.targets())
    for _, parts in DAMAGE.values():
        assert all(p in str(e.value) for p in parts), e.value
    assert str(e.value).startswith("10 problems:")


def test_a_file_that_shrinks_while_it_is_read_leaves_nothing(tmp_path):
    file = toy.write(tmp_path / "src", toy.state())
    reader = open_weights(file)
    planned = stream.convert_component(reader, toy.RULES, toy.targets())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConversionError, match="truncated after") as e:
        checkpoint.save(tmp_path / "x", {}, {"t": planned})
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    assert os.listdir(tmp_path) == ["src"]


def test_sources_of_a_scaled_float8_file_fit_the_same_table(tmp_path):
    tensors = toy.state(ml_dtypes.bfloat16)
    want = toy.expected(tensors)["blocks", "up", "kernel"].astype(np.float32)
    for i in range(toy.DEPTH):
        key = f"layers.{i}.up"
        tensors[f"{key}.weight"] = (tensors[f"{key}.weight"].astype(np.float32) * 8).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{key}.scale_weight"] = np.asarray(1 / 8, np.float32)
    tensors["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    reader = open_weights(toy.write(tmp_path, tensors))
    got = stream.load_leaves(reader, toy.RULES, toy.targets(ml_dtypes.bfloat16))["blocks", "up", "kernel"]
    assert np.abs(np.asarray(got, np.float32) - want).max() <= np.abs(want).max() / 16
    kept = stream.convert_component(reader, toy.RULES, toy.targets())  # dtypes as stored
    assert {str(leaf.dtype) for leaf in kept} == {"bfloat16"}
    exact = tensors["layers.1.up.weight"].astype(np.float32).T / 8  # float32 is not rounded to bfloat16 on the way
    tensors |= {f"layers.{i}.up.scale_weight": np.full(1, 0.123, np.float32) for i in range(toy.DEPTH)}
    with open_weights(toy.write(tmp_path, tensors)) as reader:
        got = stream.load_leaves(reader, toy.RULES, toy.targets(np.float32))["blocks", "up", "kernel"]
    assert np.array_equal(got[1], exact * 8 * np.float32(0.123))


def cache(root, repo: str, files: dict[str, str | dict]):
    """A hub cache as huggingface_hub lays it out."""
    folder = root / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("c0ffee")
    for name, content in files.items():
        path = folder / "snapshots/c0ffee" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_text(content)
    return folder / "snapshots/c0ffee"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


INDEX = {"_class_name": "P", "transformer": ["diffusers", "X"], "vae": [None, None]}


def test_a_cached_hub_id_needs_no_network(hub):
    snapshot = cache(hub, "org/model", {"model_index.json": INDEX, "transformer/config.json": {}})
    (snapshot / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert resolve("org/model") == snapshot
    assert resolve(str(snapshot)) == snapshot


@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        (None, "not in the local cache"),
        ({"model_index.json": INDEX, "scheduler/x.json": {}}, "incomplete"),
        ({"model_index.json": INDEX, "transformer/config.json": {}}, "lacks weights of transformer/"),
        (
            {
                "model_index.json": INDEX,
                "transformer/config.json": {},
                "transformer/model-00001-of-00002.safetensors": "",
                "transformer/model.safetensors.index.json": {
                    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
                },
            },
            "lacks weights of transformer/",
        ),
    ],
)
@pytest.mark.parametrize("offline", [True, False])
def test_what_is_not_cached_whole_is_told_with_the_id(hub, files, lacks, offline):
    if files is not None:
        cache(hub, "org/model", files)
    with pytest.raises(ConversionError) as e:
        resolve("org/model", offline=offline)
    reason = "hub was not asked" if offline else "hub could not be reached"
    assert all(part in str(e.value) for part in ("org/model", lacks, reason)) and "\n" not in str(e.value), e.value


def test_what_is_neither_a_path_nor_an_id(hub):
    with pytest.raises(ConversionError, match="no such file or folder"):
        resolve("./no/such/folder")
