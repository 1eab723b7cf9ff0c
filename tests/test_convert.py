"""Whole conversions of a tiny transformer, there and back, without torch; and what a damaged jdit checkpoint gives."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import util_toy as toy

import jdit
from convert import stream
from convert.convert import convert
from convert.inspect import inspect
from convert.readers import open_folder
from convert.registry import of_config
from convert.table import ConversionError
from convert.write import write_back
from jdit.nn.mmdit import MMDiTConfig
from jdit.sharding import dotted

CFG = MMDiTConfig(
    sample_size=8, in_channels=4, out_channels=4, layers=2, heads=2, head_dim=8, joint_dim=24, pooled_dim=12,
    pos_size=6, qk_norm="rms_norm",
)  # fmt: skip
QKV = "blocks.0.image.attn.qkv.kernel"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(PyTorch folder, jdit folder)."""
    root, rng = tmp_path_factory.mktemp("convert"), np.random.default_rng(0)
    component = of_config(CFG)
    leaves = {
        dotted(path): rng.standard_normal(leaf.shape).astype(ml_dtypes.bfloat16)
        for path, leaf in component.targets(CFG).items()
    }
    write_back(
        root / "src", leaves, component.rules(CFG), component.upstream_config(CFG), stem="diffusion_pytorch_model"
    )
    line = convert(root / "src", root / "x", check=True)
    assert "every tensor agrees" in line
    return root / "src", root / "x"


def tensors(folder):
    reader = open_folder(folder)
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_there_and_back(whole, tmp_path, dtype):
    src, x = whole
    assert "every tensor agrees" in convert(x, tmp_path / "back", to="diffusers", dtype=dtype, check=True)
    before, after = tensors(src), tensors(tmp_path / "back/transformer")
    assert before.keys() == after.keys()
    assert all(toy.same(after[k], v.astype(dtype or v.dtype)) for k, v in before.items())


def renamed(path):
    path.rename(path.with_name("blocks.0.image.attn.kqv.kernel"))


def reshaped(path):
    described = json.loads((path / ".zarray").read_text())
    described["shape"][1] //= 2
    described["chunks"][1] //= 2
    (path / ".zarray").write_text(json.dumps(described))
    for block in path.glob("0.*"):
        block.write_bytes(block.read_bytes()[: block.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "message"),
    [(shutil.rmtree, "missing"), (renamed, "kqv.kernel: the model has no"), (reshaped, "shape (1, 8,")],
)
def test_a_damaged_jdit_checkpoint_is_named_and_not_written_back(whole, tmp_path, harm, message):
    shutil.copytree(whole[1], tmp_path / "x")
    array = tmp_path / "x/transformer" / QKV
    harm(array)
    with pytest.raises(ValueError) as e:
        convert(tmp_path / "x", tmp_path / "back", to="diffusers")
    assert str(array) in str(e.value) and message in str(e.value) and "\n" not in str(e.value), e.value
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    problems = "; ".join(inspect(tmp_path / "x")["problems"])
    assert str(array) in problems and message in problems


def test_a_check_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "check", lambda *a, **k: ["a.safetensors: w: 1 of 4 values differ in w"])
    with pytest.raises(ConversionError, match=r"1 of 4 values differ in w; .*there was removed"):
        convert("fluent-image", tmp_path / "there", only=["vae"], check=True)
    assert not list(tmp_path.iterdir())


def test_rules_without_a_mesh_are_refused():
    with pytest.raises(ValueError, match="rules says where axes go on a mesh"):
        jdit.load("fluent-image", rules=jdit.Rules())
