"""AutoencoderKLWan against diffusers: chunks, whole videos, tiles, both layouts, bfloat16, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock  # noqa: E402
from flax import nnx  # noqa: E402
from util_port import ported  # noqa: E402
from util_text import error  # noqa: E402
from util_wan_original import needs_original, original  # noqa: E402

from convert import autoencoder_kl_wan as wan  # noqa: E402
from convert import registry, table  # noqa: E402
from convert.table import ConversionError  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.vae.autoencoder_kl_wan_config import MEAN_22, STD_22, AutoencoderKLWanConfig  # noqa: E402
from jdit.nn.vae.tiling import Tiles  # noqa: E402

COMPONENT = registry.COMPONENTS["AutoencoderKLWan"]
PATCHED = dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2)
KINDS = {
    "2.1": dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 3, 3], num_res_blocks=1),
    "2.2": dict(
        base_dim=4, decoder_base_dim=6, z_dim=5, dim_mult=[1, 2, 2, 2], num_res_blocks=1, scale_factor_spatial=16,
        **PATCHED,
    ),
    "attention": dict(
        base_dim=6, decoder_base_dim=5, z_dim=3, dim_mult=[1, 3], temperal_downsample=[True], attn_scales=[0.5, 1.0],
        in_channels=4, out_channels=2, scale_factor_spatial=2, scale_factor_temporal=2, dropout=0.1, patch_size=1,
    ),
    # more values than changes of resolution: the encoder reads the list from its start, the decoder from its end; and
    # a level that doubles the frames while it halves the channels
    "unequal": dict(
        base_dim=4, z_dim=3, dim_mult=[1, 1, 2, 2], temperal_downsample=[False, True, True, False], is_residual=True,
        num_res_blocks=1,
    ),
    "patched": dict(
        base_dim=4, z_dim=4, dim_mult=[1, 1], temperal_downsample=[True], num_res_blocks=1, scale_factor_spatial=4,
        scale_factor_temporal=2, **PATCHED,
    ),
    "2.2-flat": dict(base_dim=4, z_dim=48, num_res_blocks=2, scale_factor_spatial=16, **PATCHED),
    "2.1-flat": dict(base_dim=4, z_dim=16),
}  # fmt: skip
ENCODE = jax.jit(lambda vae, x: vae.encode(x))
DECODE = jax.jit(lambda vae, z: vae.decode(z))
ENCODE_CHUNK = jax.jit(lambda vae, x, cache: vae.encode_chunk(x, cache))
DECODE_CHUNK = jax.jit(lambda vae, z, cache: vae.decode_chunk(z, cache))


def randomise(model, seed: int = 0):
    """Every parameter random, the norms' about 1; matrices of about unit gain."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        gain = 0.3 if p.ndim == 1 or name.endswith("gamma") else 1 / np.sqrt(np.prod(p.shape[1:]))
        p.data = torch.from_numpy(name.endswith("gamma") + gain * rng.normal(size=tuple(p.shape))).to(p.dtype)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> (diffusers' model, ours, its folder), made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            theirs = randomise(diffusers.AutoencoderKLWan(**KINDS[kind]))
            theirs.save_pretrained(folder)
            made[kind] = theirs, ported(folder), folder
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def callable_attention(monkeypatch):
    """Upstream hands the encoder's attention the cache, which its forward does not take: attn_scales raise there."""
    forward = WanAttentionBlock.forward
    monkeypatch.setattr(WanAttentionBlock, "forward", lambda self, x, **_: forward(self, x))


def last(x) -> np.ndarray:
    return np.moveaxis(x.float().numpy(), 1, -1)


def noise(*shape, seed=1, scale=1.0):
    return torch.from_numpy((scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32))


def in_chunks(step, ours, x, sizes):
    """x through `step` in chunks of the given numbers of frames, the results side by side."""
    out, cache, at = [], None, 0
    for n in sizes:
        y, cache = step(ours, x[:, at : at + n], cache)
        out.append(np.asarray(y))
        at += n
    return np.concatenate(out, 1)


CHUNKED = ("2.1", "2.2", "attention", "unequal")


@pytest.mark.parametrize("kind", CHUNKED)
def test_encode(pair, kind):
    theirs, ours, _ = pair(kind)
    f, channels = ours.cfg.pixel_factor, (theirs.config.in_channels // (ours.cfg.patch or 1) ** 2)
    odd = (0, 0) if ours.cfg.residual else (f // 2 - 1, f - 1)  # cut
    x = noise(2, channels, 13, 3 * f + odd[0], 5 * f + odd[1])
    for frames in (1, 5, 9, 13):
        want = theirs.encode(x[:, :, :frames]).latent_dist.parameters
        got = in_chunks(ENCODE_CHUNK, ours, last(x), [1] + [4] * (frames // 4))
        assert error(got, last(want)) < 1e-5


@pytest.mark.parametrize("kind", CHUNKED)
def test_decode(pair, kind):
    theirs, ours, _ = pair(kind)
    z = noise(2, theirs.config.z_dim, 4, 3, 5, scale=0.2)
    for frames in (1, 2, 3, 4):
        want = theirs.decode(z[:, :, :frames]).sample
        got = in_chunks(DECODE_CHUNK, ours, last(z), [1] * frames)
        assert error(got, last(want)) < 1e-5
    clipped = np.mean(np.abs(got) == 1)
    assert clipped < 0.3
    assert clipped > 0 or kind != "2.2"  # some values are, as upstream's


def test_whole(pair):
    """In one call, with three frames at the end that make no chunk."""
    theirs, ours, _ = pair("2.2")
    f = ours.cfg.pixel_factor
    x, z = noise(2, 3, 12, 2 * f, 3 * f), noise(2, theirs.config.z_dim, 4, 3, 2, scale=0.2)
    want, got = theirs.encode(x).latent_dist, ENCODE(ours, last(x))
    assert got.mean.shape[1] == 3
    assert error(got.mode(), last(want.mode())) < 1e-5
    assert error(got.logvar, last(want.logvar)) < 1e-5
    assert error(DECODE(ours, last(z)), last(theirs.decode(z).sample)) < 1e-5


# a grid of pictures, and a row of videos; a number of tile shapes that compiles in seconds
TILED = {
    "patched": (Tiles(20, 12, 12, 8), 1, (40, 48), (1, 5, 6)),
    "attention": (Tiles(8, 8, 6, 6), 5, (6, 14), (2, 3, 7)),
}


@pytest.mark.parametrize("kind", TILED)
def test_tiles(pair, kind):
    theirs, ours, _ = pair(kind)
    tiles, frames, size, latent = TILED[kind]
    theirs.enable_tiling(*tiles)
    channels = theirs.config.in_channels // (ours.cfg.patch or 1) ** 2
    x, z = noise(1, channels, frames, *size), noise(2, theirs.config.z_dim, *latent, scale=0.3)
    encoded, decoded = last(theirs.encode(x).latent_dist.mode()), last(theirs.decode(z).sample)
    small = last(theirs.decode(z[:, :, :1, :3, :3]).sample)
    theirs.disable_tiling()
    assert error(ours.encode(last(x), tiles=tiles).mode(), encoded) < 1e-5
    assert error(ours.decode(last(z), tiles=tiles), decoded) < 1e-5
    assert error(decoded, last(theirs.decode(z).sample)) > 1e-3  # tiles do differ from the whole
    whole = jax.jit(lambda vae, z: vae.decode(z, tiles=tiles))
    assert error(whole(ours, last(z[:, :, :1, :3, :3])), small) < 1e-5  # fits into one


def test_latent_statistics():
    """As WanPipeline before decoding and WanImageToVideoPipeline after encoding, to the last bit."""
    cfg = AutoencoderKLWanConfig(width=2, multipliers=(1,), mean=MEAN_22, std=STD_22, latent_channels=48)
    ours, z = nnx.eval_shape(COMPONENT.make(cfg)), noise(2, 48, 3, 2, 2)
    mean, inverse = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (MEAN_22, STD_22))
    inverse = 1.0 / inverse
    assert np.array_equal(ours.denormalise(last(z)), last(z / inverse + mean))
    assert np.array_equal(ours.normalise(last(z)), last((z - mean) * inverse))
    short = nnx.eval_shape(COMPONENT.make(AutoencoderKLWanConfig(width=2, latent_channels=3, multipliers=(1,))))
    with pytest.raises(ValueError, match="mean has 16 and std 16 values for 3 latent channels"):
        short.normalise(jnp.zeros((1, 1, 2, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_diffusers(pair, kind):
    theirs, ours, _ = pair(kind)
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    tensors = {k: op.inverse(leaves[p][i]) for k, p, i, op in table.back(COMPONENT.rules(ours.cfg), leaves)}
    assert set(tensors) == set(theirs.state_dict())
    assert all(np.array_equal(tensors[k], v.numpy()) for k, v in theirs.state_dict().items())
    written = wan.upstream_config(ours.cfg)
    assert {k: v for k, v in diffusers.AutoencoderKLWan.from_config(written).config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    assert wan.config(written) == ours.cfg


def written_original(ours, prefix=""):
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    found = table.back(wan.original_rules(ours.cfg, prefix), leaves)
    return {k: torch.from_numpy(op.inverse(leaves[p][i]).copy()) for k, p, i, op in found}


def test_original_names_are_those_that_diffusers_reads(pair):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    theirs, ours, _ = pair("2.1-flat")
    read = convert_wan_vae_to_diffusers(written_original(ours))
    assert set(read) == set(theirs.state_dict())
    assert all(torch.equal(read[k], v) for k, v in theirs.state_dict().items())


@needs_original
@pytest.mark.parametrize("kind", ["2.1-flat", "2.2-flat"])
def test_original_layout(pair, kind):
    """Wan's own class takes what we write, and makes of it what diffusers makes; and we read it back."""
    theirs, ours, _ = pair(kind)
    c = theirs.config
    wans = original("wan_vae").VideoVAE(c.in_channels, c.out_channels, c.base_dim, c.base_dim, c.z_dim).eval()
    tensors = written_original(ours)
    wans.load_state_dict(tensors)
    z = noise(1, c.z_dim, 2, 2, 2, scale=0.2)
    with torch.no_grad():
        got = wans.decode(z, [torch.zeros(c.z_dim), torch.ones(c.z_dim)])
    assert error(got.clamp(-1, 1), theirs.decode(z).sample) < 1e-6
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    cfg = wan.original_config(shapes)
    mean, std = wan.STATISTICS[c.z_dim]
    assert cfg == AutoencoderKLWanConfig(**{**vars(ours.cfg), "mean": mean, "std": std})
    targets = {sharding.dotted(p): leaf for p, leaf in COMPONENT.targets(cfg).items()}
    fills = table.plan(shapes, wan.original_rules(cfg), targets)
    leaves = {sharding.dotted(p): a for p, a in sharding.leaves(ours).items()}
    assert all(np.array_equal(table.fill(f, lambda k: tensors[k].numpy()), leaves[f.path]) for f in fills)


def test_original_config_of_other_shapes(pair):
    _, ours, _ = pair("attention")
    shapes = {k: tuple(v.shape) for k, v in written_original(ours, "vae.").items()}
    assert all(k.startswith("vae.") for k in shapes)
    shapes = {k[4:]: v for k, v in shapes.items()}
    with pytest.raises(ConversionError, match=r"conv2.weight has 3 latent channels; .* known for \[16, 48\]"):
        wan.original_config(shapes)
    with pytest.raises(ConversionError, match=r"tensor encoder.conv1.weight is missing"):
        wan.original_config({})
    for key in ("conv1.weight", "conv2.weight"):
        shapes[key] = (16, 16, 1, 1, 1)
    with pytest.raises(ConversionError, match=r"encoder.conv1.weight has 4 input channels"):
        wan.original_config(shapes)
    shapes["encoder.conv1.weight"] = (6, 3, 3, 3, 3)
    cfg = wan.original_config(shapes)
    assert (cfg.attention, cfg.temporal, cfg.layers, cfg.multipliers) == ((1.0, 0.5), (True,), 2, (1, 3))
    assert (cfg.width, cfg.decoder_width, cfg.time_factor, cfg.space_factor) == (6, 5, 2, 2)


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_bfloat16_error_is_torchs(pair, kind):
    theirs, ours, folder = pair(kind)
    low, low_theirs = ported(folder, "bfloat16"), diffusers.AutoencoderKLWan.from_pretrained(folder)
    low_theirs.to(torch.bfloat16)
    f = ours.cfg.pixel_factor
    x, z = noise(4, 3, 1, 3 * f, 3 * f), noise(4, theirs.config.z_dim, 2, 3, 3, scale=0.2)
    with torch.no_grad():
        torchs = low_theirs.encode(x.bfloat16()).latent_dist.mode(), low_theirs.decode(z.bfloat16()).sample
    exact = last(theirs.encode(x).latent_dist.mode()), last(theirs.decode(z).sample)
    mine = ENCODE(low, last(x)).mode(), in_chunks(DECODE_CHUNK, low, last(z), [1, 1])
    for got, want, reference in zip(mine, exact, torchs):
        allowed = error(last(reference), want)
        assert 1e-3 < allowed < 0.2
        assert error(got, want) <= 1.2 * allowed


FULL = {
    "2.1": ({}, 126_892_531),
    "2.2": (
        dict(base_dim=160, decoder_base_dim=256, z_dim=48, latents_mean=MEAN_22, latents_std=STD_22,
             scale_factor_spatial=16, clip_output=False, **PATCHED), 704_688_668,
    ),
}  # fmt: skip


@pytest.mark.parametrize("release", FULL)
def test_full_size_shapes(release):
    """Names, shapes and counts of the releases in both layouts, both ways."""
    upstream, parameters = FULL[release]
    cfg = wan.config({"_class_name": "AutoencoderKLWan", **upstream})
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**{k: v for k, v in upstream.items() if k != "clip_output"})
    assert sharding.count(COMPONENT.make(cfg)) == sum(p.numel() for p in theirs.parameters()) == parameters
    targets = {sharding.dotted(p): leaf for p, leaf in COMPONENT.targets(cfg).items()}
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    fills = table.plan(shapes, COMPONENT.rules(cfg), targets)
    assert {k for k, *_ in table.back(COMPONENT.rules(cfg), targets)} == set(shapes)
    keys = {(p, str(i)): k for k, p, i, _ in table.back(wan.original_rules(cfg), targets)}
    originals = {keys[f.path, str(s.index)]: shapes[s.key] for f in fills for s in f.sources}
    table.plan(originals, wan.original_rules(cfg), targets)
    assert wan.original_config(originals) == cfg


def test_refused_configs():
    with pytest.raises(ValueError, match="lemon is not a known field; _class_name is 'AutoencoderKL'"):
        wan.config({"lemon": 1, "_class_name": "AutoencoderKL"})
    with pytest.raises(ValueError, match="temporal has 1 values for 3 changes of resolution"):
        wan.config({"temperal_downsample": [True]})
    with pytest.raises(ValueError, match="the shortcut of encoder level 2 cannot map 192 to 384 channels"):
        wan.config({"dim_mult": [1, 2, 4], "is_residual": True})
