"""Qwen2.5-VL: transformers' layout in its two namings, and Qwen2_5_VLConfig in its two forms (flat, as published, and
with a text_config). The output layer (`lm_head`) is not used: it is passed over, and not written back.
"""

from collections.abc import Mapping
from typing import Any

from convert import decoder, ops
from convert.table import Rule
from jdit.nn.text.decoder import DecoderConfig
from jdit.nn.text.qwen2_5_vl import Qwen2_5VLConfig
from jdit.nn.vision.qwen2_5_vl import Qwen2_5VisionConfig
from jdit.sharding import Rules

CLASS = "Qwen2_5_VLForConditionalGeneration"
LANGUAGE = ("model.", "model.language_model.", "language_model.")
VISION = ("visual.", "model.visual.")
"""Prefixes: those published, and transformers 5's (the last of LANGUAGE in the model without output layer)."""


def config(
    upstream: Mapping, *, vision: bool = True, dtype: str = "float32", rules: Rules = Rules()
) -> Qwen2_5VLConfig:
    """Read a config.json; absent keys take the defaults of transformers' Qwen2_5_VLConfig.

    Args:
        vision: False leaves out the vision tower; its tensors are then passed over.

    Raises:
        ValueError: another model type, sliding windows, or rotary positions of another kind; all findings.
    """
    text: Mapping[str, Any] = upstream.get("text_config") or upstream
    seen: Mapping[str, Any] = upstream.get("vision_config") or {}
    rope, rope_2d = decoder.rope_parameters(text), decoder.rope_parameters(seen)
    heads, layers = text.get("num_attention_heads", 64), text.get("num_hidden_layers", 80)
    problems = []
    if (kind := upstream.get("model_type", "qwen2_5_vl")) != "qwen2_5_vl":
        problems.append(f"model_type {kind!r}; 'qwen2_5_vl' is wanted")
    if rope["rope_type"] not in ("default", "mrope"):
        problems.append(f"rope_type={rope['rope_type']!r} is not supported; 'default' and 'mrope' are")
    if seen.get("rope_parameters") and rope_2d["rope_type"] not in ("axial", "default"):
        problems.append(f"vision_config.rope_type={rope_2d['rope_type']!r} is not supported; 'axial' is")
    sliding = text.get("use_sliding_window", False) and layers > text.get("max_window_layers", 80)
    if "sliding_attention" in (text.get("layer_types") or ()) or (sliding and not text.get("layer_types")):
        problems.append("use_sliding_window with layers that slide is not supported; only full attention is")
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(seen.get(key, 1), int):
            problems.append(f"vision_config.{key}={seen[key]!r} is not supported: one number is")
    if problems:
        raise ValueError("; ".join(problems))
    language = DecoderConfig(
        vocab_size=text.get("vocab_size", 152064),
        width=text.get("hidden_size", 8192),
        mlp=text.get("intermediate_size", 29568),
        layers=layers,
        heads=heads,
        kv_heads=text["num_key_value_heads"] or heads if "num_key_value_heads" in text else 8,
        act=text.get("hidden_act", "silu"),
        eps=text.get("rms_norm_eps", 1e-5),
        theta=float(rope.get("rope_theta", 1e6)),
        sections=tuple(rope.get("mrope_section", (16, 24, 24))),
    )
    tower = Qwen2_5VisionConfig(
        width=seen.get("hidden_size", 3584),
        mlp=seen.get("intermediate_size", 3420),
        layers=seen.get("depth", 32),
        heads=seen.get("num_heads", 16),
        channels=seen.get("in_channels", 3),
        patch=seen.get("patch_size", 14),
        frames=seen.get("temporal_patch_size", 2),
        merge=seen.get("spatial_merge_size", 2),
        window=seen.get("window_size", 112),
        full=tuple(seen.get("fullatt_block_indexes", (7, 15, 23, 31))),
        out=seen.get("out_hidden_size", 3584),
        act=seen.get("hidden_act", "silu"),
        theta=float(rope_2d.get("rope_theta", 1e4)),
    ) if vision else None  # fmt: skip
    return Qwen2_5VLConfig(language, tower, upstream.get("image_token_id", 151655), dtype, rules)


def upstream_config(cfg: Qwen2_5VLConfig) -> dict:
    """A config.json that transformers loads, in the published (flat) form."""
    text, seen = cfg.language, cfg.vision
    out: dict[str, Any] = {
        "architectures": [CLASS],
        "model_type": "qwen2_5_vl",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "hidden_act": text.act,
        "rms_norm_eps": text.eps,
        "rope_theta": text.theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.sections or ())},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "image_token_id": cfg.image_token_id,
    }
    if seen is not None:
        out["vision_config"] = {
            "model_type": "qwen2_5_vl",
            "hidden_size": seen.width,
            "intermediate_size": seen.mlp,
            "depth": seen.layers,
            "num_heads": seen.heads,
            "in_channels": seen.channels,
            "patch_size": seen.patch,
            "temporal_patch_size": seen.frames,
            "spatial_merge_size": seen.merge,
            "window_size": seen.window,
            "fullatt_block_indexes": list(seen.full),
            "out_hidden_size": seen.out,
            "hidden_act": seen.act,
        }
        if seen.theta != 1e4:
            out["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": seen.theta}
    return out


def _tower(cfg: Qwen2_5VisionConfig, prefix: str, *, alias: bool = False) -> list[Rule]:
    layers, layer, blocks = range(cfg.layers), prefix + "blocks.{i}.", "vision.blocks."
    patch = ops.patch_conv3d((cfg.frames, cfg.patch, cfg.patch), cfg.channels)
    out = [
        Rule(f"{prefix}patch_embed.proj.weight", "vision.patch.kernel", patch, alias=alias),
        Rule(f"{prefix}merger.ln_q.weight", "vision.norm.scale", alias=alias),
        Rule(f"{layer}attn.qkv.weight", f"{blocks}qkv.kernel", ops.fused_linear(3), (), layers, alias),
        Rule(f"{layer}attn.qkv.bias", f"{blocks}qkv.bias", ops.fused_bias(3), (), layers, alias),
        Rule(f"{layer}norm1.weight", f"{blocks}norm1.scale", ops.same, (), layers, alias),
        Rule(f"{layer}norm2.weight", f"{blocks}norm2.scale", ops.same, (), layers, alias),
    ]
    for name, path in (("mlp.0", "up"), ("mlp.2", "down")):
        out.append(Rule(f"{prefix}merger.{name}.weight", f"vision.merger.{path}.kernel", ops.linear, alias=alias))
        out.append(Rule(f"{prefix}merger.{name}.bias", f"vision.merger.{path}.bias", alias=alias))
    for name, path in (("attn.proj", "out"), ("mlp.down_proj", "mlp.down")):
        out.append(Rule(f"{layer}{name}.weight", f"{blocks}{path}.kernel", ops.linear, (), layers, alias))
        out.append(Rule(f"{layer}{name}.bias", f"{blocks}{path}.bias", ops.same, (), layers, alias))
    for n, name in enumerate(("gate", "up")):
        at = (slice(None), n)
        out.append(Rule(f"{layer}mlp.{name}_proj.weight", f"{blocks}mlp.up.kernel", ops.linear, at, layers, alias))
        out.append(Rule(f"{layer}mlp.{name}_proj.bias", f"{blocks}mlp.up.bias", ops.same, (n,), layers, alias))
    return out


def rules(cfg: Qwen2_5VLConfig) -> list[Rule]:
    """Every naming is read, the published one is written. Without vision tower, its tensors are passed over."""
    out = [Rule("lm_head.weight", None)]
    for n, prefix in enumerate(LANGUAGE):
        out += decoder.rules(cfg.language, prefix, "language.", alias=n > 0)
    for n, prefix in enumerate(VISION):
        tower = _tower(cfg.vision or Qwen2_5VisionConfig(), prefix, alias=n > 0)
        out += tower if cfg.vision else [r._replace(target=None, layers=None) for r in tower]
    return out
