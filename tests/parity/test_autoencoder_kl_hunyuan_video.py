"""AutoencoderKLHunyuanVideo against diffusers: tiles of frames and of pictures, the layout, bfloat16, sizes."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers import AutoencoderKLHunyuanVideo as Upstream  # noqa: E402
from util_cogvideox_vae import last, noise, randomised  # noqa: E402
from util_port import ported  # noqa: E402
from util_text import error  # noqa: E402

from convert import autoencoder_kl_hunyuan_video as hv  # noqa: E402
from convert import registry, table  # noqa: E402
from convert.table import ConversionError  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.vae.tiling import FrameTiles, Tiles  # noqa: E402

COMPONENT = registry.COMPONENTS[hv.CLASS]
KINDS = {
    "flat": dict(block_out_channels=(2, 4, 4, 4), latent_channels=2, layers_per_block=1, norm_num_groups=2),
    # rows and columns change after the last level too; no attention
    "other": dict(
        block_out_channels=(8, 4, 4), latent_channels=3, in_channels=4, out_channels=5, layers_per_block=2,
        act_fn="swish", norm_num_groups=4, scaling_factor=0.7, mid_block_add_attention=False,
    ),
    # levels that change frames alone
    "deep": dict(
        block_out_channels=(2, 4, 2, 2, 2), latent_channels=2, layers_per_block=1, norm_num_groups=1,
        spatial_compression_ratio=4,
    ),
}  # fmt: skip
"""Configs that differ in every field that changes numbers."""
ENCODE = jax.jit(lambda vae, x, **tiles: vae.moments(x, **tiles), static_argnames=("tiles", "frame_tiles"))
DECODE = jax.jit(lambda vae, z, **tiles: vae.decode(z, **tiles), static_argnames=("tiles", "frame_tiles"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> (diffusers' model, ours, its folder), made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder, levels = tmp_path_factory.mktemp(kind), len(KINDS[kind]["block_out_channels"])
            blocks = {name: (block,) * levels for name, block in hv.BLOCKS.items()}
            theirs = randomised(Upstream(**KINDS[kind], **blocks), seed=0)
            theirs.save_pretrained(folder)
            made[kind] = theirs, ported(folder), folder
        return made[kind]

    return get


def encoded(theirs, x) -> np.ndarray:
    return last(theirs.encode(x).latent_dist.parameters)


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 21, 43])
def test_encode(pair, frames):
    """Above 16 by tiles, as upstream does unless told not to; of 43 frames two tiles are whole and two cut."""
    theirs, ours, _ = pair("flat")
    x = noise(2, 3, frames, 11, 13)
    want = encoded(theirs, x)
    assert want.shape[1:4] == (ours.cfg.latent_frames(frames), 2, 2)
    assert error(ENCODE(ours, last(x)), want) < 1e-5


@pytest.mark.parametrize("latents", [1, 2, 3, 5, 6])
def test_decode(pair, latents):
    theirs, ours, _ = pair("flat")
    z = noise(2, 2, latents, 3, 2)
    want = last(theirs.decode(z).sample)
    assert want.shape[1] == ours.cfg.frames(latents)
    assert error(DECODE(ours, last(z)), want) < 1e-5


@pytest.mark.parametrize("kind", ["other", "deep"])
def test_other_configs(pair, kind):
    theirs, ours, _ = pair(kind)
    x, z = noise(1, ours.cfg.in_channels, 6, 9, 7), noise(1, ours.cfg.latent_channels, 3, 2, 3)
    want, got = theirs.encode(x).latent_dist, jax.jit(lambda vae, x: vae.encode(x))(ours, last(x))
    assert error(got.mode(), last(want.mode())) < 1e-5
    assert error(got.logvar, last(want.logvar)) < 1e-5
    assert error(DECODE(ours, last(z)), last(theirs.decode(z).sample)) < 1e-5


def test_all_frames_at_once(pair):
    theirs, ours, _ = pair("flat")
    x, z = noise(1, 3, 21, 8, 9), noise(1, 2, 6, 1, 2)
    tiled = encoded(theirs, x), last(theirs.decode(z).sample)
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    want = encoded(theirs, x), last(theirs.decode(z).sample)
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = True
    assert error(tiled[0], want[0]) > 1e-3 < error(tiled[1], want[1])  # tiles do differ from the whole
    assert error(ENCODE(ours, last(x), frame_tiles=None), want[0]) < 1e-5
    assert error(DECODE(ours, last(z), frame_tiles=None), want[1]) < 1e-5


@pytest.mark.parametrize("tiles", [FrameTiles(12, 4), FrameTiles(8, 8)])
def test_other_frame_tiles(pair, tiles):
    """That overlap several others, or none."""
    _, ours, folder = pair("flat")
    theirs = Upstream.from_pretrained(folder)
    theirs.enable_tiling(None, None, tiles.size, None, None, tiles.stride)
    x, z = noise(1, 3, 21, 8, 9), noise(1, 2, 6, 2, 2)
    with torch.no_grad():
        assert error(ENCODE(ours, last(x), frame_tiles=tiles), encoded(theirs, x)) < 1e-5
        assert error(DECODE(ours, last(z), frame_tiles=tiles), last(theirs.decode(z).sample)) < 1e-5


@pytest.mark.parametrize(
    "tiles, pixels, latents",
    [
        (Tiles(16, 24, 8, 16), (5, 25, 37), (3, 3, 5)),
        (Tiles(16, 24, 16, 24), (17, 29, 13), (5, 4, 2)),  # frames also; rows alone, no overlap
    ],
)
def test_tiles(pair, tiles, pixels, latents):
    _, ours, folder = pair("flat")
    theirs = Upstream.from_pretrained(folder)
    theirs.enable_tiling(tiles.height, tiles.width, None, tiles.stride_height, tiles.stride_width)
    x, z = noise(1, 3, *pixels), noise(2, 2, *latents)
    with torch.no_grad():
        want = encoded(theirs, x)
        assert want.shape[2:4] == (pixels[1] // 8, pixels[2] // 8)  # cut, where the whole would have one more
        assert error(ENCODE(ours, last(x), tiles=tiles), want) < 1e-5
        assert error(DECODE(ours, last(z), tiles=tiles), last(theirs.decode(z).sample)) < 1e-5


def test_default_tiles_are_upstreams():
    with torch.device("meta"):
        theirs = Upstream()
    size = theirs.tile_sample_min_height, theirs.tile_sample_min_width
    assert (*size, theirs.tile_sample_stride_height, theirs.tile_sample_stride_width) == Tiles()
    assert (theirs.tile_sample_min_num_frames, theirs.tile_sample_stride_num_frames) == FrameTiles()
    assert theirs.use_framewise_encoding and theirs.use_framewise_decoding and not theirs.use_tiling


@pytest.mark.parametrize("kind", KINDS)
def test_latent_scale(pair, kind):
    """As upstream's pipelines before decoding and after encoding, to the last bit."""
    theirs, ours, _ = pair(kind)
    z, scale = noise(2, 3, 4, 2, 3), theirs.config.scaling_factor
    assert np.array_equal(ours.denormalise(last(z)), last(z / scale))
    assert np.array_equal(ours.normalise(last(z)), last(z * scale))


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_diffusers(pair, kind):
    theirs, ours, _ = pair(kind)
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    back = table.back(COMPONENT.rules(ours.cfg), leaves)
    tensors = {k: torch.from_numpy(op.inverse(leaves[p][i]).copy()) for k, p, i, op in back}
    assert set(tensors) == set(theirs.state_dict())
    assert all(torch.equal(tensors[k], v) for k, v in theirs.state_dict().items())
    again = hv.upstream_config(ours.cfg)
    assert {k: v for k, v in Upstream.from_config(again).config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in theirs.config.items() if k[0] != "_"
    }
    assert hv.config(again) == ours.cfg


def test_full_size_shapes():
    cfg = hv.config({"_class_name": hv.CLASS})
    with torch.device("meta"):
        theirs = Upstream()
    count = sum(p.numel() for p in theirs.parameters())
    assert sharding.count(COMPONENT.make(cfg)) == count == 246_478_803
    targets = {sharding.dotted(p): leaf for p, leaf in COMPONENT.targets(cfg).items()}
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    table.plan(shapes, COMPONENT.rules(cfg), targets)
    assert {k for k, *_ in table.back(COMPONENT.rules(cfg), targets)} == set(shapes)
    assert hv.original_config(shapes) == cfg
    with pytest.raises(ConversionError, match=r"tensor decoder\.conv_in\.conv\.weight is missing"):
        hv.original_config({k: v for k, v in shapes.items() if not k.startswith("decoder.conv_in")})


def test_bfloat16_error_is_torchs(pair):
    theirs, _, folder = pair("flat")
    low, low_theirs = ported(folder, "bfloat16"), Upstream.from_pretrained(folder).to(torch.bfloat16)
    x, z = noise(2, 3, 21, 11, 13), noise(2, 2, 6, 3, 2)
    with torch.no_grad():
        torchs = encoded(low_theirs, x.bfloat16()), last(low_theirs.decode(z.bfloat16()).sample)
    exact = encoded(theirs, x), last(theirs.decode(z).sample)
    mine = ENCODE(low, last(x)), DECODE(low, last(z))
    for got, want, reference in zip(mine, exact, torchs):
        allowed = error(reference, want)
        assert 1e-3 < allowed < 0.2
        assert error(got, want) <= 1.2 * allowed


def test_refused_configs():
    with pytest.raises(ValueError, match="lemon is not a known field; _class_name is 'AutoencoderKL'"):
        hv.config({"lemon": 1, "_class_name": "AutoencoderKL"})
    with pytest.raises(ValueError, match=r"act_fn is 'mish', supported are .*; temporal_compression_ratio is 8, supp"):
        hv.config({"act_fn": "mish", "temporal_compression_ratio": 8})
    with pytest.raises(ValueError, match=r"down_block_types is .*; up_block_types is .*one for each of block_out"):
        hv.config({"block_out_channels": [32, 64]})
    blocks = {name: [block] * 2 for name, block in hv.BLOCKS.items()}
    with pytest.raises(ValueError, match=r"channels has 2 levels: .* at least 3; space_factor is 8, .* of \[1, 2, 4\]"):
        hv.config({"block_out_channels": [32, 64], **blocks})
    with pytest.raises(ValueError, match=r"channels \[128, .* into 48 norm groups; layers is 0, .* scale is 0"):
        hv.config({"norm_num_groups": 48, "layers_per_block": 0, "scaling_factor": 0})
