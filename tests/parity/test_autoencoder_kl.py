"""AutoencoderKL against diffusers: blocks, encode, decode, tiles, both layouts, bfloat16, sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import autoencoder_kl as kl
from convert import table
from jdit import sharding
from jdit.nn.vae import tiling
from jdit.nn.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jdit.nn.vae.blocks import Downsample, Upsample

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD3_LIKE = {
    "block_out_channels": (8, 12, 16), "layers_per_block": 2, "latent_channels": 5, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "sample_size": 16,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609,
}  # fmt: skip
SMALL = {
    "block_out_channels": (4, 6), "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 2, "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
VARIANTS = {
    "sd3": SD3_LIKE,
    "quant": SD3_LIKE | {"use_quant_conv": True, "use_post_quant_conv": True, "norm_num_groups": 2},
    "plain": SD3_LIKE | {"mid_block_add_attention": False, "layers_per_block": 1, "in_channels": 4, "out_channels": 2},
    "sparse": {"block_out_channels": (12,), "norm_num_groups": 3},
}


def error(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def randomise(model, seed: int = 0):
    """Every parameter random; matrices of about unit gain, so that no activation dies or explodes."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 1 / np.sqrt(np.prod(p.shape[1:])) if p.ndim > 1 else 0.3
            mean = 1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            p.copy_(torch.from_numpy(mean + gain * rng.normal(size=tuple(p.shape))))
    return model.eval().requires_grad_(False)


def convert(tensors, rules, cfg) -> AutoencoderKL:
    """Our model from tensors in an upstream layout."""
    make = lambda: AutoencoderKL(cfg, rngs=nnx.Rngs(0))
    _, targets = sharding.abstract(make)
    paths = {sharding.dotted(p): p for p in targets}
    fills = table.plan({k: v.shape for k, v in tensors.items()}, rules, {d: targets[p] for d, p in paths.items()})
    return sharding.assemble(
        make, {paths[f.path]: jnp.asarray(table.fill(f, tensors.__getitem__), f.dtype) for f in fills}
    )


def back(ours, rules) -> dict[str, np.ndarray]:
    """Our model's tensors in an upstream layout."""
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    return {k: op.inverse(leaves[p][i]).copy() for k, p, i, op in table.back(rules, leaves)}


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tmp_path_factory):
    """(diffusers' model, ours): through save_pretrained, its config.json and the real rules."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = randomise(diffusers.AutoencoderKL(**VARIANTS[request.param]))
    theirs.save_pretrained(folder)
    cfg = kl.config(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    return theirs, convert(tensors, kl.rules(cfg), cfg)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    theirs = randomise(diffusers.AutoencoderKL(**SD3_LIKE))
    cfg = kl.config(dict(theirs.config))
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return theirs, convert(tensors, kl.rules(cfg), cfg), tensors


def last(x):
    return jnp.asarray(x.permute(0, 2, 3, 1).numpy())


def noise(*shape, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def run(fn, *args):
    return jax.jit(fn)(*args)


def agree(module, reference, *shape, tolerance=1e-5):
    """`module` equals a torch module on a random input of shape B C H W."""
    x = noise(*shape)
    want = reference(x)
    assert error(run(type(module).__call__, module, last(x)), last(want)) < tolerance


def test_blocks(sd3):
    theirs, ours, _ = sd3
    down, up = theirs.encoder.down_blocks, theirs.decoder.up_blocks
    resnet = lambda block: lambda x: block(x, None)
    agree(ours.encoder.down[0].resnets[0], resnet(down[0].resnets[0]), 2, 8, 7, 5)
    assert ours.encoder.down[1].resnets[0].shortcut is not None
    agree(ours.encoder.down[1].resnets[0], resnet(down[1].resnets[0]), 2, 8, 7, 5)
    agree(ours.encoder.down[2].resnets[1].norm2, down[2].resnets[1].norm2, 2, 16, 7, 5)
    agree(ours.encoder.mid.attention, theirs.encoder.mid_block.attentions[0], 2, 16, 7, 5)
    agree(ours.decoder.mid, theirs.decoder.mid_block, 2, 16, 7, 5)
    for size in ((7, 4), (6, 9)):
        assert isinstance(ours.encoder.down[0].downsample, Downsample)
        agree(ours.encoder.down[0].downsample, down[0].downsamplers[0], 2, 8, *size)
    assert isinstance(ours.decoder.up[0].upsample, Upsample)
    agree(ours.decoder.up[0].upsample, up[0].upsamplers[0], 2, 16, 5, 3)
    for i, (c_down, c_up) in enumerate(((8, 16), (8, 16), (12, 12))):
        agree(ours.encoder.down[i], down[i], 2, c_down, 7, 5)
        agree(ours.decoder.up[i], up[i], 2, c_up, 3, 5)


def test_encode_and_decode(pair):
    theirs, ours = pair
    x, z = noise(2, theirs.config.in_channels, 26, 19), noise(2, theirs.config.latent_channels, 5, 7)
    want, got = theirs.encode(x).latent_dist, run(AutoencoderKL.encode, ours, last(x))
    assert error(got.mean, last(want.mean)) < 1e-4
    assert error(got.logvar, last(want.logvar)) < 1e-4
    assert error(got.kl(), want.kl().numpy()) < 1e-4
    assert error(run(AutoencoderKL.decode, ours, last(z)), last(theirs.decode(z).sample)) < 1e-4


def test_log_variance_is_held_in_bounds(sd3):
    theirs, ours, _ = sd3
    x = noise(2, 3, 26, 19)
    bias = theirs.encoder.conv_out.bias.clone()
    big = torch.linspace(-60, 60, bias.numel())
    theirs.encoder.conv_out.bias.copy_(big)
    want = theirs.encode(x).latent_dist
    theirs.encoder.conv_out.bias.copy_(bias)
    shifted = {p: a for p, a in sharding.leaves(ours).items()}
    shifted["encoder", "conv_out", "bias"] = jnp.asarray(big.numpy())
    got = run(
        AutoencoderKL.encode, sharding.assemble(lambda: AutoencoderKL(ours.cfg, rngs=nnx.Rngs(0)), shifted), last(x)
    )
    assert float(got.logvar.max()) == 20.0
    assert error(got.logvar, last(want.logvar)) < 1e-5


@pytest.fixture(scope="module")
def small():
    """Two levels, tiles of 16 pixels and 8 latent pixels: quick to compile for many tile shapes."""
    theirs = randomise(diffusers.AutoencoderKL(**SMALL))
    cfg = kl.config(dict(theirs.config))
    theirs.enable_tiling()
    return theirs, convert({k: v.numpy() for k, v in theirs.state_dict().items()}, kl.rules(cfg), cfg)


@pytest.mark.parametrize("size", [(13, 10), (5, 9), (8, 17), (8, 8)])
def test_tiled_decode(small, size):
    theirs, ours = small
    z = noise(2, theirs.config.latent_channels, *size)
    want = last(theirs.decode(z).sample)
    assert error(tiling.decode_tiled(ours, last(z)), want) < 1e-4
    theirs.disable_tiling()
    whole = last(theirs.decode(z).sample)
    theirs.enable_tiling()
    assert error(whole, want) == 0 if max(size) <= 8 else error(whole, want) > 1e-2  # tiles do differ from the whole


@pytest.mark.parametrize("size", [(27, 21), (16, 29), (9, 17)])
def test_tiled_encode(small, size):
    theirs, ours = small
    x = noise(2, theirs.config.in_channels, *size)
    want, got = theirs.encode(x).latent_dist, tiling.encode_tiled(ours, last(x))
    assert error(got.mean, last(want.mean)) < 1e-4
    assert error(got.logvar, last(want.logvar)) < 1e-4


def test_other_tiles_and_overlaps(sd3):
    theirs, ours, _ = sd3
    z = noise(1, 5, 14, 4)
    theirs.tile_sample_min_size, theirs.tile_latent_min_size, theirs.tile_overlap_factor = 32, 8, 0.5
    theirs.enable_tiling()
    want = last(theirs.decode(z).sample)
    theirs.disable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size, theirs.tile_overlap_factor = 16, 4, 0.25
    assert error(tiling.decode_tiled(ours, last(z), tile=32, overlap=0.5), want) < 1e-4


def test_slices(sd3):
    theirs, ours, _ = sd3
    z, x = noise(3, 5, 6, 5), noise(3, 3, 12, 9)
    theirs.enable_slicing()
    decoded, encoded = theirs.decode(z).sample, theirs.encode(x).latent_dist
    theirs.disable_slicing()
    assert error(tiling.one_at_a_time(ours.decode, last(z)), last(decoded)) < 1e-4
    assert error(tiling.one_at_a_time(ours.encode, last(x)).mean, last(encoded.mean)) < 1e-4


def test_back_to_diffusers(pair):
    """Our leaves and config, written in diffusers' layout, are the model that they came from."""
    theirs, ours = pair
    cfg = ours.cfg
    leaves = {sharding.dotted(p): np.asarray(a) for p, a in sharding.leaves(ours).items()}
    tensors = {
        k: torch.from_numpy(op.inverse(leaves[p][i]).copy()) for k, p, i, op in table.back(kl.rules(cfg), leaves)
    }
    again = diffusers.AutoencoderKL.from_config(kl.upstream_config(cfg)).eval()
    again.load_state_dict(tensors, strict=True)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in again.state_dict().items())
    assert kl.config(dict(again.config)) == cfg
    z = noise(1, cfg.latent_channels, 4, 4)
    assert torch.equal(again.decode(z).sample, theirs.decode(z).sample)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_original_layout(pair, prefix):
    """What we write in the original layout is read by diffusers' own converter, and by us."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    theirs, ours = pair
    cfg, rules = ours.cfg, kl.original_rules(ours.cfg, prefix)
    tensors = back(ours, rules)
    read = convert_ldm_vae_checkpoint({k: torch.from_numpy(v) for k, v in tensors.items()}, dict(theirs.config))
    state = theirs.state_dict()
    assert set(read) == set(state)
    assert all(torch.equal(read[k], v) for k, v in state.items())
    if cfg.mid_attention:
        assert tensors[f"{prefix}encoder.mid.attn_1.q.weight"].ndim == 4
    again = sharding.leaves(convert(tensors, rules, cfg))
    assert all(np.array_equal(again[p], a) for p, a in sharding.leaves(ours).items())


def test_deprecated_attention_names(sd3, tmp_path):
    """As in files from before diffusers 0.15; diffusers reads the same file."""
    theirs, ours, tensors = sd3
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, value in tensors.items():
        for new_name, old_name in names.items():
            key = key.replace(new_name, old_name)
        old[key] = value
    assert sum(k not in tensors for k in old) == 16
    got = sharding.leaves(convert(old, kl.rules(ours.cfg), ours.cfg))
    assert all(np.array_equal(got[p], a) for p, a in sharding.leaves(ours).items())
    theirs.save_config(tmp_path)
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    read = diffusers.AutoencoderKL.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in read.items())


def test_bfloat16_error_is_torchs(sd3):
    theirs, ours, tensors = sd3
    low = convert(tensors, kl.rules(ours.cfg), dataclasses.replace(ours.cfg, dtype="bfloat16"))
    low_theirs = diffusers.AutoencoderKL(**SD3_LIKE).eval().requires_grad_(False)
    low_theirs.load_state_dict(theirs.state_dict())
    low_theirs.to(torch.bfloat16)
    x, z = noise(2, 3, 40, 32), noise(2, 5, 9, 8)
    pairs = [
        (theirs.decode(z).sample, low_theirs.decode(z.bfloat16()).sample, run(AutoencoderKL.decode, low, last(z))),
        (theirs.encode(x).latent_dist.mean, low_theirs.encode(x.bfloat16()).latent_dist.mean,
         run(AutoencoderKL.encode, low, last(x)).mean),
    ]  # fmt: skip
    for want, torchs, got in pairs:
        allowed = error(torchs.float(), want)
        assert 1e-3 < allowed < 0.1
        assert error(got, last(want)) <= 1.2 * allowed


def test_full_size_shapes():
    """Names, shapes and count of Stable Diffusion 3's autoencoder, in both directions."""
    cfg = AutoencoderKLConfig()
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(kl.upstream_config(cfg))
    make = lambda: AutoencoderKL(cfg, rngs=nnx.Rngs(0))
    assert sharding.count(make) == sum(p.numel() for p in theirs.parameters()) == 83_819_683
    targets = {sharding.dotted(p): leaf for p, leaf in sharding.abstract(make)[1].items()}
    table.plan({k: tuple(v.shape) for k, v in theirs.state_dict().items()}, kl.rules(cfg), targets)
    assert {k for k, *_ in table.back(kl.rules(cfg), targets)} == set(theirs.state_dict())
