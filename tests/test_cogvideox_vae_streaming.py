"""CogVideoX's autoencoder by its properties: batches of frames, memory, devices, errors. No torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from util_random import noise, randomised, shapes

from jdit.nn.vae import autoencoder_kl_cogvideox
from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from jdit.nn.vae.autoencoder_kl_cogvideox_config import AutoencoderKLCogVideoXConfig, ShareTiles
from jdit.nn.vae.causal import Cache

TINY = AutoencoderKLCogVideoXConfig(channels=(4, 8), latent_channels=3, layers=1, groups=2)
decode = jax.jit(lambda vae, z: vae.decode(z))
encode = jax.jit(lambda vae, x: vae.moments(x))
decode_batch = jax.jit(lambda vae, z, cache: vae.decode_batch(z, cache))
encode_batch = jax.jit(lambda vae, x, cache: vae.encode_batch(x, cache))


Z, X = noise(2, 5, 4, 3, 3), noise(2, 17, 8, 6, 3)


@pytest.fixture(scope="module")
def vae():
    return randomised(lambda: AutoencoderKLCogVideoX(TINY, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def whole(vae):
    return decode(vae, Z), encode(vae, X)


def test_cache_has_an_entry_for_each_causal_layer(vae):
    """conv_in, the blocks' two, conv_out; the same shapes after each batch."""
    _, first = jax.eval_shape(decode_batch, vae, Z[:, :3], None)
    _, later = jax.eval_shape(decode_batch, vae, Z[:, :2], first)
    assert len(first.frames) == 2 + 2 * (2 + 2 * 2)
    assert [f.shape for f in first.frames] == [f.shape for f in later.frames]
    assert all(f.shape[1] == 2 for f in first.frames)


def as_uint8(x):
    return jnp.round((jnp.clip(x, -1, 1) / 2 + 0.5) * 255).astype(jnp.uint8)


def test_bytes_inside_the_loop(vae, whole):
    got = jax.jit(lambda vae, z: vae.decode(z, finish=as_uint8))(vae, Z)
    assert got.dtype == jnp.uint8
    assert np.mean(np.asarray(got) != np.asarray(as_uint8(whole[0]))) < 1e-3  # a value at a rounding border may differ


@pytest.mark.slow
@pytest.mark.parametrize("method", ["decode", "moments"])
def test_memory_does_not_grow_with_the_length(method):
    """Temporary memory of the compiled function at 49 and 161 frames; bytes leave the decoder."""
    vae = nnx.eval_shape(lambda: AutoencoderKLCogVideoX(TINY, rngs=nnx.Rngs(0)))
    sizes = []
    for frames in (49, 161):
        shape = (1, 1 + (frames - 1) // 2, 16, 16, 3) if method == "decode" else (1, frames, 32, 32, 3)
        fn = jax.jit(lambda vae, x: vae.decode(x, finish=as_uint8) if method == "decode" else vae.moments(x))
        memory = fn.lower(vae, shapes(*shape)).compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[0] > 1e5
    assert sizes[1] < 1.1 * sizes[0]


def test_errors():
    vae = nnx.eval_shape(lambda: AutoencoderKLCogVideoX(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="frames of 1x16 pixels are below the smallest, 2x2"):
        jax.eval_shape(encode, vae, shapes(1, 1, 1, 16, 3))
    with pytest.raises(ValueError, match="a batch of 4 frames: the first has 1 to 3, each later one 2"):
        jax.eval_shape(decode_batch, vae, shapes(1, 4, 2, 2, 3), None)
    with pytest.raises(ValueError, match="a batch of 7 frames: the first has 1 to 15, each later one 8"):
        jax.eval_shape(encode_batch, vae, shapes(1, 7, 16, 16, 3), Cache(()))
    with pytest.raises(ValueError, match="too few layers"):
        jax.eval_shape(decode_batch, vae, shapes(1, 2, 2, 2, 3), Cache(()))
    with pytest.raises(ValueError, match="tiles and their steps are at least 2 pixels"):
        jax.eval_shape(lambda z: vae.decode(z, tiles=ShareTiles(1, 8)), shapes(1, 1, 9, 9, 3))
    with pytest.raises(ValueError, match=r"leave tiles of \[1\] pixels a side: at least 2 are needed"):
        jax.eval_shape(lambda x: vae.moments(x, tiles=ShareTiles(12, 10)), shapes(1, 1, 10, 17, 3))


def test_what_fits_into_a_tile_is_not_tiled(monkeypatch):
    vae = nnx.eval_shape(lambda: AutoencoderKLCogVideoX(TINY, rngs=nnx.Rngs(0)))
    tiles, calls = ShareTiles(8, 6), []
    decoded = lambda vae, z: vae.decode(z, tiles=tiles)
    encoded = lambda vae, x: vae.moments(x, tiles=tiles)
    monkeypatch.setattr(autoencoder_kl_cogvideox, "run_grid", lambda *a: calls.append(a) or [[a[1]]])
    jax.eval_shape(decoded, vae, shapes(1, 1, 4, 3, 3))
    jax.eval_shape(encoded, vae, shapes(1, 1, 8, 6, 3))
    assert not calls
    jax.eval_shape(decoded, vae, shapes(1, 1, 4, 4, 3))
    jax.eval_shape(encoded, vae, shapes(1, 1, 9, 4, 3))
    assert len(calls) == 2
