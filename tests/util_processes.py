"""Processes that run together on loopback. As a script: one of two that load, make a picture and restore a checkpoint
together, and write down what they saw (test_processes.py)."""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
CALL = dict(height=64, width=64, steps=2, seed=3, output="float")
PROMPT, MODEL = "a red apple", "fluent-image"
DEVICES = 2
"""Of each process."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_together(
    commands: Sequence[Sequence[str]], folders: Sequence[Path], *, devices: int, timeout: int = 300
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each command; none outlives the call. {port} stands for a free port."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *flags])
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    port, pipe = free_port(), subprocess.PIPE
    started = [
        subprocess.Popen(
            [sys.executable, *(c.format(port=port) for c in command)],
            cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True,
        )
        for command, folder in zip(commands, folders, strict=True)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=timeout) for process in started]
        return [(process.returncode, *outs) for process, outs in zip(started, told)]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def main(port: str, rank: int, folder: Path):
    import jdit

    assert jdit.initialize(f"127.0.0.1:{port}", 2, rank)
    import jax

    from convert import registry
    from convert.readers import open_folder
    from jdit import checkpoint, sharding, spans
    from jdit.cli import main as cli
    from jdit.load import ASSETS

    bytes_read, read = [0], spans.read

    def counted(path, out, offset, parts):
        parts = list(parts)
        bytes_read[0] += sum(end - begin for begin, end in parts)
        read(path, out, offset, parts)

    spans.read = counted
    spans.SHORT = 1  # these matrices are so small that a process would read what lies between its own columns, too
    rules = jdit.Rules.fsdp()
    mesh = jdit.make_mesh(data=2, sequence=DEVICES)
    pipe = jdit.load(MODEL, mesh=mesh, rules="fsdp", dtype="float32")
    steps: list[int] = []
    out = pipe(PROMPT, on_step=lambda step, _: steps.append(step), **CALL)
    found = {"read": bytes_read[0], "mesh": [d.process_index for d in mesh.devices.ravel()], "steps": sorted(steps)}

    tensors = [t for n in pipe.parts.configs for t in open_folder(ASSETS / MODEL / n).tensors.values()]
    (size,) = {t.dtype.itemsize for t in tensors}
    held = [
        math.prod(s.stop - s.start for s in sharding.box(leaf))
        for n in pipe.components.values()
        for leaf in sharding.leaves(n).values()
    ]
    found |= {"held": size * sum(held), "stored": size * sum(math.prod(t.shape) for t in tensors)}
    cfg = registry.placed(pipe.parts.configs["transformer"], "float32", rules)
    targets = registry.of_config(cfg).targets(cfg, mesh, rules)
    before = bytes_read[0]
    restored = checkpoint.restore(folder / "saved", "transformer", targets)
    held = sum(4 * math.prod(s.stop - s.start for s in sharding.box(leaf)) for leaf in targets.values())
    found["restored bytes"] = (bytes_read[0] - before) / held
    loaded = sharding.leaves(pipe.components["transformer"])
    same = lambda a, b: all(np.array_equal(x.data, y.data) for x, y in zip(a.addressable_shards, b.addressable_shards))
    found["restored"] = restored.keys() == loaded.keys() and all(same(restored[p], loaded[p]) for p in loaded)
    found["spread"] = sum(not leaf.is_fully_replicated for leaf in restored.values())
    np.savez(folder / f"{rank}.npz", pixels=out.pixels, latents=np.asarray(out.latents))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    assert jax.process_count() == 2
    where = ["--mesh", f"data=2,sequence={DEVICES}", "--rules", "fsdp", "-o", str(folder / f"{rank}.png")]
    what = ["--size", "64x64", "--steps", "2", "--seed", "3", "--dtype", "float32"]
    cli(["generate", PROMPT, *what, *where], standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
