"""HunyuanVideo's autoencoder by its properties: tiles of frames, memory, devices, errors. No torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from util_random import error, noise, randomised, shapes

from jdit import sharding
from jdit.nn.vae import causal
from jdit.nn.vae.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo, CausalAttentionBlock
from jdit.nn.vae.autoencoder_kl_hunyuan_video_config import AutoencoderKLHunyuanVideoConfig
from jdit.nn.vae.causal import CausalConv
from jdit.nn.vae.tiling import FrameTiles, Tiles

TINY = AutoencoderKLHunyuanVideoConfig(channels=(2, 4, 4), latent_channels=3, layers=1, groups=2, space_factor=4)
decode = jax.jit(lambda vae, z: vae.decode(z))
encode = jax.jit(lambda vae, x: vae.moments(x))


Z, X = noise(2, 9, 4, 3, 3), noise(2, 33, 16, 9, 3)


@pytest.fixture(scope="module")
def vae():
    return randomised(lambda: AutoencoderKLHunyuanVideo(TINY, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def whole(vae):
    return decode(vae, Z), encode(vae, X)


def as_uint8(x):
    return jnp.round((jnp.clip(x, -1, 1) / 2 + 0.5) * 255).astype(jnp.uint8)


@pytest.mark.slow
def test_bytes_inside_the_loop(vae, whole):
    """Each frame is finished once."""
    counts = []

    def finish(x):
        jax.debug.callback(lambda _, n=x.shape[1]: counts.append(n), x[0, 0, 0, 0, 0])
        return as_uint8(x)

    got = jax.jit(lambda vae, z: vae.decode(z, finish=finish))(vae, Z)
    jax.effects_barrier()
    assert sum(counts) == got.shape[1] == TINY.frames(9) == 33
    assert got.dtype == jnp.uint8
    assert np.mean(np.asarray(got) != np.asarray(as_uint8(whole[0]))) < 1e-3  # a value at a rounding border may differ


@pytest.mark.slow
@pytest.mark.parametrize("method", ["decode", "moments"])
def test_memory_does_not_grow_with_the_length(method):
    """Temporary memory of the compiled function at 65 and 197 frames; bytes leave the decoder."""
    vae = nnx.eval_shape(lambda: AutoencoderKLHunyuanVideo(TINY, rngs=nnx.Rngs(0)))
    sizes = []
    for frames in (65, 197):
        shape = (1, TINY.latent_frames(frames), 8, 8, 3) if method == "decode" else (1, frames, 32, 32, 3)
        fn = jax.jit(lambda vae, x: vae.decode(x, finish=as_uint8) if method == "decode" else vae.moments(x))
        memory = fn.lower(vae, shapes(*shape)).compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[0] > 1e5
    assert sizes[1] < 1.1 * sizes[0]


def test_few_rows_on_a_mesh(vae):
    """Of 8 pixel rows two latent ones are made, for two devices: they are not spread (see `sharding.LEAST_ROWS`)."""
    x, mesh = X[:, :1, :8], sharding.make_mesh(data=2, sequence=2, tensor=2)
    want = np.asarray(encode(vae, x))
    with jax.set_mesh(mesh):
        got = np.asarray(encode(jax.device_put(vae, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())), x))
    assert error(got, want) < 1e-5


def test_attention_sees_no_later_frame():
    """By one product with a mask."""
    block = randomised(lambda: CausalAttentionBlock(4, groups=2, eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x, frame = noise(2, 3, 2, 3, 4), np.arange(18) // 6
    tokens = block.norm(x).reshape(2, 18, 4)
    q, k, v = (np.asarray(layer(tokens), np.float64) for layer in (block.q, block.k, block.v))
    weights = np.exp(q @ k.swapaxes(1, 2) / 2) * (frame <= frame[:, None])
    y = jnp.asarray(weights / weights.sum(-1, keepdims=True) @ v, jnp.float32)
    assert error(block(x) - x, block.out(y).reshape(x.shape)) < 1e-5


@pytest.mark.parametrize("form", causal.FORMS)
@pytest.mark.parametrize("size, step", [(3, 2), (3, 1), (1, 2)])
def test_repeated_edges(monkeypatch, form, size, step):
    """By sums over frames, rows and columns whose numbers are held inside the video."""
    monkeypatch.setattr(causal, "FORM", form)
    make = lambda: CausalConv(
        3, 2, size=size, stride=2, step=step, padding="replicate", edges="replicate", dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    conv, x = randomised(make), noise(2, 5, 4, 7, 3)
    kernel, half = np.asarray(conv.kernel.get_value()), size // 2
    want = np.zeros((2, 3, -(-4 // step), -(-7 // step), 2)) + np.asarray(conv.bias.get_value())
    for t, i, j in np.ndindex(*want.shape[1:4]):
        for d, r, c in np.ndindex(3, size, size):
            row, column = np.clip(i * step + r - half, 0, 3), np.clip(j * step + c - half, 0, 6)
            want[:, t, i, j] += np.asarray(x)[:, max(2 * t + d - 2, 0), row, column] @ kernel[r, c, d]
    assert error(conv(x), want) < 1e-6


def test_errors():
    vae = nnx.eval_shape(lambda: AutoencoderKLHunyuanVideo(TINY, rngs=nnx.Rngs(0)))
    for tiles in (FrameTiles(18, 12), FrameTiles(12, 16), FrameTiles(12, 0)):
        for method in (vae.decode, vae.moments):
            with pytest.raises(ValueError, match="multiples of 4 frames, the stride at most the size"):
                method(jnp.zeros((1, 1, 9, 9, 3)), frame_tiles=tiles)
    with pytest.raises(ValueError, match="sizes and strides are at least 4 pixels"):
        jax.eval_shape(lambda z: vae.decode(z, tiles=Tiles(3, 8, 3, 8)), shapes(1, 1, 9, 9, 3))
    with pytest.raises(ValueError, match="step is 2: with zeros around"):
        CausalConv(1, 1, step=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
