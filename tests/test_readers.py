"""Readers of every form against what the safetensors and torch libraries wrote; and broken files."""

import json
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import util_toy as toy
from safetensors.numpy import load_file, save_file

from convert.layout import Signature, detect, recognise
from convert.readers import open_files, open_folder, open_weights
from convert.table import ConversionError
from convert.write import write_back

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.float32, np.float16, BF16, np.float64, np.int64, np.uint8, np.bool_, ml_dtypes.float8_e4m3fn)


def fails(do, *parts) -> str:
    """The one line of error, which must hold `parts`."""
    with pytest.raises(ConversionError) as e:
        do()
    text = str(e.value)
    assert "\n" not in text and all(str(p) in text for p in parts), text
    return text


def test_every_dtype_as_the_library_wrote_it(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {str(np.dtype(d)): (rng.standard_normal((3, 5)) * 9).astype(d) for d in DTYPES}
    tensors |= {"empty": np.zeros((0, 4), np.float32), "scalar": np.asarray(2.5, np.float32)}
    file = toy.write(tmp_path, tensors)
    with open_weights(file) as reader:
        assert reader.keys() == {k: v.shape for k, v in tensors.items()}
        assert all(toy.same(reader.read(k), v) for k, v in tensors.items())
        assert reader.where("scalar") == str(file)


def shards(folder, index: bool, variant: str = ""):
    tensors = toy.state(BF16)
    names = sorted(tensors)
    weight_map = {}
    for n in (1, 2):
        name = f"model{variant}-{n:05d}-of-00002.safetensors"
        part = {k: tensors[k] for k in names[n - 1 :: 2]}
        toy.write(folder, part, name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(tmp_path, index, variant):
    tensors = shards(tmp_path, index, variant)
    reader = open_folder(tmp_path)
    assert reader.keys() == {k: v.shape for k, v in tensors.items()}
    assert all(toy.same(reader.read(k), v) for k, v in tensors.items())


def test_variants_are_chosen_by_name_and_the_plain_one_otherwise(tmp_path):
    toy.write(tmp_path, {"a": np.float32([1])})
    toy.write(tmp_path, {"a": np.float16([2])}, "model.fp16.safetensors")
    assert open_folder(tmp_path).read("a") == 1
    assert open_folder(tmp_path, "fp16").read("a") == 2
    fails(lambda: open_folder(tmp_path, "fp8"), "fp8", "model.fp16")


def test_shards_that_are_missing_or_lie(tmp_path):
    shards(tmp_path / "a", True)
    (tmp_path / "a/model-00002-of-00002.safetensors").unlink()
    fails(lambda: open_folder(tmp_path / "a"), "model-00002-of-00002.safetensors", "1 of 2")
    shards(tmp_path / "b", False)
    (tmp_path / "b/model-00001-of-00002.safetensors").unlink()
    fails(lambda: open_folder(tmp_path / "b"), "1 of 2 shards")
    shards(tmp_path / "c", True)
    file = tmp_path / "c/model-00001-of-00002.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, file)
    fails(lambda: open_folder(tmp_path / "c"), file, lost)
    one = toy.write(tmp_path, {"x": np.ones(2)}, "one.safetensors")
    two = toy.write(tmp_path, {"x": np.ones(2)}, "two.safetensors")
    fails(lambda: open_files([one, two]), one, two, "x")


def header(file, change):
    """Rewrite a safetensors file with a changed header."""
    raw = file.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    value = json.loads(raw[8 : 8 + n])
    change(value)
    text = json.dumps(value).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])


CORRUPT = {
    "negative": lambda h: h["b"].update(data_offsets=[-8, 0]),
    "span": lambda h: h["b"].update(shape=[7]),
    "dtype": lambda h: h["b"].update(dtype="F7"),
    "no offsets": lambda h: h["b"].pop("data_offsets"),
    "overlap": lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]),
    "not an entry": lambda h: h.update(b=3),
    "beyond": lambda h: h["b"].update(data_offsets=[1 << 40, (1 << 40) + 8]),
}


@pytest.mark.parametrize("how", CORRUPT)
def test_corrupt_headers_name_file_and_tensor(tmp_path, how):
    file = toy.write(tmp_path, {"a": np.float32([1, 2]), "b": np.float32([3, 4])})
    header(file, CORRUPT[how])
    fails(lambda: open_weights(file), file, "b")


def test_truncated_files_name_the_tensor(tmp_path):
    file = toy.write(tmp_path, {"a": np.ones(100, np.float32), "b": np.ones(100, np.float32)})
    whole = file.read_bytes()
    for cut in (1, 300):
        file.write_bytes(whole[:-cut])
        fails(lambda: open_weights(file), file, "b", "truncated")
    for keep in (0, 5, 40):
        file.write_bytes(whole[:keep])
        fails(lambda: open_weights(file), file)
    file.write_bytes(whole + b"more")
    fails(lambda: open_weights(file), file, "4 bytes after the last tensor")
    file.write_bytes(whole)
    reader = open_weights(file)
    file.write_bytes(whole[:-8])
    fails(lambda: reader.read("b"), file, "b", "truncated")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS"),
        (b"<!DOCTYPE html><html>not found</html>", "safetensors"),
        (struct.pack("<Q", 4) + b"nope", "corrupt header"),
        (struct.pack("<Q", 2) + b"[]", "corrupt header"),
        (struct.pack("<Q", 28) + b'{"a.b":{"x":1},"c.d":{"x":?}', ": c.d: corrupt header"),
        (struct.pack("<Q", 15) + b'{"a.b":{"x":\xff}}', ": a.b: corrupt header"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    fails(lambda: open_weights(tmp_path / "x.safetensors"), "x.safetensors", message)


def test_scaled_float8(tmp_path):
    rng = np.random.default_rng(0)
    w, s, rows = (rng.standard_normal(x).astype(np.float32) for x in ((6, 4), (), (6, 1)))
    f8 = w.astype(ml_dtypes.float8_e4m3fn)
    tensors = {
        "m.scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn), "m.a.weight": f8, "m.a.scale_weight": s,
        "m.a.scale_input": s, "m.b.weight": f8, "m.b.weight_scale": rows, "m.plain.weight": f8, "m.c.bias": w[0],
        "m.b.comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8),
    }  # fmt: skip
    reader = open_weights(toy.write(tmp_path, tensors)).sub("m.")
    assert set(reader.keys()) == {"a.weight", "b.weight", "plain.weight", "c.bias"}
    assert reader.tensors["a.weight"].dtype == BF16
    assert toy.same(reader.read("a.weight"), f8.astype(np.float32) * s)
    assert toy.same(reader.read("b.weight"), f8.astype(np.float32) * rows)
    assert toy.same(reader.read("plain.weight"), f8)
    file = toy.write(tmp_path, {"q.weight": f8, "q.comfy_quant": np.frombuffer(b'{"format": "int4"}', np.uint8)})
    fails(lambda: open_weights(file), file, "int4")
    for odd, parts in (
        ({"q.weight": w, "q.scale_weight": s}, ("q.weight", "float32")),
        (
            {"q.weight": f8, "q.weight_scale": np.ones((3, 2), np.float32)},
            ("q.weight", "[3, 2]", "[6, 4]", "one a row"),
        ),
        (
            {"q.weight": f8, "q.weight_scale": np.ones((1, 6), np.float32)},
            ("q.weight", "[1, 6]", "[6, 4]", "one a row"),
        ),
        ({"q.weight": f8, "q.weight_scale": s, "q.scale_weight": s}, ("second scale of q.weight",)),
    ):
        file = toy.write(tmp_path, odd)
        fails(lambda file=file: open_weights(file), file, *parts)


def test_prefixes(tmp_path):
    reader = open_weights(toy.write(tmp_path, {"m.a": np.ones(1), "m.t.b": np.ones(2), "t.b": np.ones(3)}))
    assert reader.sub("m.").keys() == {"a": (1,), "t.b": (2,)}
    assert reader.sub("t.").keys() == {"b": (3,)}
    fails(lambda: reader.sub("m.t.", "t."), "b", "two of the prefixes")


def test_torch_files_need_torch(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(lambda: open_weights(tmp_path / "x.pth"), "x.pth", "pip install torch")


@pytest.mark.torch
def test_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.from_numpy(v) for k, v in toy.state().items()}
    tensors["bf"] = torch.randn(3, 4).to(torch.bfloat16).T
    tensors["f8"] = torch.randn(3, 4).to(torch.float8_e4m3fn)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "x.ckpt")
    old = {k: v for k, v in tensors.items() if k != "f8"}
    torch.save(old, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file, tensors in (("x.ckpt", tensors), ("old.bin", old)):  # noqa: B020
        with open_weights(tmp_path / file) as reader:
            assert reader.keys() == {k: tuple(v.shape) for k, v in tensors.items()}
            for k, v in tensors.items():
                assert np.array_equal(reader.read(k).astype(np.float32), v.to(torch.float32).numpy()), k
                assert str(reader.read(k).dtype) == str(v.dtype).removeprefix("torch.")


@pytest.mark.torch
def test_pickles_with_code_are_refused(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"w": Evil()}, tmp_path / "x.pt")
    said = fails(
        lambda: open_weights(tmp_path / "x.pt"), "x.pt", "safely: Unsupported global", "open", "not an allowed"
    )
    assert "\x1b" not in said and "can still be loaded" not in said  # torch's advice is to read it unsafely
    (tmp_path / "text.pt").write_text("hello " * 30)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-100])
    for name in ("text.pt", "cut.pt"):
        fails(
            lambda name=name: open_weights(tmp_path / name), f"{name}: not weights that torch reads safely", "Error: "
        )
    assert not (tmp_path / "owned").exists()


def test_written_files_are_the_librarys_bytes(tmp_path):
    """Same bytes as safetensors' own writer, for a file and for shards."""
    tensors = toy.state(BF16) | {"gain": np.asarray(1.5, np.float32)}
    leaves = {".".join(p): a for p, a in toy.expected(tensors).items()}
    source = toy.write(tmp_path / "src", tensors)
    (file,) = write_back(tmp_path / "one", leaves, toy.RULES, {"b": 1, "a": [2]}, stem="model")
    assert file.read_bytes() == source.read_bytes()
    assert json.loads((tmp_path / "one/config.json").read_text()) == {"a": [2], "b": 1}
    files = write_back(tmp_path / "many", leaves, toy.RULES, {}, stem="model", max_shard_bytes=600)
    assert len(files) > 2 and max(f.stat().st_size for f in files[:-1]) < 600 + 1500
    assert {k: v.tobytes() for k, v in _all(open_folder(tmp_path / "many")).items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    assert set(load_file(files[0])) == {k for k, f in index["weight_map"].items() if f == files[0].name}


def _all(reader):
    return {k: reader.read(k) for k in reader.keys()}  # noqa: SIM118  Reader is no dict


def test_leaves_without_a_way_back_are_told(tmp_path):
    leaves = {".".join(p): a for p, a in toy.expected(toy.state()).items()}
    rules = [r for r in toy.RULES if r.source != "layers.{i}.k.weight"]
    fails(lambda: write_back(tmp_path, leaves, rules), "blocks.qkv.kernel", "384 of 576")
    assert not list(tmp_path.iterdir())


def test_layouts(tmp_path):
    toy.write(tmp_path / "pipe/transformer", {"a": np.ones(1)})
    (tmp_path / "pipe/transformer/config.json").write_text('{"_class_name": "X"}')
    index = {"_class_name": "P", "transformer": ["diffusers", "X"], "vae": [None, None], "gone": ["diffusers", "Y"]}
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    layout = detect(tmp_path / "pipe")
    assert layout.kind == "pipeline" and set(layout.parts) == {"transformer"}
    assert detect(tmp_path / "pipe/transformer").kind == "component"
    assert detect(tmp_path / "pipe/transformer/model.safetensors").kind == "file"
    toy.write(tmp_path / "release/vae", {"a": np.ones(1)}, "Vae2.1.safetensors")
    toy.write(tmp_path / "release", {"a": np.ones(1)}, "dit.safetensors")
    (tmp_path / "release/config.json").write_text('{"_class_name": "X"}')
    assert detect(tmp_path / "release").kind == "original"
    (tmp_path / "empty").mkdir()
    fails(lambda: detect(tmp_path / "empty"), "empty", "no model here")
    fails(lambda: detect(tmp_path / "nothing"), "nothing", "no such file")
    (tmp_path / "pipe/model_index.json").write_text("{")
    fails(lambda: detect(tmp_path / "pipe"), "model_index.json", "corrupt JSON")


def test_components_are_told_by_their_keys(tmp_path):
    tensors = {"dit.blocks.0.w": np.ones(1), "dit.blocks.1.w": np.ones(1), "vae.in": np.ones(2), "ema.x": np.ones(1)}
    reader = open_weights(toy.write(tmp_path, tensors))
    signatures = [
        Signature("big", "transformer", ("blocks.{i}.w", "blocks.{i}.extra"), prefix="dit."),
        Signature("small", "transformer", ("blocks.{i}.w",), ("blocks.{i}.extra",), "dit."),
        Signature("vae", "vae", ("in",), prefix="vae."),
    ]
    found = recognise(reader, signatures, ignore=("ema.",))
    assert {n: s.family for n, (s, _) in found.items()} == {"transformer": "small", "vae": "vae"}
    assert set(found["transformer"][1].keys()) == {"blocks.0.w", "blocks.1.w"}
    fails(lambda: recognise(reader, signatures), "ema.x", "no known component")
    fails(lambda: recognise(reader, signatures[:1]), "not a model that is known")
