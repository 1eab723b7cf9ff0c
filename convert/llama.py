"""Llama language models as text encoders: LlamaConfig in its published forms, and the keys of LlamaModel and
LlamaForCausalLM. The output layer (`lm_head`) is not used: it is passed over, and not written back.
"""

from collections.abc import Mapping
from typing import Any

from convert import decoder
from convert.table import Rule
from jdit.nn.text.decoder import DecoderConfig, RopeScaling
from jdit.sharding import Rules

CLASS, CAUSAL = "LlamaModel", "LlamaForCausalLM"
PREFIXES = ("", "model.")
"""Of the keys in files of the two classes."""
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config(upstream: Mapping[str, Any], *, dtype: str = "float32", rules: Rules = Rules()) -> DecoderConfig:
    """Read a config.json; absent keys take the defaults of transformers' LlamaConfig.

    Raises:
        ValueError: another model type, biases, or rotary positions of another kind; all findings.
    """
    get, rope = upstream.get, decoder.rope_parameters(upstream)
    kind, problems = rope["rope_type"], []
    if (model := get("model_type", "llama")) != "llama":
        problems.append(f"model_type {model!r}; 'llama' is wanted")
    problems += [f"{name}=True is not supported" for name in ("attention_bias", "mlp_bias") if get(name)]
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type={kind!r} is not supported; 'default' and 'llama3' are")
    if (part := rope.get("partial_rotary_factor") or 1) != 1:
        problems.append(f"partial_rotary_factor={part} is not supported; 1 is")
    if kind == "llama3":
        rope.setdefault(_SCALING[-1], get("max_position_embeddings", 2048))
        problems += [f"rope_type 'llama3' without {name}" for name in _SCALING if rope.get(name) is None]
    if problems:
        raise ValueError("; ".join(problems))
    heads = get("num_attention_heads", 32)
    return DecoderConfig(
        vocab_size=get("vocab_size", 32000),
        width=get("hidden_size", 4096),
        mlp=get("intermediate_size", 11008),
        layers=get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=get("num_key_value_heads") or heads,
        head_dim=get("head_dim"),
        act=get("hidden_act", "silu"),
        eps=get("rms_norm_eps", 1e-6),
        qkv_bias=False,
        theta=float(rope.get("rope_theta") or 1e4),
        sections=None,
        scaling=RopeScaling(*(float(rope[name]) for name in _SCALING)) if kind == "llama3" else None,
        dtype=dtype,
        rules=rules,
    )


def upstream_config(cfg: DecoderConfig) -> dict[str, Any]:
    """A config.json that transformers loads."""
    scaling = None if cfg.scaling is None else {"rope_type": "llama3", **dict(zip(_SCALING, cfg.scaling))}
    return {
        "architectures": [CLASS],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head,
        "hidden_act": cfg.act,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
    }


def rules(cfg: DecoderConfig) -> list[Rule]:
    """The keys of both classes are read, those of LlamaModel are written."""
    out = [Rule("lm_head.weight", None)]
    for n, prefix in enumerate(PREFIXES):
        out += decoder.rules(cfg, prefix, alias=n > 0)
    return out
