"""AutoencoderKLCogVideoX against diffusers: batches of frames, whole videos, tiles, both layouts, bfloat16, sizes."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from util_cogvideox_vae import COMPONENT, KINDS, last, noise, ported, upstream  # noqa: E402
from util_text import error  # noqa: E402

from convert import autoencoder_kl_cogvideox as cog  # noqa: E402
from convert import table  # noqa: E402
from convert.table import ConversionError  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.vae.autoencoder_kl_cogvideox_config import ShareTiles  # noqa: E402

ENCODE = jax.jit(lambda vae, x: vae.moments(x))
DECODE = jax.jit(lambda vae, z: vae.decode(z))
ENCODE_BATCH = jax.jit(lambda vae, x, cache: vae.encode_batch(x, cache))
DECODE_BATCH = jax.jit(lambda vae, z, cache: vae.decode_batch(z, cache))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> (diffusers' model, ours, its folder), made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            theirs = upstream(kind)
            theirs.save_pretrained(folder)
            made[kind] = theirs, ported(folder), folder
        return made[kind]

    return get


def in_batches(step, ours, x, size: int) -> np.ndarray:
    """x through `step`: what is left over of whole batches joins the first."""
    out, cache, at = [], None, 0
    for n in [min(x.shape[1], size + x.shape[1] % size)] + [size] * (x.shape[1] // size - 1):
        y, cache = step(ours, x[:, at : at + n], cache)
        out.append(np.asarray(y))
        at += n
    assert at == x.shape[1]
    return np.concatenate(out, 1)


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 49])
def test_encode(pair, frames):
    theirs, ours, _ = pair("flat")
    x = noise(2, 3, frames, 11, 13)
    want = theirs.encode(x).latent_dist.parameters
    assert error(in_batches(ENCODE_BATCH, ours, last(x), 8), last(want)) < 1e-5


@pytest.mark.parametrize("latents, frames", [(1, 1), (3, 9), (13, 49)])
def test_decode(pair, latents, frames):
    theirs, ours, _ = pair("flat")
    z = noise(2, 2, latents, 3, 5)
    want = last(theirs.decode(z).sample)
    assert want.shape[1] == frames == ours.cfg.frames(latents)
    assert error(in_batches(DECODE_BATCH, ours, last(z), 2), want) < 1e-5


def test_four_levels(pair):
    theirs, ours, _ = pair("2b")
    x, z = noise(1, 3, 9, 23, 25), noise(1, 3, 3, 3, 2)
    assert error(ENCODE(ours, last(x)), last(theirs.encode(x).latent_dist.parameters)) < 1e-5
    assert error(DECODE(ours, last(z)), last(theirs.decode(z).sample)) < 1e-5


def test_161_frames_in_one_call(pair):
    theirs, ours, _ = pair("flat")
    x, z = noise(1, 3, 161, 9, 4), noise(1, 2, 41, 1, 2)
    assert error(DECODE(ours, last(z)), last(theirs.decode(z).sample)) < 1e-5
    want = theirs.encode(x).latent_dist
    assert want.mean.shape[2] == 41
    assert error(ENCODE(ours, last(x)), last(want.parameters)) < 1e-5


def test_even_numbers_of_frames(pair):
    """And what else a config can differ in."""
    theirs, ours, _ = pair("other")
    x, z = noise(2, 4, 10, 7, 5), noise(2, 5, 2, 3, 2)
    want, got = theirs.encode(x).latent_dist, jax.jit(lambda vae, x: vae.encode(x))(ours, last(x))
    assert error(got.mode(), last(want.mode())) < 1e-5
    assert error(got.logvar, last(want.logvar)) < 1e-5
    decoded = last(theirs.decode(z).sample)
    assert decoded.shape[1] == ours.cfg.frames(2) == 4
    assert error(DECODE(ours, last(z)), decoded) < 1e-5


def test_encode_by_tiles(pair):
    theirs, ours, _ = pair("flat")
    x = noise(1, 3, 5, 20, 37)
    whole = last(theirs.encode(x).latent_dist.parameters)
    theirs.enable_tiling()
    want = last(theirs.encode(x).latent_dist.parameters)
    theirs.disable_tiling()
    assert error(want, whole) > 1e-3  # tiles do differ from the whole
    assert error(ours.moments(last(x), tiles=ours.cfg.tiles), want) < 1e-5


def test_decode_by_uneven_tiles(pair):
    """Of no whole number of latent pixels: upstream's joined picture has another size than the whole."""
    _, ours, folder = pair("flat")
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder)
    tiles = ShareTiles(26, 19, 0.3, 0.25)
    theirs.enable_tiling(*tiles)
    z = noise(2, 2, 3, 8, 3)
    with torch.no_grad():
        want = last(theirs.decode(z).sample)
    assert want.shape[2] != 32
    assert error(ours.decode(last(z), tiles=tiles), want) < 1e-5


def test_default_tiles_are_upstreams():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLCogVideoX(sample_height=301, sample_width=500)
    tiles = cog.config({"sample_height": 301, "sample_width": 500}).tiles
    assert tiles == (
        theirs.tile_sample_min_height, theirs.tile_sample_min_width, theirs.tile_overlap_factor_height,
        theirs.tile_overlap_factor_width,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_latent_scale(pair, kind):
    """As upstream's pipelines before decoding and after encoding, to the last bit."""
    theirs, ours, _ = pair(kind)
    z, scale = noise(2, 3, 4, 2, 3), theirs.config.scaling_factor
    assert np.array_equal(ours.denormalise(last(z)), last(1 / scale * z))
    assert np.array_equal(ours.normalise(last(z)), last(scale * z))


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_diffusers(pair, kind):
    theirs, ours, _ = pair(kind)
    tensors = written(ours, COMPONENT.rules(ours.cfg))
    assert set(tensors) == set(theirs.state_dict())
    assert all(torch.equal(tensors[k], v) for k, v in theirs.state_dict().items())
    again = cog.upstream_config(ours.cfg)
    assert {k: v for k, v in diffusers.AutoencoderKLCogVideoX.from_config(again).config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in theirs.config.items() if k[0] != "_"
    }
    assert cog.config(again) == ours.cfg


def written(ours, rules) -> dict[str, torch.Tensor]:
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    return {k: torch.from_numpy(op.inverse(leaves[p][i]).copy()) for k, p, i, op in table.back(rules, leaves)}


RENAMED = {
    "block.": "resnets.", "down.": "down_blocks.", "downsample": "downsamplers.0", "upsample": "upsamplers.0",
    "nin_shortcut": "conv_shortcut", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
    "up.3": "up_blocks.0", "up.2": "up_blocks.1", "up.1": "up_blocks.2", "up.0": "up_blocks.3",
}  # fmt: skip
"""Names of diffusers' scripts/convert_cogvideox_to_diffusers.py."""


def test_original_layout(pair):
    """The names of 3d-vae.pt become diffusers', and its shapes tell the architecture."""
    theirs, ours, _ = pair("2b")
    tensors = written(ours, cog.original_rules(ours.cfg))
    assert "decoder.up.3.block.0.norm1.conv_y.conv.weight" in tensors
    assert "encoder.down.0.downsample.conv.bias" in tensors
    read = {}
    for key, value in tensors.items():
        for name, new in RENAMED.items():
            key = key.replace(name, new)
        read[key] = value
    assert set(read) == set(theirs.state_dict())
    assert all(torch.equal(read[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("release, scale", [("2b", 1.15258426), ("5b", 0.7)])
def test_full_size_shapes(release, scale):
    """Names, shapes and counts of the releases in both layouts, both ways."""
    cfg = cog.config({"_class_name": cog.CLASS, "scaling_factor": scale})
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLCogVideoX(scaling_factor=scale)
    count = sum(p.numel() for p in theirs.parameters())
    assert sharding.count(COMPONENT.make(cfg)) == count == 215_583_907
    targets = {sharding.dotted(p): leaf for p, leaf in COMPONENT.targets(cfg).items()}
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    fills = table.plan(shapes, COMPONENT.rules(cfg), targets)
    assert {k for k, *_ in table.back(COMPONENT.rules(cfg), targets)} == set(shapes)
    keys = {(p, str(i)): k for k, p, i, _ in table.back(cog.original_rules(cfg), targets)}
    originals = {keys[f.path, str(s.index)]: shapes[s.key] for f in fills for s in f.sources}
    table.plan(originals, cog.original_rules(cfg), targets)
    assert cog.original_config(originals, scale=scale) == cfg
    with pytest.raises(ConversionError, match=r"tensor decoder.conv_in.conv.weight is missing"):
        cog.original_config({k: v for k, v in originals.items() if not k.startswith("decoder.conv_in")})


def test_bfloat16_error_is_torchs(pair):
    theirs, _, folder = pair("flat")
    low, low_theirs = ported(folder, "bfloat16"), diffusers.AutoencoderKLCogVideoX.from_pretrained(folder)
    low_theirs.to(torch.bfloat16)
    x, z = noise(2, 3, 9, 11, 13), noise(2, 2, 3, 3, 5)
    with torch.no_grad():
        torchs = low_theirs.encode(x.bfloat16()).latent_dist.mode(), low_theirs.decode(z.bfloat16()).sample
    exact = last(theirs.encode(x).latent_dist.mode()), last(theirs.decode(z).sample)
    mine = ENCODE_BATCH(low, last(x), None)[0][..., :2], DECODE_BATCH(low, last(z), None)[0]
    for got, want, reference in zip(mine, exact, torchs):
        allowed = error(last(reference), want)
        assert 1e-3 < allowed < 0.2
        assert error(got, want) <= 1.2 * allowed


def test_refused_configs():
    with pytest.raises(ValueError, match="lemon is not a known field; _class_name is 'AutoencoderKL'"):
        cog.config({"lemon": 1, "_class_name": "AutoencoderKL"})
    with pytest.raises(ValueError, match="act_fn is 'mish', supported are"):
        cog.config({"act_fn": "mish"})
    with pytest.raises(ValueError, match=r"shift_factor is 0\.1; only scaling_factor is supported"):
        cog.config({"shift_factor": 0.1})
    with pytest.raises(ValueError, match=r"latents_mean is \[0.0\]; only .* latents_std is \[1.0\]; only"):
        cog.config({"latents_mean": [0.0], "latents_std": [1.0]})
    with pytest.raises(ValueError, match=r"down_block_types is .*; up_block_types is .*one for each of block_out"):
        cog.config({"block_out_channels": [32, 64]})
    with pytest.raises(ValueError, match="quant_conv has out_channels, 3, and cannot take 16 latent_channels"):
        cog.config({"use_quant_conv": True})
    with pytest.raises(ValueError, match=r"channels \[128, .* into 48 norm groups; time_factor is 0.5"):
        cog.config({"norm_num_groups": 48, "temporal_compression_ratio": 0.5})
    assert cog.config({"shift_factor": None, "latents_mean": None}) == cog.config({})
