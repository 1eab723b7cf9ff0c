"""AutoencoderKLQwenImage against diffusers: pictures, tiles, layouts, sizes. The rest is in the tests of Wan's."""

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageAttentionBlock  # noqa: E402
from test_autoencoder_kl_wan import DECODE, ENCODE, last, noise, randomise  # noqa: E402
from util_port import ported  # noqa: E402
from util_text import error  # noqa: E402

from convert import autoencoder_kl_qwen_image as conv  # noqa: E402
from convert import registry, table  # noqa: E402
from convert.table import ConversionError  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.vae.tiling import Tiles  # noqa: E402

COMPONENT = registry.COMPONENTS[conv.CLASS]
KINDS = {
    "picture": dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 3, 3], num_res_blocks=1),
    "layers": dict(  # of four channels, with attention in the encoder
        base_dim=6, z_dim=3, dim_mult=[1, 3], temperal_downsample=[True], attn_scales=[0.5, 1.0],
        input_channels=4, dropout=0.1, num_res_blocks=1,
    ),
    "flat": dict(base_dim=4, z_dim=16),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> (diffusers' model, ours, its folder), made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            theirs = randomise(diffusers.AutoencoderKLQwenImage(**KINDS[kind]))
            theirs.save_pretrained(folder)
            made[kind] = theirs, ported(folder), folder
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def callable_attention(monkeypatch):
    """Upstream hands the encoder's attention the cache, which its forward does not take: attn_scales raise there."""
    forward = QwenImageAttentionBlock.forward
    monkeypatch.setattr(QwenImageAttentionBlock, "forward", lambda self, x, *_: forward(self, x))


@pytest.mark.parametrize("kind", ["picture", "layers"])
def test_pictures(pair, kind):
    """Two pictures of an odd size, of which the rest is cut."""
    theirs, ours, _ = pair(kind)
    f, c = ours.cfg.pixel_factor, theirs.config.input_channels
    x, z = noise(2, c, 1, 3 * f + f // 2 - 1, 5 * f + f - 1), noise(2, theirs.config.z_dim, 1, 3, 5, scale=0.2)
    want, got = theirs.encode(x).latent_dist, ENCODE(ours, last(x))
    assert error(got.mode(), last(want.mode())) < 1e-5
    assert error(got.logvar, last(want.logvar)) < 1e-5
    decoded = last(theirs.decode(z).sample)
    assert decoded.shape == (2, 1, 3 * f, 5 * f, c)
    assert error(DECODE(ours, last(z)), decoded) < 1e-5
    assert np.mean(np.abs(decoded) == 1) < 0.3
    mean, std = (np.array(v, np.float32) for v in (theirs.config.latents_mean, theirs.config.latents_std))
    if len(mean) == theirs.config.z_dim:
        np.testing.assert_allclose(ours.normalise(last(z)), (last(z) - mean) / std, rtol=1e-6)


def test_tiles(pair):
    theirs, ours, _ = pair("layers")
    tiles = Tiles(8, 8, 6, 6)
    theirs.enable_tiling(*tiles)
    x, z = noise(1, 4, 1, 6, 14), noise(2, 3, 1, 3, 7, scale=0.3)
    encoded, decoded = last(theirs.encode(x).latent_dist.mode()), last(theirs.decode(z).sample)
    theirs.disable_tiling()
    assert error(ours.encode(last(x), tiles=tiles).mode(), encoded) < 1e-5
    assert error(ours.decode(last(z), tiles=tiles), np.clip(decoded, -1, 1)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_diffusers(pair, kind):
    theirs, ours, _ = pair(kind)
    assert registry.of_config(ours.cfg) is COMPONENT
    assert registry.from_description(registry.describe(ours.cfg)) == ours.cfg
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    tensors = {k: op.inverse(leaves[p][i]) for k, p, i, op in table.back(COMPONENT.rules(ours.cfg), leaves)}
    assert set(tensors) == set(theirs.state_dict())
    assert all(np.array_equal(tensors[k], v.numpy()) for k, v in theirs.state_dict().items())
    written = conv.upstream_config(ours.cfg)
    plain = lambda config: {k: v for k, v in config.items() if k[0] != "_"}
    assert plain(diffusers.AutoencoderKLQwenImage.from_config(written).config) == plain(theirs.config)
    assert conv.config(written) == ours.cfg


def test_single_file_layout(pair):
    """Single files have Wan 2.1's names, and no config."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    theirs, ours, _ = pair("flat")
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    found = table.back(conv.original_rules(ours.cfg), leaves)
    tensors = {k: torch.from_numpy(op.inverse(leaves[p][i]).copy()) for k, p, i, op in found}
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    assert conv.original_config(shapes) == ours.cfg
    read = convert_wan_vae_to_diffusers(dict(tensors))
    assert all(torch.equal(read[k], v) for k, v in theirs.state_dict().items())
    with pytest.raises(ConversionError, match="not Qwen-Image's autoencoder"):
        conv.original_config({**shapes, "decoder.head.2.weight": (4, 8, 3, 3, 3)})


def test_full_size_shapes():
    cfg = conv.config({"_class_name": conv.CLASS})
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLQwenImage()
    assert sharding.count(COMPONENT.make(cfg)) == sum(p.numel() for p in theirs.parameters()) == 126_892_531
    targets = {sharding.dotted(p): leaf for p, leaf in COMPONENT.targets(cfg).items()}
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    table.plan(shapes, COMPONENT.rules(cfg), targets)
    assert {k for k, *_ in table.back(COMPONENT.rules(cfg), targets)} == set(shapes)


def test_refused_configs():
    with pytest.raises(ValueError, match="is_residual is not a known field; _class_name is 'AutoencoderKLWan'"):
        conv.config({"is_residual": True, "_class_name": "AutoencoderKLWan"})
