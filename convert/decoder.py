"""Language models of transformers' Llama kin (Qwen2.5, Llama 3): the part that their layouts and configs share."""

from collections.abc import Mapping
from typing import Any

from convert import ops
from convert.table import ALL, Rule
from jdit.nn.text.decoder import DecoderConfig


def rope_parameters(get: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of a config, which older releases keep apart (rope_theta) and under two names."""
    found = dict(get.get("rope_parameters") or get.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    if "rope_theta" not in found and get.get("rope_theta") is not None:
        found["rope_theta"] = get["rope_theta"]
    return found


def rules(cfg: DecoderConfig, prefix: str, path: str = "", *, alias: bool = False) -> list[Rule]:
    """Rules of a decoder without its output layer.

    Args:
        prefix: of upstream's keys ("model."). path: of ours ("language.").
    """
    layers, layer = range(cfg.layers), prefix + "layers.{i}."
    blocks = f"{path}blocks."
    out = [
        Rule(f"{prefix}embed_tokens.weight", f"{path}tokens.embedding", alias=alias),
        Rule(f"{prefix}norm.weight", f"{path}norm.scale", alias=alias),
        Rule(f"{layer}input_layernorm.weight", f"{blocks}norm1.scale", ops.same, (), layers, alias),
        Rule(f"{layer}post_attention_layernorm.weight", f"{blocks}norm2.scale", ops.same, (), layers, alias),
        Rule(f"{layer}self_attn.q_proj.weight", f"{blocks}q.kernel", ops.linear, (), layers, alias),
        Rule(f"{layer}self_attn.o_proj.weight", f"{blocks}out.kernel", ops.linear, (), layers, alias),
        Rule(f"{layer}mlp.down_proj.weight", f"{blocks}mlp.down.kernel", ops.linear, (), layers, alias),
    ]
    for n, name in enumerate("kv"):
        attn = f"{layer}self_attn.{name}_proj"
        out.append(Rule(f"{attn}.weight", f"{blocks}kv.kernel", ops.linear, (ALL, n), layers, alias))
        if cfg.qkv_bias:
            out.append(Rule(f"{attn}.bias", f"{blocks}kv.bias", ops.same, (n,), layers, alias))
    if cfg.qkv_bias:
        out.append(Rule(f"{layer}self_attn.q_proj.bias", f"{blocks}q.bias", ops.same, (), layers, alias))
    for n, name in enumerate(("gate", "up")):
        out.append(
            Rule(f"{layer}mlp.{name}_proj.weight", f"{blocks}mlp.up.kernel", ops.linear, (ALL, n), layers, alias)
        )
    return [*out, Rule(f"{layer}self_attn.rotary_emb.inv_freq", None)]  # a buffer of older releases
