"""Wan's autoencoders and causal convolutions by their properties: chunks, memory, forms, devices. No torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from util_random import error, noise, randomised

from jdit.nn.vae import causal
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.nn.vae.causal import Cache, CausalConv, Stream
from jdit.nn.vae.tiling import Tiles

TINY = AutoencoderKLWanConfig(
    width=4, decoder_width=8, latent_channels=3, multipliers=(1, 2, 1), layers=1, temporal=(True, True), residual=True,
    in_channels=12, out_channels=12, patch=2, space_factor=8,
)  # fmt: skip
FLAT = dataclasses.replace(TINY, residual=False, patch=None, in_channels=3, out_channels=3, space_factor=4)
decode = jax.jit(lambda vae, z: vae.decode(z))
encode = jax.jit(lambda vae, x: vae.moments(x))
decode_chunk = jax.jit(lambda vae, z, cache: vae.decode_chunk(z, cache))
encode_chunk = jax.jit(lambda vae, x, cache: vae.encode_chunk(x, cache))


def build(cfg: AutoencoderKLWanConfig) -> AutoencoderKLWan:
    return randomised(lambda: AutoencoderKLWan(cfg, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def vae():
    return build(TINY)


Z, X = noise(2, 5, 4, 3, 3) * 0.3, noise(2, 9, 32, 24, 3)


@pytest.fixture(scope="module")
def whole(vae):
    return decode(vae, Z), encode(vae, X)


def test_chunks_by_hand_equal_the_scan(vae, whole):
    frames, cache = decode_chunk(vae, Z[:, :1], None)
    assert frames.shape == (2, 1, 32, 24, 3)
    video = [frames]
    for chunk in (Z[:, 1:2], Z[:, 2:3], Z[:, 3:4], Z[:, 4:5]):
        frames, cache = decode_chunk(vae, chunk, cache)
        assert frames.shape[1] == 4
        video.append(frames)
    assert error(jnp.concatenate(video, 1), whole[0]) < 1e-6
    moments, cache = encode_chunk(vae, X[:, :1], None)
    latents = [moments]
    for i in (1, 5):
        moments, cache = encode_chunk(vae, X[:, i : i + 4], cache)
        latents.append(moments)
    assert error(jnp.concatenate(latents, 1), whole[1]) < 1e-6


def test_several_latent_frames_at_a_time(vae, whole):
    first, cache = decode_chunk(vae, Z[:, :1], None)
    rest, _ = decode_chunk(vae, Z[:, 1:], cache)
    assert error(jnp.concatenate([first, rest], 1), whole[0]) < 1e-5


def test_cache_has_an_entry_for_each_causal_layer(vae):
    """conv_in, the blocks' two, conv_out, and each change of the frame rate; the same shapes after each chunk."""
    _, first = jax.eval_shape(decode_chunk, vae, Z[:, :1], None)
    _, later = jax.eval_shape(decode_chunk, vae, Z[:, :1], first)
    assert isinstance(first, Cache)
    assert len(first.frames) == 2 + 2 * (2 + 3 * 2) + 2
    assert [f.shape for f in first.frames] == [f.shape for f in later.frames]
    with pytest.raises(ValueError, match="too few layers"):
        jax.eval_shape(decode_chunk, vae, Z[:, :1], Cache(first.frames[:-1]))
    with pytest.raises(ValueError, match="too many layers"):
        jax.eval_shape(decode_chunk, vae, Z[:, :1], Cache((*first.frames, first.frames[-1])))


def test_a_picture_is_a_video_of_one_frame(vae, whole):
    assert error(decode(vae, Z[:, :1]), whole[0][:, :1]) < 1e-5


def as_uint8(x):
    return jnp.round((x / 2 + 0.5) * 255).astype(jnp.uint8)


def test_bytes_inside_the_loop(vae, whole):
    got = jax.jit(lambda vae, z: vae.decode(z, finish=as_uint8))(vae, Z)
    assert got.dtype == jnp.uint8
    assert np.mean(np.asarray(got) != np.asarray(as_uint8(whole[0]))) < 1e-3  # a value at a rounding border may differ


@pytest.mark.slow
@pytest.mark.parametrize("method", ["decode", "moments"])
def test_memory_does_not_grow_with_the_length(method):
    """Temporary memory of the compiled function at 81 and 161 frames; bytes leave the decoder."""
    vae = nnx.eval_shape(lambda: AutoencoderKLWan(FLAT, rngs=nnx.Rngs(0)))
    sizes = []
    for frames in (81, 161):
        shape = (1, 1 + (frames - 1) // 4, 8, 8, 3) if method == "decode" else (1, frames, 32, 32, 3)
        fn = jax.jit(lambda vae, x: vae.decode(x, finish=as_uint8) if method == "decode" else vae.moments(x))
        memory = fn.lower(vae, jax.ShapeDtypeStruct(shape, jnp.float32)).compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[0] > 1e4
    assert sizes[1] < 1.1 * sizes[0]


# ---- causal convolutions


def plain(conv: CausalConv, x, mode: str) -> np.ndarray:
    """The sum that a causal convolution is, in float64."""
    kernel, size, taps = np.asarray(conv.kernel.get_value(), np.float64), conv.kernel.shape[0], conv.taps
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (taps - 1, 0), (0, 0), (0, 0), (0, 0)), mode=mode)
    edge = ((size - 1) // 2, size // 2)
    x = np.pad(x, ((0, 0), (0, 0), edge, edge, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (taps, size, size), (1, 2, 3))  # B T H W C t y x
    return np.einsum("bthwcpyx,yxpcd->bthwd", windows, kernel) + np.asarray(conv.bias.get_value())


@pytest.mark.parametrize("form", causal.FORMS)
@pytest.mark.parametrize("padding, mode", [("zero", "constant"), ("replicate", "edge")])
def test_causal_convolution(form, padding, mode, monkeypatch):
    monkeypatch.setattr(causal, "FORM", form)
    conv = CausalConv(3, 4, taps=3, size=3, padding=padding, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias.set_value(noise(4))
    x = noise(2, 6, 5, 7, 3)
    want = plain(conv, x, mode)
    assert error(conv(x), want) < 1e-6
    assert error(conv(x[:, :1]), want[:, :1]) < 1e-6
    cache, got = None, []
    for begin, end in ((0, 1), (1, 2), (2, 6)):
        stream = Stream(cache)
        got.append(conv(x[:, begin:end], stream))
        cache = stream.cache()
    assert error(jnp.concatenate(got, 1), want) < 1e-6


@pytest.mark.parametrize("size, stride", [(1, 2), (3, 2), (1, 1)])
def test_forms_agree(size, stride):
    kernel, x = noise(size, size, 3, 5, 4), noise(2, 7, 5, 6, 5)
    assert error(causal.FORMS["taps"](x, kernel, stride), causal.FORMS["conv3d"](x, kernel, stride)) < 1e-6


# ---- what is refused


def test_errors(vae):
    shapes = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match="sides are at least 8 and multiples of 8"):
        jax.eval_shape(encode, vae, shapes(1, 1, 16, 20, 3))
    with pytest.raises(ValueError, match="frames of 3x16 pixels: sides are at least 4 and multiples of 1"):
        jax.eval_shape(encode, nnx.eval_shape(lambda: AutoencoderKLWan(FLAT, rngs=nnx.Rngs(0))), shapes(1, 1, 3, 16, 3))
    with pytest.raises(ValueError, match="a first chunk of 2 latent frames"):
        jax.eval_shape(decode_chunk, vae, shapes(1, 2, 2, 2, 3), None)
    with pytest.raises(ValueError, match="a chunk of 3 frames: the first has 1, each later one 4"):
        jax.eval_shape(encode_chunk, vae, shapes(1, 3, 16, 16, 3), None)
    with pytest.raises(ValueError, match="sizes and strides are at least 8 pixels"):
        jax.eval_shape(lambda z: vae.decode(z, tiles=Tiles(64, 64, 4, 4)), shapes(1, 1, 9, 9, 3))
    with pytest.raises(ValueError, match="leave tiles of"):
        jax.eval_shape(lambda x: vae.moments(x, tiles=Tiles(8, 8, 5, 5)), shapes(1, 1, 32, 32, 3))
    eightfold = AutoencoderKLWanConfig(width=4, multipliers=(1, 1, 1, 1), layers=1, temporal=(True,) * 3)
    deep = nnx.eval_shape(lambda: AutoencoderKLWan(eightfold, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="can be halved twice at most"):
        jax.eval_shape(encode, deep, shapes(1, 5, 8, 8, 3))
