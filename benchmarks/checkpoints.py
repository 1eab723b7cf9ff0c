"""Checkpoints for convert.py: generated ones of any size, and every way to break them.

    python -m benchmarks.checkpoints generate FOLDER --scale full     a diffusers folder
    python -m benchmarks.checkpoints compare FOLDER OTHER             every tensor, byte by byte

Nothing heavy is imported before it is needed: a process's peak memory counts what its parent held when it was started.
"""

import argparse
import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SHARD_BYTES = {"full": 5_000_000_000, "small": 400_000_000, "tiny": 100_000}


# --- making


def configs(scale: str) -> dict:
    """Component -> config."""
    from jdit import zoo

    large = zoo.VARIANTS["sd3.5-large"].components
    if scale == "tiny":
        thin = {"layers": 3, "heads": 2, "joint_dim": 96, "pooled_dim": 48, "pos_size": 24}
        vae = dataclasses.replace(large["vae"], channels=(8, 16), groups=4)
        return {"transformer": dataclasses.replace(large["transformer"], **thin), "vae": vae}
    layers = {"full": large["transformer"].layers, "small": 2}[scale]
    parts = {n: large[n] for n in ("transformer", "vae", "text_encoder")}
    return parts | {"transformer": dataclasses.replace(large["transformer"], layers=layers)}


def generate(folder: Path, scale: str) -> None:
    """Write the diffusers folder."""
    import ml_dtypes
    import numpy as np

    from convert import registry, write
    from jdit import zoo

    class Random(NamedTuple):
        key: str
        shape: tuple[int, ...]
        dtype: np.dtype
        nbytes: int

        def load(self) -> np.ndarray:
            n = self.nbytes // 2
            start = zlib.crc32(self.key.encode()) % (values.size - n)
            return values[start : start + n].reshape(self.shape)

    family = registry.FAMILIES["sd3"]
    index: dict = {"_class_name": family.pipelines[0], "_diffusers_version": "0.35.0"}
    index |= {n: [None, None] for n in (*family.components, *family.tokenizers)}
    plans = {}
    for name, cfg in configs(scale).items():
        component = registry.of_config(cfg)
        leaves = {".".join(map(str, path)): leaf for path, leaf in component.targets(cfg).items()}
        bf16 = np.dtype(ml_dtypes.bfloat16)
        tensors = [Random(t.key, t.shape, bf16, t.nbytes) for t in write.outputs(leaves, component.rules(cfg), bf16)]
        plans[name] = component, cfg, sorted(tensors, key=lambda t: layers_first(t.key))
        upstream = family.components[name]
        index[name] = [registry.COMPONENTS[upstream].library, upstream]
    largest = max(t.nbytes // 2 for _, _, tensors in plans.values() for t in tensors)
    values = np.random.default_rng(0).standard_normal(2 * largest, np.float32).astype(bf16)
    for name, (component, cfg, tensors) in plans.items():
        (folder / name).mkdir(parents=True)
        stem = "model" if index[name][0] == "transformers" else "diffusion_pytorch_model"
        write_shards(folder / name, stem, tensors, SHARD_BYTES[scale])
        (folder / name / "config.json").write_text(json.dumps(component.upstream_config(cfg)))
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(zoo.VARIANTS["sd3.5-large"].scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))


def layers_first(key: str) -> list:
    """Order of a state dict, nearly: numbers as numbers, so that a shard holds whole layers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def write_shards(folder: Path, stem: str, tensors: list, limit: int) -> None:
    from convert.write import write_tensors

    shards: list[list] = [[]]
    for t in tensors:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + t.nbytes > limit:
            shards.append([])
        shards[-1].append(t)
    if len(shards) == 1:
        write_tensors(folder / f"{stem}.safetensors", tensors)
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        places |= {t.key: name for t in shard}
    total = sum(t.nbytes for t in tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    (folder / f"{stem}.safetensors.index.json").write_text(text)


def compare(a: Path, b: Path) -> None:
    """Every tensor of two diffusers folders, byte by byte."""
    from convert.source import open_source

    one, two = open_source(a), open_source(b)
    assert set(one.parts) == set(two.parts), (set(one.parts), set(two.parts))
    for name, part in one.parts.items():
        other = two.parts[name].reader
        assert set(part.reader.keys()) == set(other.keys()), name
        for key in part.reader.tensors:
            x, y = part.reader.read(key), other.read(key)
            assert x.shape == y.shape and x.dtype == y.dtype, (name, key)
            assert (x.reshape(-1).view("u2") == y.reshape(-1).view("u2")).all(), (name, key)


# --- breaking


def header(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite the header of a safetensors file, data as it was."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    new = json.dumps(entries, separators=(",", ":")).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


def flip(path: Path, after: bytes, bit: int = 1) -> None:
    """Flip a bit of the first byte after this text."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(after) + len(after)] ^= bit
    path.write_bytes(raw)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


class Case(NamedTuple):
    """What is done to which file, and the words that the message must have beside the file's name."""

    what: str
    file: str
    harm: Callable[[Path], object]
    words: tuple[str, ...] = ()


def holder(folder: Path, part: str, key: str) -> tuple[str, dict]:
    """(file, header) of the shard that holds a tensor."""
    for path in sorted((folder / part).glob("*.safetensors")):
        raw = path.read_bytes()
        entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        if key in entries:
            entries.pop("__metadata__")
            return f"{part}/{path.name}", entries
    raise KeyError(key)


def upstream_cases(folder: Path) -> Iterator[Case]:
    """Damage to a diffusers folder; `folder` is a whole one of the same content."""
    key = "transformer_blocks.1.attn.to_q.weight"
    shard, entries = holder(folder, "transformer", key)
    index = next((folder / "transformer").glob("*.index.json")).name
    last = max(entries, key=lambda k: entries[k]["data_offsets"])
    shape = entries[key]["shape"]
    flat, wide = [shape[0] * shape[1]], [shape[0] * 2, shape[1] // 2]
    edit = lambda change: lambda p: header(p, change)
    move = lambda e: e.update({key + "s": e.pop(key)})
    shape_text = f'{key}":{{"dtype":"BF16","shape":'.encode()

    def rename_in_both(path: Path) -> None:
        header(path, move)
        names = path.parent / index
        names.write_text(names.read_text().replace(f'"{key}"', f'"{key}s"'))

    def longer_bias(changed: dict) -> None:
        """The bias takes the first element of the tensor after it."""
        entry = changed[bias]
        begin, end = entry["data_offsets"]
        after = next(e for k, e in changed.items() if k != "__metadata__" and e["data_offsets"][0] == end)
        entry.update(shape=[entry["shape"][0] + 1], data_offsets=[begin, end + 2])
        stop = after["data_offsets"][1]
        after.update(shape=[(stop - end) // 2 - 1], data_offsets=[end + 2, stop])

    yield Case("shard truncated by 100 bytes", shard, lambda p: cut(p, 100), (last,))
    yield Case("shard truncated within its header", shard, lambda p: p.write_bytes(p.read_bytes()[:300]))
    yield Case("shard empty", shard, lambda p: p.write_bytes(b""))
    yield Case("shard missing", shard, lambda p: p.unlink(), (min(entries),))
    yield Case("header: its length flipped", shard, lambda p: flip(p, b"", 128))
    yield Case("header: a bracket of a shape flipped", shard, lambda p: flip(p, shape_text), (key,))
    yield Case("header: a digit of a shape flipped", shard, lambda p: flip(p, shape_text + b"["), (key,))
    yield Case(
        "header: a letter of a name flipped", shard, lambda p: flip(p, b'"transformer_blocks.1.attn.to_q'), (key,)
    )
    yield Case("header: offsets swapped", shard, edit(lambda e: e[key]["data_offsets"].reverse()), (key,))
    yield Case("header: another dtype", shard, edit(lambda e: e[key].update(dtype="F32")), (key,))
    yield Case("tensor renamed", shard, edit(move), (key,))
    yield Case("tensor renamed, in the index too", shard, rename_in_both, (key, key + "s"))
    yield Case("tensor flattened", shard, edit(lambda e: e[key].update(shape=flat)), (key, str(tuple(flat))))
    yield Case("tensor of another shape", shard, edit(lambda e: e[key].update(shape=wide)), (key, str(tuple(wide))))
    yield Case("index cut", f"transformer/{index}", lambda p: cut(p, 100))
    bias = "decoder.conv_in.bias"
    yield Case("bias of another length", holder(folder, "vae", bias)[0], edit(longer_bias), (bias,))


def jdit_cases(folder: Path) -> Iterator[Case]:
    """Damage to a jdit checkpoint."""
    leaf = "transformer/blocks.0.image.attn.qkv.kernel"
    block = next((folder / leaf).glob("0.*")).name

    def one_layer(path: Path) -> None:
        described = json.loads((path / ".zarray").read_text())
        described["shape"][0] = 1
        (path / ".zarray").write_text(json.dumps(described))

    yield Case("block truncated", f"{leaf}/{block}", lambda p: cut(p, 10))
    yield Case("block missing", f"{leaf}/{block}", lambda p: p.unlink())
    yield Case("array's description cut", f"{leaf}/.zarray", lambda p: cut(p, 20))
    yield Case("array of another shape", leaf, one_layer)
    yield Case("array renamed", leaf, lambda p: p.rename(p.with_name("blocks.0.image.attn.kqv.kernel")))
    yield Case("array missing", leaf, lambda p: shutil.rmtree(p))
    yield Case("jdit.json cut", "jdit.json", lambda p: cut(p, 30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generate", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--scale", choices=list(SHARD_BYTES), default="full")
    args = parser.parse_args()
    generate(args.folder, args.scale) if args.what == "generate" else compare(args.folder, args.other)


if __name__ == "__main__":
    main()
