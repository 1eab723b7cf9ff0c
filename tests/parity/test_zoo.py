"""Full-size variants against upstream's classes on the meta device: config values and parameter counts."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from convert import registry
from jdit import sharding, zoo

pytestmark = pytest.mark.torch

PUBLISHED = {  # transformer/config.json of each release
    "sd3-medium": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192,
    ),
    "sd3.5-medium": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    ),
    "sd3.5-large": dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm",
    ),
}  # fmt: skip
PUBLISHED["sd3.5-large-turbo"] = PUBLISHED["sd3.5-large"]
COMMON = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
    pooled_projection_dim=2048,
)  # fmt: skip


def ours(variant: str, component: str) -> int:
    cfg = zoo.VARIANTS[variant].components[component]
    return sharding.count(registry.of_config(cfg).make(cfg))


def parameters(make) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("variant", PUBLISHED)
def test_transformer(variant):
    published = COMMON | PUBLISHED[variant]
    cfg = zoo.VARIANTS[variant].components["transformer"]
    component = registry.COMPONENTS["SD3Transformer2DModel"]
    assert component.config(published) == cfg
    assert published.items() <= component.upstream_config(cfg).items()
    assert ours(variant, "transformer") == parameters(lambda: SD3Transformer2DModel(**published))
    assert zoo.recognise({"transformer": cfg}, variant) == variant


def test_encoders_and_autoencoder():
    clip = lambda **kw: CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **kw))
    small = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    large = dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    t5 = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                  feed_forward_proj="gated-gelu")  # fmt: skip
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    assert ours("sd3-medium", "text_encoder") == parameters(lambda: clip(**small))
    assert ours("sd3-medium", "text_encoder_2") == parameters(lambda: clip(**large))
    assert ours("sd3-medium", "text_encoder_3") == parameters(lambda: T5EncoderModel(t5))
    assert ours("sd3-medium", "vae") == parameters(lambda: AutoencoderKL(**vae))
