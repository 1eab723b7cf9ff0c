"""T5 and UMT5 encoders: transformers' layout, the copies inside single-file releases, and Wan's own naming of UMT5
(models_t5_umt5-xxl-enc-bf16.pth).

fp8 files need nothing here: the reader multiplies `scale_weight` in and drops the `scaled_fp8` marker.
"""

from collections.abc import Mapping
from typing import Any

from convert import ops
from convert.table import ALL, Rule
from jdit.nn.text.t5 import T5Config
from jdit.sharding import Rules

DEFAULTS = {
    "t5": {"vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"},
    "umt5": {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
}
"""Class defaults of transformers' T5Config and UMT5Config where they differ."""

BUCKETS = "relative_attention_num_buckets"
DISTANCE = "relative_attention_max_distance"
ALIASES = {"d_model": "hidden_size", "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers",
           "d_kv": "head_dim"}  # fmt: skip
"""Second names of keys (transformers' attribute_map)."""
UMT5 = "UMT5EncoderModel"
KEYS = ("encoder.block.{i}.layer.0.SelfAttention.q.weight",)
SECOND_BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
"""Keys that tell transformers' naming, and UMT5 (a bias in every layer) from T5."""


def config(
    upstream: Mapping, *, architecture: str | None = None, dtype: str = "float32", rules: Rules = Rules()
) -> T5Config:
    """Read a config.json; absent keys take the defaults of transformers' T5Config or UMT5Config.

    Args:
        architecture: upstream class, where model_index.json names it; it tells T5 from UMT5 if the config does not.

    Raises:
        ValueError: another model type, a decoder, or an activation that is not known.
    """
    name = architecture or (upstream.get("architectures") or [""])[0]
    kind = upstream.get("model_type") or ("umt5" if name.startswith("UMT5") else "t5")
    if kind not in DEFAULTS:
        raise ValueError(f"model_type {kind!r}; T5 encoders are {list(DEFAULTS)}")
    if upstream.get("is_decoder"):
        raise ValueError("is_decoder=True is not supported: only encoders (False) are")
    defaults: dict[str, Any] = DEFAULTS[kind]
    get = lambda key, default=None: upstream.get(key, upstream.get(ALIASES.get(key), defaults.get(key, default)))
    proj: str = get("feed_forward_proj")
    exceptions = {"gated-gelu": "gelu_new", "gated-gelu_python": "gelu"}  # gated-gelu means the tanh form
    act = exceptions.get(proj) or proj.removeprefix("gated-")
    return T5Config(
        vocab_size=get("vocab_size"),
        width=get("d_model", 512),
        kv=get("d_kv", 64),
        heads=get("num_heads"),
        mlp=get("d_ff"),
        layers=get("num_layers"),
        buckets=get(BUCKETS, 32),
        max_distance=get(DISTANCE, 128),
        eps=get("layer_norm_epsilon", 1e-6),
        gated=get("is_gated_act", proj.startswith("gated-")),
        act=get("dense_act_fn", act),
        shared_bias=kind == "t5",
        dtype=dtype,
        rules=rules,
    )


def upstream_config(cfg: T5Config) -> dict:
    """A config.json that transformers loads."""
    proj = f"gated-{cfg.act}" if cfg.gated else cfg.act
    proj = {"gated-gelu_new": "gated-gelu", "gated-gelu": "gated-gelu_python"}.get(proj, proj)
    return {
        "architectures": ["T5EncoderModel" if cfg.shared_bias else UMT5],
        "model_type": "t5" if cfg.shared_bias else "umt5",
        "vocab_size": cfg.vocab_size,
        "d_model": cfg.width,
        "d_kv": cfg.kv,
        "d_ff": cfg.mlp,
        "num_layers": cfg.layers,
        "num_heads": cfg.heads,
        BUCKETS: cfg.buckets,
        DISTANCE: cfg.max_distance,
        "layer_norm_epsilon": cfg.eps,
        "feed_forward_proj": proj,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def rules(cfg: T5Config, prefix: str = "") -> list[Rule]:
    """Rules of T5EncoderModel or UMT5EncoderModel, every key with `prefix` before it."""
    layers = range(cfg.layers)
    attn, ff = prefix + "encoder.block.{i}.layer.0.", prefix + "encoder.block.{i}.layer.1."
    bias = "SelfAttention.relative_attention_bias.weight"
    out = [
        Rule(f"{prefix}shared.weight", "tokens.embedding"),
        Rule(f"{prefix}encoder.embed_tokens.weight", "tokens.embedding", alias=True),
        Rule(f"{prefix}encoder.final_layer_norm.weight", "norm.scale"),
        Rule(f"{prefix}encoder.block.0.layer.0.{bias}", "bias.table") if cfg.shared_bias
        else Rule(f"{attn}{bias}", "blocks.bias.table", layers=layers),
        Rule(f"{attn}SelfAttention.o.weight", "blocks.out.kernel", ops.linear, layers=layers),
        Rule(f"{attn}layer_norm.weight", "blocks.norm1.scale", layers=layers),
        Rule(f"{ff}DenseReluDense.wo.weight", "blocks.down.kernel", ops.linear, layers=layers),
        Rule(f"{ff}layer_norm.weight", "blocks.norm2.scale", layers=layers),
    ]  # fmt: skip
    for n, name in enumerate("qkv"):
        out.append(Rule(f"{attn}SelfAttention.{name}.weight", "blocks.qkv.kernel", ops.linear, (ALL, n), layers))
    for n, name in enumerate(("wi_0", "wi_1") if cfg.gated else ("wi",)):
        out.append(Rule(f"{ff}DenseReluDense.{name}.weight", "blocks.up.kernel", ops.linear, (ALL, n), layers))
    return out


def original_rules(cfg: T5Config, prefix: str = "") -> list[Rule]:
    """The encoder inside a single-file release: `text_encoders.t5xxl.transformer.`, or a file of its own.

    Such files may carry a logit scale of no use and the tokenizer as bytes.
    """
    outer = prefix.removesuffix("transformer.")
    extra = [Rule(name, None) for name in sorted({f"{prefix}spiece_model", f"{outer}spiece_model"})]
    return [*rules(cfg, prefix), Rule(f"{outer}logit_scale", None), *extra]


def umt5_rules(cfg: T5Config, prefix: str = "") -> list[Rule]:
    """Rules of a UMT5 file in either naming; Wan's is written back."""
    layers, block = range(cfg.layers), prefix + "blocks.{i}."
    bias = "pos_embedding.embedding.weight"
    out = [
        Rule(f"{prefix}token_embedding.weight", "tokens.embedding"),
        Rule(f"{prefix}norm.weight", "norm.scale"),
        Rule(prefix + bias, "bias.table") if cfg.shared_bias
        else Rule(block + bias, "blocks.bias.table", layers=layers),
        Rule(f"{block}attn.o.weight", "blocks.out.kernel", ops.linear, layers=layers),
        Rule(f"{block}norm1.weight", "blocks.norm1.scale", layers=layers),
        Rule(f"{block}ffn.fc2.weight", "blocks.down.kernel", ops.linear, layers=layers),
        Rule(f"{block}norm2.weight", "blocks.norm2.scale", layers=layers),
    ]  # fmt: skip
    for n, name in enumerate("qkv"):
        out.append(Rule(f"{block}attn.{name}.weight", "blocks.qkv.kernel", ops.linear, (ALL, n), layers))
    for n, name in enumerate(("gate.0", "fc1")):
        out.append(Rule(f"{block}ffn.{name}.weight", "blocks.up.kernel", ops.linear, (ALL, n), layers))
    return out + [r._replace(alias=True) if r.target else r for r in original_rules(cfg, prefix)]
