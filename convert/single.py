"""Architectures read off the shapes of original single files, which carry no config (encoders, SD3's autoencoder).

What shapes cannot tell (dims of a head, activations, the scale and shift of latents) is what all published files of the
family share.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from convert import llama
from convert.qwen2_5_vl import LANGUAGE, VISION
from convert.table import need
from jdit.nn.text.clip import LEGACY_EOS, CLIPTextConfig
from jdit.nn.text.decoder import DecoderConfig
from jdit.nn.text.llava import LlavaConfig
from jdit.nn.text.qwen2_5_vl import Qwen2_5VLConfig
from jdit.nn.text.t5 import T5Config
from jdit.nn.vae.autoencoder_kl import AutoencoderKLConfig
from jdit.nn.vision.clip import CLIPVisionConfig
from jdit.nn.vision.qwen2_5_vl import Qwen2_5VisionConfig

Shapes = Mapping[str, Sequence[int]]
HEAD_DIM = 64


def _layers(shapes: Shapes, template: str) -> int:
    pattern = re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)") + r"\.")
    return 1 + max((int(m[1]) for k in shapes if (m := pattern.match(k))), default=-1)


def clip_config(shapes: Shapes, *, act: str) -> CLIPTextConfig:
    """CLIP text tower by its keys below `text_encoders.clip_?.transformer.`.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    vocab, width = need(shapes, "text_model.embeddings.token_embedding.weight", "CLIP text encoder")
    positions = need(shapes, "text_model.embeddings.position_embedding.weight", "CLIP text encoder")[0]
    mlp = need(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", "CLIP text encoder")[0]
    projection = shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else width
    return CLIPTextConfig(
        vocab_size=vocab, width=width, mlp=mlp, layers=_layers(shapes, "text_model.encoder.layers.{i}"),
        heads=max(1, width // HEAD_DIM), max_positions=positions, act=act, projection=projection,
        eos_token_id=LEGACY_EOS,
    )  # fmt: skip


def t5_config(shapes: Shapes) -> T5Config:
    """T5 v1.1 or UMT5 encoder by its keys below `text_encoders.t5xxl.transformer.`.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    table = "encoder.embed_tokens.weight" if "shared.weight" not in shapes else "shared.weight"
    vocab, width = need(shapes, table, "T5 encoder")
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = need(shapes, f"{first}.relative_attention_bias.weight", "T5 encoder")
    inner = need(shapes, f"{first}.q.weight", "T5 encoder")[0]
    mlp = need(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "T5 v1.1 encoder")[0]
    return T5Config(
        vocab_size=vocab, width=width, kv=inner // heads, heads=heads, mlp=mlp,
        layers=_layers(shapes, "encoder.block.{i}"), buckets=buckets,
        shared_bias="encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" not in shapes,
    )  # fmt: skip


def umt5_config(shapes: Shapes) -> T5Config:
    """UMT5 encoder by the keys of a file of its own, in Wan's naming or in transformers'.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    if "token_embedding.weight" not in shapes:
        return t5_config(shapes)
    what = "Wan UMT5 encoder"
    vocab, width = need(shapes, "token_embedding.weight", what)
    shared = "pos_embedding.embedding.weight" in shapes
    table = "pos_embedding.embedding.weight" if shared else "blocks.0.pos_embedding.embedding.weight"
    buckets, heads = need(shapes, table, what)
    return T5Config(
        vocab_size=vocab, width=width, kv=need(shapes, "blocks.0.attn.q.weight", what)[0] // heads, heads=heads,
        mlp=need(shapes, "blocks.0.ffn.fc1.weight", what)[0], layers=_layers(shapes, "blocks.{i}"),
        buckets=buckets, shared_bias=shared,
    )  # fmt: skip


def clip_vision_config(shapes: Shapes) -> CLIPVisionConfig:
    """CLIP's ViT-H by its keys below `visual.` in Wan's release, or in transformers' naming, without projection.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    what, tower = "CLIP vision encoder", "vision_model."
    if "cls_embedding" in shapes:
        patches, positions, layer, up = "patch_embedding.weight", "pos_embedding", "transformer.{i}", "mlp.0"
    else:
        patches, positions = (f"{tower}embeddings.{n}_embedding.weight" for n in ("patch", "position"))
        layer, up = f"{tower}encoder.layers.{{i}}", "mlp.fc1"
    width, channels, patch, _ = need(shapes, patches, what)
    side = math.isqrt(need(shapes, positions, what)[-2] - 1)
    return CLIPVisionConfig(
        width=width, mlp=need(shapes, f"{layer.format(i=0)}.{up}.weight", what)[0], layers=_layers(shapes, layer),
        image_size=side * patch, patch=patch, channels=channels,
    )  # fmt: skip


def vae_config(shapes: Shapes) -> AutoencoderKLConfig:
    """SD3's autoencoder by its keys below `first_stage_model.`.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    what = "Stable Diffusion 3 autoencoder"
    levels = _layers(shapes, "encoder.down.{i}")
    channels = [need(shapes, f"encoder.down.{i}.block.0.conv1.weight", what)[0] for i in range(levels)]
    return AutoencoderKLConfig(
        in_channels=need(shapes, "encoder.conv_in.weight", what)[1],
        out_channels=need(shapes, "decoder.conv_out.weight", what)[0],
        channels=tuple(channels), layers=_layers(shapes, "encoder.down.0.block.{i}"),
        latent_channels=need(shapes, "decoder.conv_in.weight", what)[1],
        quant_conv="quant_conv.weight" in shapes, post_quant_conv="post_quant_conv.weight" in shapes,
        mid_attention="encoder.mid.attn_1.q.weight" in shapes,
    )  # fmt: skip


def qwen2_5_vl_config(shapes: Shapes) -> Qwen2_5VLConfig:
    """Qwen2.5-VL by the keys of a file of its own, in any of transformers' namings, with or without its vision tower.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    what, head_dim, vision_head = "Qwen2.5-VL encoder", 128, 80
    prefix = next((p for p in LANGUAGE if f"{p}embed_tokens.weight" in shapes), LANGUAGE[0])
    vocab, width = need(shapes, f"{prefix}embed_tokens.weight", what)
    rows = lambda name: need(shapes, f"{prefix}layers.0.{name}_proj.weight", what)[0]
    language = DecoderConfig(
        vocab_size=vocab, width=width, mlp=rows("mlp.gate"), layers=_layers(shapes, f"{prefix}layers.{{i}}"),
        heads=rows("self_attn.q") // head_dim, kv_heads=rows("self_attn.k") // head_dim,
    )  # fmt: skip
    prefix = next((p for p in VISION if f"{p}patch_embed.proj.weight" in shapes), None)
    if prefix is None:
        return Qwen2_5VLConfig(language, None)
    inner, channels, frames, patch, _ = shapes[f"{prefix}patch_embed.proj.weight"]
    merged = need(shapes, f"{prefix}merger.mlp.0.weight", what)[1]
    tower = Qwen2_5VisionConfig(
        width=inner, mlp=need(shapes, f"{prefix}blocks.0.mlp.gate_proj.weight", what)[0],
        layers=_layers(shapes, f"{prefix}blocks.{{i}}"), heads=inner // vision_head, channels=channels, patch=patch,
        frames=frames, merge=math.isqrt(merged // inner), out=need(shapes, f"{prefix}merger.mlp.2.weight", what)[0],
    )  # fmt: skip
    return Qwen2_5VLConfig(language, tower)


def llama_config(shapes: Shapes) -> DecoderConfig:
    """Llama 3 by the keys of a file of its own, in either of transformers' namings.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    what, head_dim = "Llama encoder", 128
    prefix = next((p for p in llama.PREFIXES if f"{p}embed_tokens.weight" in shapes), llama.PREFIXES[0])
    vocab, width = need(shapes, f"{prefix}embed_tokens.weight", what)
    rows = lambda name: need(shapes, f"{prefix}layers.0.{name}_proj.weight", what)[0]
    inner = rows("self_attn.q")
    return DecoderConfig(
        vocab_size=vocab, width=width, mlp=rows("mlp.gate"), layers=_layers(shapes, f"{prefix}layers.{{i}}"),
        heads=inner // head_dim, kv_heads=rows("self_attn.k") // head_dim,
        head_dim=None if inner == width else head_dim, eps=1e-5, qkv_bias=False, theta=5e5, sections=None,
    )  # fmt: skip


def llava_config(shapes: Shapes) -> LlavaConfig:
    """LLaVA by the keys of a file of its own, in the published naming.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    below = lambda prefix: {k[len(prefix) :]: v for k, v in shapes.items() if k.startswith(prefix)}
    tower = clip_vision_config(below("vision_tower."))
    tower = dataclasses.replace(tower, heads=max(1, tower.width // HEAD_DIM), act="quick_gelu")
    return LlavaConfig(llama_config(below("language_model.")), tower)
