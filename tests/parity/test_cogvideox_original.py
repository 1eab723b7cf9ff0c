"""CogVideoX in the layout of the original (SAT) releases, and every published size."""

import numpy as np
import pytest
import torch
import util_cogvideox
import util_cogvideox_pipeline
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.numpy import save_file

from convert import autoencoder_kl_cogvideox as vae_table
from convert import cogvideox, registry, stream, write
from convert.source import open_source
from convert.table import ConversionError
from jdit import sharding, zoo
from jdit.sharding import dotted

pytestmark = pytest.mark.torch

NAMES = {  # the original's -> diffusers', by diffusers' scripts/convert_cogvideox_to_diffusers.py
    "transformer.layers.{}.attention.dense": "transformer_blocks.{}.attn1.to_out.0",
    "transformer.layers.{}.mlp.dense_h_to_4h": "transformer_blocks.{}.ff.net.0.proj",
    "transformer.layers.{}.mlp.dense_4h_to_h": "transformer_blocks.{}.ff.net.2",
    "transformer.layers.{}.input_layernorm": "transformer_blocks.{}.norm1.norm",
    "transformer.layers.{}.post_attention_layernorm": "transformer_blocks.{}.norm2.norm",
    "mixins.adaln_layer.query_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_k",
    "transformer.final_layernorm": "norm_final", "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear", "mixins.final_layer.linear": "proj_out",
    "mixins.patch_embed.proj": "patch_embed.proj", "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1", "ofs_embed.2": "ofs_embedding.linear_2",
}  # fmt: skip
MODULATION = [("norm1", (0, 1, 2, 6, 7, 8)), ("norm2", (3, 4, 5, 9, 10, 11))]
"""Where the twelfths of adaLN_modulations go."""


def to_original(state: dict[str, torch.Tensor], layers: int) -> dict[str, np.ndarray]:
    """diffusers' tensors in the original layout."""
    tensors, out = {k: v.numpy() for k, v in state.items()}, {}
    for end in ("weight", "bias"):
        for theirs, name in NAMES.items():
            for i in range(layers if "{}" in name else 1):
                if (key := f"{name.format(i)}.{end}") in tensors:
                    out[f"{theirs.format(i)}.{end}"] = tensors.pop(key)
        for i in range(layers):
            block = f"transformer_blocks.{i}"
            qkv = [tensors.pop(f"{block}.attn1.to_{x}.{end}") for x in "qkv"]
            out[f"transformer.layers.{i}.attention.query_key_value.{end}"] = np.concatenate(qkv)
            parts = {}
            for norm, at in MODULATION:
                parts |= dict(zip(at, np.split(tensors.pop(f"{block}.{norm}.linear.{end}"), 6)))
            out[f"mixins.adaln_layer.adaLN_modulations.{i}.1.{end}"] = np.concatenate([parts[n] for n in range(12)])
    if "patch_embed.pos_embedding" in tensors:
        out["mixins.pos_embed.pos_embedding"] = tensors.pop("patch_embed.pos_embedding")
    assert not tensors
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


def our_leaves(module) -> dict[str, np.ndarray]:
    return {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}


@pytest.mark.parametrize("kind", ["2b", "5b", "5b-i2v", "1.5-i2v"])
def test_transformer(kind, tmp_path):
    model = util_cogvideox.saved(tmp_path / "diffusers", **util_cogvideox.KINDS[kind])
    module = util_cogvideox.ported(tmp_path / "diffusers")
    tensors = to_original(model.state_dict(), module.cfg.layers)
    written = {t.key: t.load() for t in write.outputs(our_leaves(module), cogvideox.original_rules(module.cfg))}
    assert written.keys() == tensors.keys() and all(np.array_equal(written[k], tensors[k]) for k in tensors)
    extra = {"2b": "pos_embedding", "5b": "freqs_sin"}.get(kind)
    if extra:  # computed here, and what tells positions
        tensors[f"mixins.pos_embed.{extra}"] = np.zeros((1, 2, 3), np.float32)
    if kind == "5b-i2v":  # laid out for the published size alone: 226 tokens of text and 13 x 30 x 45 patches
        tensors["mixins.pos_embed.pos_embedding"] = np.zeros((1, 226 + 17550, module.cfg.width), np.float32)
    save_file({f"model.diffusion_model.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    part = open_source(tmp_path / "model.safetensors").parts["transformer"]
    told = ("heads", "head_dim", "layers", "in_channels", "out_channels", "time_dim", "text_dim", "patch", "rotary",
            "patch_frames", "ofs_dim", "attention_bias", "learned", "patch_bias")  # fmt: skip
    assert [getattr(part.cfg, n) for n in told] == [getattr(module.cfg, n) for n in told]
    leaves = registry.of_config(part.cfg).targets(part.cfg)

    got = {dotted(p): np.asarray(v) for p, v in stream.load_leaves(part.reader, part.rules, leaves).items()}
    want = our_leaves(module)
    assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want if k != "pos")


def test_a_release_folder(tmp_path):
    """Transformer and autoencoder side by side, the latter with the keys of its training; its scale follows from the
    transformer."""

    for kind, scale, invert in (("2b", 1.15258426, False), ("5b", 0.7, False), ("1.5", 0.7, True)):
        model = util_cogvideox.transformer(**util_cogvideox.KINDS[kind])
        tensors = to_original(model.state_dict(), model.config.num_layers)
        if kind == "5b":
            tensors["mixins.pos_embed.freqs_cos"] = np.zeros(3, np.float32)
        if kind == "2b":
            tensors["mixins.pos_embed.pos_embedding"] = np.zeros((1, 2, 3), np.float32)
        folder = tmp_path / kind
        (folder / "transformer").mkdir(parents=True), (folder / "vae").mkdir()
        save_file(
            {f"model.diffusion_model.{k}": v for k, v in tensors.items()}, folder / "transformer" / "m.safetensors"
        )
        vae = util_cogvideox_pipeline.vae(block_out_channels=(32,) * 4, norm_num_groups=32)
        vae.save_pretrained(tmp_path / "vae")
        part = open_source(tmp_path / "vae").parts["vae"]
        targets = registry.of_config(part.cfg).targets(part.cfg)

        leaves = {dotted(p): np.asarray(v) for p, v in stream.load_leaves(part.reader, part.rules, targets).items()}
        own = {t.key: t.load() for t in write.outputs(leaves, vae_table.original_rules(part.cfg))}
        save_file(own | {"loss.logvar": np.zeros(1, np.float32)}, folder / "vae" / "3d-vae.safetensors")
        source = open_source(folder)
        cfg = source.parts["vae"].cfg
        assert (source.family, cfg.scale, cfg.invert_scale, cfg.channels) == ("cogvideox", scale, invert, (32,) * 4)
        assert not source.misfits() and source.scheduler["_class_name"] == "CogVideoXDDIMScheduler"


def test_what_cannot_be_told():
    model = util_cogvideox.transformer(**util_cogvideox.KINDS["5b"])
    shapes = {k: v.shape for k, v in to_original(model.state_dict(), 3).items()}
    with pytest.raises(ConversionError, match="CogVideoX of width 48: neither"):
        cogvideox.original_config(shapes)
    with pytest.raises(ConversionError, match=r"not a CogVideoX transformer: tensor time_embed\.0\.weight is missing"):
        cogvideox.original_config({k: v for k, v in shapes.items() if "time_embed" not in k})


BASE = dict(
    activation_fn="gelu-approximate", attention_bias=True, attention_head_dim=64, dropout=0.0, flip_sin_to_cos=True,
    freq_shift=0, in_channels=16, max_text_seq_length=226, norm_elementwise_affine=True, norm_eps=1e-05,
    num_attention_heads=30, num_layers=30, out_channels=16, patch_size=2, sample_frames=49, sample_height=60,
    sample_width=90, spatial_interpolation_scale=1.875, temporal_compression_ratio=4, temporal_interpolation_scale=1.0,
    text_embed_dim=4096, time_embed_dim=512, timestep_activation_fn="silu", use_rotary_positional_embeddings=False,
)  # fmt: skip
LARGE = BASE | dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
NEW = LARGE | dict(
    patch_size_t=2, patch_bias=False, sample_frames=81, sample_height=300, sample_width=300, ofs_embed_dim=None,
    use_learned_positional_embeddings=False,
)  # fmt: skip
PUBLISHED = {  # transformer/config.json of each release, the autoencoder's scale, the noise levels' shift
    "cogvideox-2b": (BASE, {}, 3.0),
    "cogvideox-5b": (LARGE, dict(scaling_factor=0.7), 1.0),
    "cogvideox-5b-i2v": (
        LARGE | dict(in_channels=32, use_learned_positional_embeddings=True), dict(scaling_factor=0.7), 1.0
    ),
    "cogvideox1.5-5b": (NEW, dict(scaling_factor=0.7, invert_scale_latents=True), 1.0),
    "cogvideox1.5-5b-i2v": (
        NEW | dict(in_channels=32, ofs_embed_dim=512), dict(scaling_factor=0.7, invert_scale_latents=True), 1.0
    ),
}  # fmt: skip


def test_every_variant_is_here():
    assert set(PUBLISHED) == {n for n, v in zoo.VARIANTS.items() if v.family == "cogvideox"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name):
    """Config values and parameter counts; the original layout's shapes tell the same architecture."""
    (config, vae, shift), variant = PUBLISHED[name], zoo.VARIANTS[name]
    component, cfg = registry.COMPONENTS[util_cogvideox.CLASS], variant.components["transformer"]
    assert component.config(config) == cfg and config.items() <= component.upstream_config(cfg).items()
    with torch.device("meta"):
        model, autoencoder = CogVideoXTransformer3DModel(**config), AutoencoderKLCogVideoX()
    assert sharding.count(component.make(cfg)) == sum(p.numel() for p in model.parameters())
    own = registry.COMPONENTS["AutoencoderKLCogVideoX"]
    assert own.config(vae) == variant.components["vae"]
    count = sharding.count(own.make(variant.components["vae"]))
    assert count == sum(p.numel() for p in autoencoder.parameters())
    assert variant.scheduler["snr_shift_scale"] == shift
    assert zoo.recognise(variant.components, variant.source) == name
    views = {dotted(p): np.broadcast_to(np.zeros((), np.float32), s.shape) for p, s in component.targets(cfg).items()}
    shapes = {t.key: t.shape for t in write.outputs(views, cogvideox.original_rules(cfg))}
    assert cogvideox.original_config(shapes) == cfg
