"""Full-size Wan variants against upstream's classes on the meta device: config values and parameter counts."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from test_autoencoder_kl_wan import MEAN_22, STD_22
from test_clip_vision import PUBLISHED as VISION
from test_umt5 import PUBLISHED as UMT5
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from util_wan_original import SPEC, needs_original

from convert import registry
from jdit import sharding, zoo

pytestmark = pytest.mark.torch

BASE = dict(
    patch_size=[1, 2, 2], num_attention_heads=40, attention_head_dim=128, in_channels=16, out_channels=16,
    text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    eps=1e-6, image_dim=None, added_kv_proj_dim=None, rope_max_seq_len=1024, pos_embed_seq_len=None,
)  # fmt: skip
I2V = BASE | dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
PUBLISHED = {  # transformer/config.json of each release
    "wan2.1-t2v-1.3b": BASE | dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "wan2.1-t2v-14b": BASE,
    "wan2.1-i2v-14b-480p": I2V,
    "wan2.1-i2v-14b-720p": I2V,
    "wan2.1-flf2v-14b-720p": I2V | dict(pos_embed_seq_len=514),
    "wan2.2-t2v-a14b": BASE,
    "wan2.2-i2v-a14b": BASE | dict(in_channels=36),
    "wan2.2-ti2v-5b": BASE | dict(
        num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48
    ),
}  # fmt: skip
VAE_22 = dict(
    base_dim=160, decoder_base_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, is_residual=True,
    in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=MEAN_22, latents_std=STD_22,
)  # fmt: skip


def ours(cfg) -> int:
    return sharding.count(registry.of_config(cfg).make(cfg))


def parameters(make) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("variant", PUBLISHED)
def test_transformer(variant):
    published, components = PUBLISHED[variant], zoo.VARIANTS[variant].components
    cfg, component = components["transformer"], registry.COMPONENTS["WanTransformer3DModel"]
    assert component.config(published) == cfg and components.get("transformer_2", cfg) == cfg
    assert published.items() <= component.upstream_config(cfg).items()
    assert ours(cfg) == parameters(lambda: WanTransformer3DModel(**published))
    assert zoo.recognise(components, zoo.VARIANTS[variant].source) == variant
    assert zoo.VARIANTS[variant].family == "wan" and set(zoo.VARIANTS) >= set(PUBLISHED)


CONFIGS = {  # in diffsynth-engine's conf/models/wan/dit
    "wan2.1-t2v-1.3b": "wan2.1_t2v_1.3b", "wan2.1-t2v-14b": "wan2.1_t2v_14b", "wan2.1-i2v-14b-720p": "wan2.1_i2v_14b",
    "wan2.1-flf2v-14b-720p": "wan2.1_flf2v_14b", "wan2.2-t2v-a14b": "wan2.2_t2v_a14b",
    "wan2.2-i2v-a14b": "wan2.2_i2v_a14b", "wan2.2-ti2v-5b": "wan2.2_ti2v_5b",
}  # fmt: skip


@needs_original
@pytest.mark.parametrize("name", CONFIGS)
def test_how_it_is_run(name):
    """Shift, boundary, guidance of both experts, steps and rate as another implementation has them."""
    assert SPEC is not None and SPEC.submodule_search_locations
    place = Path(SPEC.submodule_search_locations[0]) / "conf" / "models" / "wan" / "dit" / f"{CONFIGS[name]}.json"
    theirs, variant = json.loads(place.read_text()), zoo.VARIANTS[name]
    plan = variant.plan
    assert variant.scheduler["flow_shift"] == theirs.get("shift", 5.0)
    assert (variant.settings or {}).get("boundary_ratio", -1) == theirs.get("boundary", -1)
    assert (plan.guidance_2 or plan.guidance, plan.guidance) == tuple(theirs.get("cfg_scale", (5.0, 5.0)))  # low, high
    assert plan.steps == theirs.get("num_inference_steps", plan.steps) and plan.fps == theirs.get("fps", 16)
    assert (variant.settings or {}).get("expand_timesteps", False) == theirs.get("fuse_image_latents", False)


def test_every_variant_is_here():
    assert set(PUBLISHED) == {n for n, v in zoo.VARIANTS.items() if v.family == "wan"}


def test_encoders_and_autoencoders():
    parts = zoo.VARIANTS["wan2.1-i2v-14b-480p"].components
    assert registry.COMPONENTS["UMT5EncoderModel"].config(UMT5) == parts["text_encoder"]
    assert ours(parts["text_encoder"]) == parameters(lambda: UMT5EncoderModel(UMT5Config(**UMT5)))
    assert registry.COMPONENTS["CLIPVisionModel"].config(VISION) == parts["image_encoder"]
    heads = parameters(lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)))
    assert ours(parts["image_encoder"]) == heads
    reader = registry.COMPONENTS["AutoencoderKLWan"].config
    for config, variant in (({}, "wan2.1-t2v-14b"), (VAE_22, "wan2.2-ti2v-5b")):
        cfg = zoo.VARIANTS[variant].components["vae"]
        assert reader(config) == cfg
        assert ours(cfg) == parameters(lambda config=config: AutoencoderKLWan(**config))
