"""Text and picture encoders without torch: sharding, NNX modes, published sizes. The numbers: parity/."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import clip, clip_vision, t5
from jdit import sharding
from jdit.nn.text.clip import CLIPText, CLIPTextConfig
from jdit.nn.text.t5 import T5, T5Config
from jdit.nn.vision.clip import CLIPVision, CLIPVisionConfig

pytestmark = pytest.mark.slow

CLIP = CLIPTextConfig(
    vocab_size=64, width=32, mlp=48, layers=3, heads=4, max_positions=16, projection=24, eos_token_id=63
)
T5_TINY = T5Config(vocab_size=64, width=24, kv=8, heads=4, mlp=48, layers=2, buckets=8, max_distance=16)
MODELS = {
    "clip": (CLIPText, CLIP),
    "t5": (T5, T5_TINY),
    "umt5": (T5, dataclasses.replace(T5_TINY, shared_bias=False)),
    "clip vision": (
        CLIPVision,
        CLIPVisionConfig(width=32, mlp=48, layers=3, heads=4, image_size=18, patch=4, projection=24),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 13))
PICTURES = np.random.default_rng(0).normal(size=(2, 18, 18, 3)).astype(np.float32)
INPUTS = {kind: PICTURES if kind == "clip vision" else TOKENS for kind in MODELS}


def build(kind: str):
    cls, cfg = MODELS[kind]
    return sharding.Make(cls, cfg)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 4}, {"data": 2, "sequence": 2, "tensor": 2}], ids=str)
def test_sharded_equals_unsharded(kind, axes):
    module = build(kind)()
    want = jax.jit(lambda m, t: m(t))(module, INPUTS[kind])
    mesh = sharding.make_mesh(**axes)
    _, abstract = sharding.abstract(build(kind), mesh, module.cfg.rules)
    leaves = {path: jax.device_put(v, abstract[path].sharding) for path, v in sharding.leaves(module).items()}
    spread = sharding.assemble(build(kind), leaves)
    qkv = leaves["blocks", "qkv", "kernel"]
    assert qkv.sharding.shard_shape(qkv.shape)[-1] == qkv.shape[-1] // axes["tensor"]
    with jax.set_mesh(mesh):
        got = jax.jit(lambda m, t: m(t))(spread, INPUTS[kind])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("kind", MODELS)
def test_batch_equals_singles(kind):
    module, run = build(kind)(), jax.jit(lambda m, t: m(t))
    together = run(module, INPUTS[kind])
    for i in range(2):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(run(module, INPUTS[kind][i : i + 1]))):
            assert np.linalg.norm(a[i] - b[0]) <= 1e-5 * np.linalg.norm(b[0])


def test_clip_is_causal_and_t5_is_not():
    changed = TOKENS.copy()
    changed[:, 8] = (changed[:, 8] + 1) % 64
    states = [CLIPText(CLIP, rngs=nnx.Rngs(0))(t).states for t in (TOKENS, changed)]
    assert np.array_equal(states[0][:, :8], states[1][:, :8]) and not np.allclose(states[0][:, 8:], states[1][:, 8:])
    out = [T5(T5_TINY, rngs=nnx.Rngs(0))(t) for t in (TOKENS, changed)]
    assert not np.allclose(out[0][:, :8], out[1][:, :8], atol=1e-4)


def test_t5_padding_beyond_the_lengths_does_not_matter():
    module, lengths = T5(T5_TINY, rngs=nnx.Rngs(0)), jnp.array([13, 6])
    changed = TOKENS.copy()
    changed[1, 6:] = 0
    a, b = module(TOKENS, lengths), module(changed, lengths)
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1, :6], b[1, :6])


@pytest.mark.parametrize(
    ("cls", "cfg", "count"),
    [
        (CLIPText, CLIPTextConfig(), 123_650_304),
        (
            CLIPText,
            CLIPTextConfig(width=1280, mlp=5120, layers=32, heads=20, act="gelu", projection=1280),
            694_659_840,
        ),
        (T5, T5Config(), 4_762_310_656),
        (T5, T5Config(vocab_size=256384, shared_bias=False), 5_680_910_336),
        (CLIPVision, CLIPVisionConfig(), 630_766_080),
    ],
    ids=["CLIP-L", "CLIP-G", "T5-XXL", "UMT5-XXL", "CLIP-H vision"],
)
def test_published_sizes(cls, cfg, count):
    """Parameter counts of the published checkpoints; each has exactly one rule for every leaf."""
    _, leaves = sharding.abstract(lambda: cls(cfg, rngs=nnx.Rngs(0)))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == count
    rules = {CLIPText: clip, CLIPVision: clip_vision, T5: t5}[cls].rules(cfg)
    assert {rule.target for rule in rules if rule.target and not rule.alias} == {sharding.dotted(p) for p in leaves}


def test_runs_without_graph_mode():
    code = (
        "import jax, numpy as np; from flax import nnx; from test_text_encoders import MODELS, INPUTS\n"
        "for kind, (cls, cfg) in MODELS.items():\n"
        "    out = jax.jit(lambda m, t: m(t))(cls(cfg, rngs=nnx.Rngs(0)), INPUTS[kind])\n"
        "    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))\n"
    )
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    env = os.environ | {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
