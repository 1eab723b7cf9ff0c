"""jdit checkpoints: Orbax reads them, memory stays at a block, a mesh gets its parts, a kill leaves nothing behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import util_toy as toy

from convert import stream
from convert.readers import open_weights
from convert.write import write_back
from jdit import blocks as disk
from jdit import checkpoint, sharding
from jdit.checkpoint import CheckpointError
from jdit.sharding import assemble, make_mesh

BF16 = np.dtype(ml_dtypes.bfloat16)


def leaves(dtype=BF16):
    return toy.expected(toy.state(dtype))


def saved(folder: Path, dtype=BF16) -> Path:
    checkpoint.save(folder, {"family": "toy"}, {"transformer": leaves(dtype), "vae": {("x",): np.float32([1, 2])}})
    return folder


@pytest.mark.parametrize("dtype", [BF16, np.float32, ml_dtypes.float8_e4m3fn])
def test_round_trip_and_orbax_reads_it(tmp_path, dtype):
    folder = saved(tmp_path / "x", dtype)
    got = checkpoint.restore(folder, "transformer", toy.targets(dtype))
    assert all(toy.same(got[p], a) for p, a in leaves(dtype).items())
    assemble(toy.make(dtype), got)
    theirs = ocp.StandardCheckpointer().restore(folder / "transformer")
    assert toy.same(theirs["blocks"]["qkv"]["kernel"], leaves(dtype)["blocks", "qkv", "kernel"])
    assert toy.same(theirs["gain"], leaves(dtype)[("gain",)])


def test_restore_casts_to_the_targets(tmp_path):
    got = checkpoint.restore(saved(tmp_path / "x", np.float32), "transformer", toy.targets(jnp.bfloat16))
    assert all(toy.same(got[p], a.astype(BF16)) for p, a in leaves(np.float32).items())


def test_restore_and_load_into_a_mesh(tmp_path):
    targets = toy.targets(jnp.bfloat16, make_mesh(data=2, tensor=4))
    reader = open_weights(toy.write(tmp_path, toy.state(BF16)))
    for got in (
        checkpoint.restore(saved(tmp_path / "x"), "transformer", targets),
        stream.load_leaves(reader, toy.RULES, targets),
    ):
        assert all(toy.same(got[p], a) and got[p].sharding == targets[p].sharding for p, a in leaves().items())
        up = got["blocks", "up", "kernel"]
        assert {s.data.shape for s in up.addressable_shards} == {(toy.DEPTH, toy.D, toy.F // 4)}


def test_stacked_leaves_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "BLOCK_BYTES", 2 * toy.D * toy.F * 2)
    read = []
    reader = open_weights(toy.write(tmp_path, toy.state(BF16)))
    up = stream.convert_component(reader, toy.RULES, toy.targets())
    up = next(leaf for leaf in up if leaf.path == ("blocks", "up", "kernel"))
    load = reader.read
    reader.read = lambda key: read.append(key) or load(key)
    blocks = up.blocks(disk.block_rows(up.shape, up.dtype))
    assert not read and next(iter(blocks)).shape == (2, toy.D, toy.F) and len(read) == 2
    folder = saved(tmp_path / "x")
    assert len(list((folder / "transformer/blocks.up.kernel").glob("[0-9]*"))) == 2
    assert toy.same(checkpoint.stored(folder, "transformer")["blocks.up.kernel"][1:3, 2], leaves()[up.path][1:3, 2])


@pytest.mark.parametrize("block_bytes", [1 << 26, 6])  # 6: the 8 values of a bias are in blocks of 3, 3 and 2
def test_convert_check_and_back(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(disk, "BLOCK_BYTES", block_bytes)
    source = toy.write(tmp_path / "src", toy.state(BF16) | {"gain": np.asarray(0.1, np.float32)})
    reader, digest = open_weights(source), stream.Digest()
    planned = stream.convert_component(reader, toy.RULES, toy.targets(), digest=digest)
    meta = lambda: {"family": "toy", "digest": digest.hexdigest()}
    seen = []
    checkpoint.save(tmp_path / "x", meta, {"t": planned}, {"tok": "{}"}, on_leaf=lambda n, leaf: seen.append(leaf.path))
    assert sorted(seen) == sorted(toy.targets())
    meta = checkpoint.read_meta(tmp_path / "x")
    assert meta["family"] == "toy" and len(meta["digest"]) == 64 and meta["components"] == ["t"]
    assert (tmp_path / "x/tok/tokenizer.json").read_text() == "{}"
    again = stream.Digest()
    for key in reversed(list(reader.keys())):
        again.add(key, reader.read(key))
    assert meta["digest"] == again.hexdigest()
    stored = checkpoint.stored(tmp_path / "x", "t")
    assert stored["gain"].dtype == np.float32
    assert stream.check(stored, reader, toy.RULES, toy.targets()) == []
    (file,) = write_back(tmp_path / "back", stored, toy.RULES, {}, stem="model")
    assert file.read_bytes() == source.read_bytes()


def test_check_lists_every_mismatch(tmp_path):
    source = toy.write(tmp_path, toy.state(BF16))
    reader = open_weights(source)
    checkpoint.save(tmp_path / "x", {}, {"t": stream.convert_component(reader, toy.RULES, toy.targets())})
    for name, file in (("blocks.qkv.kernel", "0.0.0.0"), ("stem.bias", "0")):
        path = tmp_path / "x/t" / name / file
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    lines = stream.check(checkpoint.stored(tmp_path / "x", "t"), reader, toy.RULES, toy.targets())
    assert len(lines) == 2
    assert f"{source}: stem.bias: 1 of 8 values differ in stem.bias" in lines
    assert f"{source}: layers.2.v.weight: 1 of 64 values differ in blocks.qkv.kernel" in lines


def test_dtype_asked_for_and_mixed_dtypes(tmp_path):
    tensors = toy.state(BF16)
    tensors["layers.1.up.weight"] = toy.state()["layers.1.up.weight"]
    reader = open_weights(toy.write(tmp_path, tensors))
    planned = {leaf.path: leaf for leaf in stream.convert_component(reader, toy.RULES, toy.targets())}
    assert planned["blocks", "up", "kernel"].dtype == np.float32
    assert planned["blocks", "up", "bias"].dtype == BF16
    (block,) = planned["blocks", "up", "kernel"].blocks(3)
    assert np.array_equal(block[1], tensors["layers.1.up.weight"].T)
    assert all(
        leaf.dtype == np.float16 for leaf in stream.convert_component(reader, toy.RULES, toy.targets(), "float16")
    )
    got = stream.load_leaves(reader, toy.RULES, toy.targets(jnp.float32))
    assert {a.dtype for a in got.values()} == {np.dtype(np.float32)}


def test_errors_of_a_broken_checkpoint_name_file_and_tensor(tmp_path):
    folder = saved(tmp_path / "x")

    def fails(*parts):
        with pytest.raises(CheckpointError) as e:
            checkpoint.restore(folder, "transformer", toy.targets(jnp.bfloat16))
        assert "\n" not in str(e.value) and all(p in str(e.value) for p in parts), e.value

    chunk = folder / "transformer/blocks.up.kernel/0.0.0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-3])
    fails("blocks.up.kernel/0.0.0", "truncated")
    chunk.unlink()
    fails("blocks.up.kernel/0.0.0", "missing")
    chunk.write_bytes(whole)
    zarray = folder / "transformer/gain/.zarray"
    text = zarray.read_text()
    zarray.write_text("{")
    fails("gain/.zarray")
    zarray.write_text(text)
    shutil.move(folder / "transformer/gain", tmp_path / "gain")
    fails("gain", "missing")
    shutil.move(tmp_path / "gain", folder / "transformer/gain")
    shutil.copytree(folder / "transformer/gain", folder / "transformer/extra")
    fails("extra", "no such parameter")
    shutil.rmtree(folder / "transformer/extra")
    with pytest.raises(CheckpointError, match=r"no component 'text'; it has \['transformer', 'vae'\]"):
        checkpoint.restore(folder, "text", {})
    (folder / "jdit.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read_meta(folder)
    (folder / "jdit.json").write_text("{")
    with pytest.raises(CheckpointError, match="corrupt"):
        checkpoint.read_meta(folder)


def test_an_existing_folder_is_kept_unless_asked(tmp_path):
    folder = saved(tmp_path / "x")
    with pytest.raises(CheckpointError, match="exists already"):
        saved(folder)

    def broken(rows):
        raise RuntimeError("half way")

    bad = disk.Leaf(("a",), (2,), BF16, broken)
    with pytest.raises(RuntimeError, match="half way"):
        checkpoint.save(folder, {}, {"t": [bad]}, overwrite=True)
    assert checkpoint.read_meta(folder)["family"] == "toy" and os.listdir(tmp_path) == ["x"]
    checkpoint.save(folder, {"family": "new"}, {"t": {("a",): np.ones(3)}}, overwrite=True)
    assert checkpoint.read_meta(folder)["family"] == "new" and os.listdir(tmp_path) == ["x"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(CheckpointError, match="no model, so not replaced"):
        checkpoint.save(tmp_path / "mine", {}, {}, overwrite=True)


def test_unwritable_places_are_told_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    never = disk.Leaf(("a",), (2,), BF16, lambda rows: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "file/x", {}, {"t": [never]})
    huge = never._replace(shape=(1 << 50,))
    with pytest.raises(CheckpointError, match="the disk has"):
        checkpoint.save(tmp_path / "x", {}, {"t": [huge]})
    assert os.listdir(tmp_path) == ["file"]


def test_from_any_mesh_to_any_mesh(tmp_path):
    """Saved as one mesh has it, read as another one wants it: every device has its part of the same leaves."""
    sizes = [dict(data=8), dict(data=2, sequence=2, tensor=2), dict(sequence=2, tensor=4), {}]
    placed = [sharding.abstract(toy.make(), sharding.make_mesh(**n), sharding.Rules.fsdp())[1] for n in sizes]
    want = toy.expected(toy.state())
    for number, (before, after) in enumerate(zip(placed, [*placed[1:], placed[0]])):
        leaves = {p: jax.device_put(a, before[p].sharding) for p, a in want.items()}
        checkpoint.save(tmp_path / str(number), {}, {"t": leaves})
        got = checkpoint.restore(tmp_path / str(number), "t", after)
        assert all(toy.same(got[p], a) for p, a in want.items())
        assert all(got[p].sharding.is_equivalent_to(leaf.sharding, len(leaf.shape)) for p, leaf in after.items())
    assert sum(not leaf.is_fully_replicated for leaf in got.values()) == 2  # the fused and the plain kernel


def test_a_folder_that_was_being_replaced_comes_back(tmp_path):
    folder = saved(tmp_path / "x")
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = os.uname().nodename
    os.rename(folder, tmp_path / f".x.replaced-{host}-{done.stdout.strip()}")
    (tmp_path / f".x.partial-{host}-{done.stdout.strip()}").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        saved(folder)
    assert checkpoint.read_meta(folder)["family"] == "toy" and os.listdir(tmp_path) == ["x"]


SLOW = """
import sys, time
import numpy as np
import orbax.checkpoint
from jdit import blocks as disk
from jdit import checkpoint, sharding
def blocks(rows):
    for i in range(0, 40, rows):
        time.sleep(0.02)
        yield np.full((rows, 1000), i, np.float32)
disk.BLOCK_BYTES = 16000
leaf = disk.Leaf(("a",), (40, 1000), np.dtype(np.float32), blocks)
print("go", flush=True)
checkpoint.save(sys.argv[1], {"family": "toy"}, {n: [leaf] for n in "abcd"})
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_saves_leave_nothing_that_loads(tmp_path, how):
    """Killed at random moments; the last time one runs through."""
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "x")], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    rng = random.Random(0)
    for _ in range(3 if how == signal.SIGKILL else 2):
        process = start()
        process.stdout.readline()
        time.sleep(rng.uniform(0.02, 0.7))
        process.send_signal(how)
        process.communicate()
        if process.returncode == 0:  # it was faster
            assert checkpoint.read_meta(tmp_path / "x")["components"] == list("abcd")
            shutil.rmtree(tmp_path / "x")
            continue
        assert not (tmp_path / "x").exists()
        for left in tmp_path.iterdir():
            assert how == signal.SIGKILL, f"Ctrl-C left {left}"
            with pytest.raises(CheckpointError):
                checkpoint.read_meta(left)
    process = start()
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert os.listdir(tmp_path) == ["x"]
    assert json.loads((tmp_path / "x/jdit.json").read_text())["components"] == list("abcd")
    targets = {("a",): jax.ShapeDtypeStruct((40, 1000), np.float32)}
    assert checkpoint.restore(tmp_path / "x", "d", targets)[("a",)][39, 0] == 36


MEMORY = """
import resource, sys
import jax
import orbax.checkpoint, tensorstore
from convert import ops, stream
from convert.readers import open_weights
from convert.table import Rule
from jdit import blocks as disk
from jdit import checkpoint, sharding
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
src, dst = sys.argv[1:]
rules = [Rule("l.{i}.w", "w", ops.linear, layers=range(8))]
targets = {("w",): jax.ShapeDtypeStruct((8, 2048, 2560), "float32")}
disk.BLOCK_BYTES = 1 << 24
before = peak()
reader = open_weights(src)
checkpoint.save(dst, {}, {"t": stream.convert_component(reader, rules, targets)})
assert stream.check(checkpoint.stored(dst, "t"), reader, rules, targets) == []
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_at_a_few_blocks_of_a_leaf(tmp_path):
    """A leaf of 160 MiB is converted and checked in less memory than itself."""
    rng = np.random.default_rng(0)
    layers = {f"l.{i}.w": rng.standard_normal((2560, 2048), np.float32) for i in range(8)}
    source = toy.write(tmp_path, layers)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "x")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 80, "MiB above the start"
