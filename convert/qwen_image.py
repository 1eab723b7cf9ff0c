"""Qwen-Image's transformer: config and RULES. Single files, ComfyUI's among them, have the names of diffusers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from convert import fields, ops
from convert.table import ALL, ConversionError, Rule
from jdit.nn.qwen_image import QwenImageConfig
from jdit.sharding import Rules

CLASS = "QwenImageTransformer2DModel"
ZERO_COND_T = "__index_timestep_zero__"
"""ComfyUI's mark of a transformer with zero_cond_t (Edit-2511): a tensor without meaning."""
KINDS = "time_text_embed.addition_t_embedding.weight"
_FIELDS = {  # upstream's name -> ours
    "patch_size": "patch", "in_channels": "in_channels", "out_channels": "out_channels", "num_layers": "layers",
    "attention_head_dim": "head_dim", "num_attention_heads": "heads", "joint_attention_dim": "text_dim",
    "axes_dims_rope": "rope_dims", "zero_cond_t": "zero_cond_t", "use_additional_t_cond": "added_t",
    "use_layer3d_rope": "layered",
}  # fmt: skip
_FIXED = {"guidance_embeds": False}  # upstream's class has no weights for it
_UNREAD = ("pooled_projection_dim",)  # in the first releases' configs; no class has read it


def config(upstream: Mapping, *, dtype: str = "float32", rules: Rules = Rules()) -> QwenImageConfig:
    """QwenImageConfig of a config.json of QwenImageTransformer2DModel; absent fields take upstream's defaults.

    Raises:
        ValueError: a field that is not known, or a value that is not supported.
    """
    values = fields.read(CLASS, upstream, _FIELDS, fixed=_FIXED, unread=_UNREAD, null=("out_channels",))
    packed, size = values.get("in_channels", 64), values.get("patch", 2) ** 2
    if packed % size:
        raise ValueError(f"{CLASS}: in_channels={packed} must be a multiple of patch_size^2 = {size}")
    values["in_channels"] = packed // size
    values["rope_dims"] = tuple(values.get("rope_dims", QwenImageConfig.rope_dims))
    values["out_channels"] = values.get("out_channels", QwenImageConfig.out_channels) or packed  # upstream: or, too
    try:
        return QwenImageConfig(**values, dtype=dtype, rules=rules)
    except ValueError as e:
        raise ValueError(f"{CLASS}: {e}") from None


def upstream_config(cfg: QwenImageConfig) -> dict:
    """The config.json that diffusers reads."""
    out: dict[str, Any] = {up: getattr(cfg, ours) for up, ours in _FIELDS.items()}
    return {"_class_name": CLASS, **out, "in_channels": cfg.in_channels * cfg.patch**2, **_FIXED}


def _dense(source: str, target: str, op=ops.linear, bias: ops.Op = ops.same, **kw) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", op, **kw),
        Rule(f"{source}.bias", f"{target}.bias", bias, **kw),
    ]


STREAMS = {  # ours -> queries, keys, values; norms; output; the rest in QwenImageTransformerBlock
    "image": (["to_q", "to_k", "to_v"], ["norm_q", "norm_k"], "to_out.0", "img"),
    "context": (["add_q_proj", "add_k_proj", "add_v_proj"], ["norm_added_q", "norm_added_k"], "to_add_out", "txt"),
}


def rules(cfg: QwenImageConfig) -> list[Rule]:
    """RULES of the diffusers layout."""
    at, block, patch = range(cfg.layers), "transformer_blocks.{i}", cfg.patch_3d
    time, out = "time_text_embed.timestep_embedder", (patch, cfg.out_channels)
    table = [
        *_dense("img_in", "patch", ops.patch_linear(patch, cfg.in_channels)),
        *_dense(f"{time}.linear_1", "time.up"),
        *_dense(f"{time}.linear_2", "time.down"),
        Rule("txt_norm.weight", "text_norm.scale"),
        *_dense("txt_in", "text"),
        *_dense("norm_out.linear", "final_mod", ops.fused_linear_reversed(2), ops.fused_bias_reversed(2)),
        *_dense("proj_out", "final", ops.patch_linear_out(*out), ops.patch_bias(*out)),
    ]
    if cfg.added_t:
        table.append(Rule(KINDS, "kinds"))
    for ours, (qkv, norms, merge, rest) in STREAMS.items():
        target, attn = f"blocks.{ours}", f"{block}.attn"
        table += _dense(f"{block}.{rest}_mod.1", f"{target}.mod", ops.fused_linear(6), ops.fused_bias(6), layers=at)
        for i, name in enumerate(qkv):
            table.append(Rule(f"{attn}.{name}.weight", f"{target}.attn.qkv.kernel", ops.linear, (ALL, i), at))
            table.append(Rule(f"{attn}.{name}.bias", f"{target}.attn.qkv.bias", ops.same, (i,), at))
        for x, name in zip("qk", norms):
            table.append(Rule(f"{attn}.{name}.weight", f"{target}.attn.norm_{x}.scale", layers=at))
        table += _dense(f"{attn}.{merge}", f"{target}.attn.out", layers=at)
        table += _dense(f"{block}.{rest}_mlp.net.0.proj", f"{target}.mlp.up", layers=at)
        table += _dense(f"{block}.{rest}_mlp.net.2", f"{target}.mlp.down", layers=at)
    return table


def marks(cfg: QwenImageConfig) -> tuple[str, ...]:
    """Tensors of single files that say something by being there."""
    return (ZERO_COND_T,) if cfg.zero_cond_t else ()


def original_rules(cfg: QwenImageConfig) -> list[Rule]:
    """RULES of single files, keys without their prefix."""
    return [*rules(cfg), *(Rule(mark, None) for mark in marks(cfg))]


def original_config(
    shapes: Mapping[str, Sequence[int]], *, dtype: str = "float32", rules: Rules = Rules()
) -> QwenImageConfig:
    """The architecture of a single file, read off its shapes (it carries no config): patches of 2, and rotary
    positions that split a head as the releases' do.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    try:
        width, packed = shapes["img_in.weight"]
        head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        out, text = shapes["proj_out.weight"][0], shapes["txt_in.weight"][1]
    except KeyError as e:
        raise ConversionError(f"not a Qwen-Image transformer: tensor {e.args[0]} is missing") from None
    found = [int(m[1]) for k in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.", k))]
    return QwenImageConfig(
        in_channels=packed // 4, out_channels=out // 4, layers=1 + max(found), heads=width // head_dim,
        head_dim=head_dim, text_dim=text, rope_dims=(head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16),
        zero_cond_t=ZERO_COND_T in shapes, added_t=KINDS in shapes, layered=KINDS in shapes, dtype=dtype, rules=rules,
    )  # fmt: skip
