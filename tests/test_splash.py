"""Splash attention, its kernel's steps run as plain operations, against the formula and the plain backend."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import AbstractMesh
from test_attention import draw, formula
from util_random import error

from jdit.nn import splash
from jdit.nn.attention import attention
from jdit.sharding import make_mesh
from jdit.target import Target, compiling_for, target

SMALL = splash.Blocks(128, 128, 128)


@pytest.fixture
def on_tpu(monkeypatch):
    """Backends are chosen for a TPU, and the kernel is interpreted in blocks of 128 tokens."""
    run = functools.partial(splash.kernel, interpret=True)
    monkeypatch.setattr(splash, "kernel", lambda *a, blocks, **kw: run(*a, blocks=SMALL, **kw))
    with compiling_for(Target("tpu", "TPU v6 lite")):
        yield


# tokens, keys, heads, head dim as in tiny forms of the families
CASES = {
    "wan, cogvideox: all of an odd number of tokens": (195, 195, 2, 16, None, False),
    "qwen-image, hunyuan-video: unequal prompts": (150, 150, 3, 32, [131, 150], False),
    "wan: cross-attention": (195, 12, 2, 16, None, False),
    "wan-animate: tokens of a frame to those of a face": (130, 5, 2, 64, None, False),
    "qwen's language model: causal, padding last": (140, 140, 2, 24, [17, 140], True),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_formula(case, on_tpu):
    n, s, h, d, lengths, causal = CASES[case]
    q, k, v = draw(n, s, h, d)
    lengths = None if lengths is None else jnp.array(lengths)
    got = attention(q, k, v, kv_lengths=lengths, causal=causal, implementation="splash")
    assert got.shape == q.shape
    assert error(got, formula(q, k, v, lengths, causal)) < 1e-5


def test_counted_keys_make_wide_heads(on_tpu):
    """Stable Diffusion 3 without T5: 64 dims grow by 8."""
    q, k, v = draw(140, 140, 2, 64)
    counts = jnp.ones(140).at[-1].set(256.0)
    got, want = (attention(q, k, v, key_counts=counts, implementation=name) for name in ("splash", "xla"))
    assert got.shape == q.shape and error(got, want) < 1e-5


@pytest.mark.parametrize("d", [64, 128])
def test_bfloat16_is_as_close_as_the_plain_backend(d, on_tpu):
    q, k, v = (a.astype(jnp.bfloat16) for a in draw(200, 200, 2, d))
    want = formula(q, k, v)
    got, plain = (attention(q, k, v, implementation=name) for name in ("splash", "xla"))
    assert got.dtype == jnp.bfloat16 and error(got, want) < 1.2 * error(plain, want)


@pytest.mark.slow
def test_gradients(on_tpu):
    q, k, v = draw(130, 140, 1, 16, 1)
    loss = lambda name: lambda *a: (attention(*a, kv_lengths=jnp.array([133]), implementation=name) ** 2).sum()
    got, want = (jax.grad(loss(name), (0, 1, 2))(q, k, v) for name in ("splash", "xla"))
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want))


@pytest.mark.parametrize("heads", [4, 3])
def test_on_a_mesh(heads, on_tpu):
    """Four heads go to four devices, three to none, whose queries are spread instead."""
    q, k, v = draw(131, 131, heads, 16)
    call = jax.jit(lambda *a: attention(*a, kv_lengths=jnp.array([40, 131]), implementation="splash"))
    want = call(q, k, v)
    with jax.set_mesh(make_mesh(data=2, sequence=2, tensor=2)):
        got = call(q, k, v)
    assert error(got, want) < 1e-6
    four = ("sequence", "tensor")
    spread = splash._spread(q.shape, {"data": 2, "sequence": 2, "tensor": 2}, False)
    assert spread == (("data",), *(((), four) if heads == 4 else (four, ())))


def test_blocks():
    """Blocks divide what they are parts of, and pad little."""
    for most in (512, 1024, 2048, 3072):
        for tokens in (1, 127, 129, 1000, 4429, 17776, 32760, 75600):
            block = splash._block(tokens, most)
            padded = -(-tokens // block) * block
            assert block % splash.LANES == 0 and block <= most and block % splash._part(block, 512) == 0
            assert padded - tokens < max(128, 0.17 * tokens), (tokens, most, block)
            assert tokens <= most or splash._part(block, 512) == 512
    assert splash._block(32760, 3072) == 2048


def test_who_is_refused():
    q, k, v = draw(128, 128)
    with pytest.raises(NotImplementedError, match="needs a TPU; this is compiled for cpu"):
        attention(q, k, v, implementation="splash")
    with compiling_for(Target("tpu")):
        with pytest.raises(NotImplementedError, match="takes bfloat16 and float32, not float16"):
            attention(*(a.astype(jnp.float16) for a in (q, k, v)), implementation="splash")
        with pytest.raises(NotImplementedError, match="below 128 tokens"):
            attention(q[:, :9], k[:, :9], v[:, :9], implementation="splash")


def test_the_target_is_what_is_compiled_for():
    assert target().platform == "cpu"
    with jax.default_device("cpu"):
        assert target() == Target("cpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",))):  # of no devices
        assert target().platform == "cpu"
    with jax.set_mesh(make_mesh()), compiling_for(Target("tpu", "TPU v5")):
        assert target() == Target("tpu", "TPU v5")
    seen = []
    traced = jax.jit(lambda x: seen.append(target().platform) or x)
    for chosen in ("cpu", "tpu", "tpu"):
        with compiling_for(Target(chosen)):
            traced(1.0)
    assert seen == ["cpu", "tpu"]  # one program each


def test_the_library_has_what_is_used():
    assert {"FullMask", "CausalMask", "MultiHeadMask", "SegmentIds", "BlockSizes"} <= set(dir(library))
