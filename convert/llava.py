"""LLaVA: transformers' layout in its namings, and LlavaConfig. The output layer (`lm_head`) is not used: it is passed
over, and not written back.
"""

from collections.abc import Mapping
from typing import Any

from convert import clip_vision, decoder, llama, ops
from convert.table import Rule
from jdit.nn.text.llava import LlavaConfig
from jdit.nn.vision.clip import CLIP_L_336
from jdit.sharding import Rules

CLASS = "LlavaForConditionalGeneration"
LANGUAGE = ("language_model.model.", "model.language_model.", "language_model.")
OTHERS = ("", "model.")
"""Prefixes of the language model, and of vision tower and projector: those published, and transformers 5's (the last of
LANGUAGE in the model without output layer)."""
TOKENS = {"default": False, "full": True}
"""Strategies of selecting a picture's tokens: whether the tower's class token is among them."""


def config(upstream: Mapping, *, dtype: str = "float32", rules: Rules = Rules()) -> LlavaConfig:
    """Read a config.json; absent keys take the defaults of transformers' LlavaConfig.

    Raises:
        ValueError: parts of other kinds, several feature layers, a projector without biases, or what the parts refuse;
            all findings.
    """
    text: Mapping[str, Any] = upstream.get("text_config") or {}
    seen: Mapping[str, Any] = upstream.get("vision_config") or clip_vision.upstream_config(CLIP_L_336)
    layer = upstream.get("vision_feature_layer", -2)
    strategy = upstream.get("vision_feature_select_strategy", "default")
    problems = []
    for name, part, kind in (("text_config", text, "llama"), ("vision_config", seen, "clip_vision_model")):
        if part.get("model_type", kind) != kind:
            problems.append(f"{name}.model_type={part['model_type']!r} is not supported; {kind!r} is")
    if not isinstance(layer, int):
        problems.append(f"vision_feature_layer={layer!r} is not supported: one number is")
    if strategy not in TOKENS:
        problems.append(f"vision_feature_select_strategy={strategy!r}; there are {', '.join(TOKENS)}")
    if not upstream.get("multimodal_projector_bias", True):
        problems.append("multimodal_projector_bias=False is not supported; True is")
    if problems:
        raise ValueError("; ".join(problems))
    return LlavaConfig(
        language=llama.config(text),
        vision=clip_vision.config(seen, architecture=clip_vision.PLAIN),
        image_token_id=upstream.get("image_token_index", upstream.get("image_token_id", 32000)),
        pad_token_id=upstream.get("pad_token_id"),
        feature_layer=layer,
        class_token=TOKENS[strategy],
        act=upstream.get("projector_hidden_act", "gelu"),
        dtype=dtype,
        rules=rules,
    )


def upstream_config(cfg: LlavaConfig) -> dict:
    """A config.json that transformers loads."""
    return {
        "architectures": [CLASS],
        "model_type": "llava",
        "text_config": llama.upstream_config(cfg.language),
        "vision_config": clip_vision.upstream_config(cfg.vision),
        "image_token_index": cfg.image_token_id,
        "pad_token_id": cfg.pad_token_id,
        "image_seq_length": cfg.tokens,
        "vision_feature_layer": cfg.feature_layer,
        "vision_feature_select_strategy": next(k for k, v in TOKENS.items() if v == cfg.class_token),
        "projector_hidden_act": cfg.act,
    }


def rules(cfg: LlavaConfig) -> list[Rule]:
    """Every naming is read, the published one is written."""
    out = [Rule("lm_head.weight", None), Rule("language_model.lm_head.weight", None)]
    for n, prefix in enumerate(LANGUAGE):
        out += decoder.rules(cfg.language, prefix, "language.", alias=n > 0)
    for n, prefix in enumerate(OTHERS):
        for rule in clip_vision.rules(cfg.vision):
            name, path = f"{prefix}vision_tower.{rule.source}", rule.target and f"vision.{rule.target}"
            out.append(rule._replace(source=name, target=path, alias=rule.alias or n > 0))
        for name, path in (("linear_1", "projector.up"), ("linear_2", "projector.down")):
            name = f"{prefix}multi_modal_projector.{name}"
            out.append(Rule(f"{name}.weight", f"{path}.kernel", ops.linear, alias=n > 0))
            out.append(Rule(f"{name}.bias", f"{path}.bias", alias=n > 0))
    return out
