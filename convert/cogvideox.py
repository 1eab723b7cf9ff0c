"""CogVideoX's transformer: config and RULES of the diffusers layout and of the original (SAT) releases."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from convert import fields, ops
from convert.table import ALL, ConversionError, Rule
from jdit.nn.cogvideox import CogVideoXConfig
from jdit.sharding import Rules

CLASS = "CogVideoXTransformer3DModel"
_FIELDS = {  # upstream's name -> ours
    "num_attention_heads": "heads", "attention_head_dim": "head_dim", "in_channels": "in_channels",
    "out_channels": "out_channels", "time_embed_dim": "time_dim", "ofs_embed_dim": "ofs_dim",
    "text_embed_dim": "text_dim", "num_layers": "layers", "attention_bias": "attention_bias",
    "sample_width": "sample_width", "sample_height": "sample_height", "sample_frames": "sample_frames",
    "patch_size": "patch", "patch_size_t": "patch_frames", "temporal_compression_ratio": "time_factor",
    "max_text_seq_length": "text_tokens", "activation_fn": "act", "norm_elementwise_affine": "affine",
    "norm_eps": "eps", "spatial_interpolation_scale": "space_scale", "temporal_interpolation_scale": "time_scale",
    "use_rotary_positional_embeddings": "rotary", "use_learned_positional_embeddings": "learned",
    "patch_bias": "patch_bias",
}  # fmt: skip
_FIXED = {"flip_sin_to_cos": True, "freq_shift": 0, "timestep_activation_fn": "silu"}
_UNREAD = {"dropout": 0.0}  # of training


def config(upstream: Mapping, *, dtype: str = "float32", rules: Rules = Rules()) -> CogVideoXConfig:
    """CogVideoXConfig of a config.json of CogVideoXTransformer3DModel; absent fields take upstream's defaults.

    Raises:
        ValueError: a field that is not known, or a value that is not supported.
    """
    null = ("ofs_embed_dim", "patch_size_t")
    values = fields.read(CLASS, upstream, _FIELDS, fixed=_FIXED, unread=_UNREAD, null=null)
    values["ofs_dim"] = values.get("ofs_dim") or None  # upstream takes 0 for none, too
    try:
        return CogVideoXConfig(**values, dtype=dtype, rules=rules)
    except ValueError as e:
        raise ValueError(f"{CLASS}: {e}") from None


def upstream_config(cfg: CogVideoXConfig) -> dict:
    """The config.json that diffusers reads."""
    out: dict[str, Any] = {up: getattr(cfg, ours) for up, ours in _FIELDS.items()}
    return {"_class_name": CLASS, **out, **_FIXED, **_UNREAD}


def _dense(source: str, target: str, op=ops.linear, bias: ops.Op = ops.same, **kw) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", op, **kw),
        Rule(f"{source}.bias", f"{target}.bias", bias, **kw),
    ]


def _norm(source: str, target: str, **kw) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale", **kw), Rule(f"{source}.bias", f"{target}.bias", **kw)]


EDGES = {  # ours -> names in CogVideoXTransformer3DModel
    "patch": "patch_embed.proj", "text": "patch_embed.text_proj", "time": "time_embedding.linear_1",
    "time_2": "time_embedding.linear_2", "ofs": "ofs_embedding.linear_1", "ofs_2": "ofs_embedding.linear_2",
    "norm": "norm_final", "final_norm": "norm_out.norm", "final_mod": "norm_out.linear", "final": "proj_out",
    "pos": "patch_embed.pos_embedding",
}  # fmt: skip
ORIGINAL_EDGES = {
    "patch": "mixins.patch_embed.proj", "text": "mixins.patch_embed.text_proj", "time": "time_embed.0",
    "time_2": "time_embed.2", "ofs": "ofs_embed.0", "ofs_2": "ofs_embed.2", "norm": "transformer.final_layernorm",
    "final_norm": "mixins.final_layer.norm_final", "final_mod": "mixins.final_layer.adaLN_modulation.1",
    "final": "mixins.final_layer.linear", "pos": "mixins.pos_embed.pos_embedding",
}  # fmt: skip


def _edges(cfg: CogVideoXConfig, n: Mapping[str, str]) -> list[Rule]:
    patch, size = cfg.patch_3d, (cfg.patch_3d, cfg.out_channels)
    into = ops.patch_conv(cfg.patch, cfg.in_channels)
    if cfg.patch_frames is not None:
        into = ops.patch_linear(patch, cfg.in_channels)
    out = [
        *_dense(n["patch"], "patch", into), *_dense(n["text"], "text"),
        *_dense(n["time"], "time.up"), *_dense(n["time_2"], "time.down"),
        *_dense(n["final_mod"], "final_mod", ops.fused_linear(2), ops.fused_bias(2)),
        *_dense(n["final"], "final", ops.patch_linear_out(*size), ops.patch_bias(*size)),
    ]  # fmt: skip
    if cfg.ofs_dim is not None:
        out += [*_dense(n["ofs"], "ofs.up"), *_dense(n["ofs_2"], "ofs.down")]
    if cfg.affine:
        out += [*_norm(n["norm"], "norm"), *_norm(n["final_norm"], "final_norm")]
    if cfg.learned:
        out.append(Rule(n["pos"], "pos", ops.reshape((-1, cfg.width), (1, -1, cfg.width))))
    return out


def rules(cfg: CogVideoXConfig) -> list[Rule]:
    """RULES of the diffusers layout."""
    at, block = range(cfg.layers), "transformer_blocks.{i}"
    out = [
        *_edges(cfg, EDGES),
        *_dense(f"{block}.attn1.to_out.0", "blocks.attn.out", layers=at),
        *_dense(f"{block}.ff.net.0.proj", "blocks.mlp.up", layers=at),
        *_dense(f"{block}.ff.net.2", "blocks.mlp.down", layers=at),
    ]
    for n, name in enumerate(("norm1", "norm2")):
        part, six = slice(6 * n, 6 * n + 6), f"{block}.{name}.linear"
        out.append(Rule(f"{six}.weight", "blocks.mod.kernel", ops.fused_linear(6), (ALL, part), at))
        out.append(Rule(f"{six}.bias", "blocks.mod.bias", ops.fused_bias(6), (part,), at))
        out += _norm(f"{block}.{name}.norm", f"blocks.{name}", layers=at) if cfg.affine else []
    for n, x in enumerate("qkv"):
        to = f"{block}.attn1.to_{x}"
        out.append(Rule(f"{to}.weight", "blocks.attn.qkv.kernel", ops.linear, (ALL, n), at))
        if cfg.attention_bias:
            out.append(Rule(f"{to}.bias", "blocks.attn.qkv.bias", ops.same, (n,), at))
    return out + [r for x in "qk" for r in _norm(f"{block}.attn1.norm_{x}", f"blocks.attn.norm_{x}", layers=at)]


_ORDER = (0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11)
"""Where our modulation's parts, those of attention before those of the MLP, are among the original's, those of video
before those of text."""
_COMPUTED = ("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos", "transformer.position_embeddings.weight",
             "transformer.word_embeddings.weight")  # fmt: skip


def original_rules(cfg: CogVideoXConfig) -> list[Rule]:
    """RULES of the original releases, keys without their `model.diffusion_model.` prefix."""
    at, block, mixin = range(cfg.layers), "transformer.layers.{i}", "mixins.adaln_layer"
    mod = (ops.fused_linear_in(_ORDER), ops.fused_bias_in(_ORDER))
    out = [
        *_edges(cfg, ORIGINAL_EDGES),
        *_dense(f"{block}.attention.query_key_value", "blocks.attn.qkv", ops.fused_linear(3), ops.fused_bias(3),
                layers=at),
        *_dense(f"{block}.attention.dense", "blocks.attn.out", layers=at),
        *_dense(f"{block}.mlp.dense_h_to_4h", "blocks.mlp.up", layers=at),
        *_dense(f"{block}.mlp.dense_4h_to_h", "blocks.mlp.down", layers=at),
        *_dense(f"{mixin}.adaLN_modulations.{{i}}.1", "blocks.mod", *mod, layers=at),
        *_norm(f"{block}.input_layernorm", "blocks.norm1", layers=at),
        *_norm(f"{block}.post_attention_layernorm", "blocks.norm2", layers=at),
        *_norm(f"{mixin}.query_layernorm_list.{{i}}", "blocks.attn.norm_q", layers=at),
        *_norm(f"{mixin}.key_layernorm_list.{{i}}", "blocks.attn.norm_k", layers=at),
    ]  # fmt: skip
    unused = _COMPUTED if cfg.learned else (*_COMPUTED, ORIGINAL_EDGES["pos"])
    return out + [Rule(key, None) for key in unused]


_WIDTHS = {1920: False, 3072: True}
"""Of the published 2B and 5B: whether positions are rotary."""


def original_config(
    shapes: Mapping[str, Sequence[int]], *, dtype: str = "float32", rules: Rules = Rules()
) -> CogVideoXConfig:
    """The architecture of an original release, read off its shapes; sizes that positions are laid out for are those of
    the published models, since shapes do not tell them.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing, or positions cannot be told.
    """
    at = ORIGINAL_EDGES
    try:
        width, *into = shapes[f"{at['patch']}.weight"]
        head_dim = shapes["mixins.adaln_layer.query_layernorm_list.0.weight"][0]
        time, text = shapes[f"{at['time']}.weight"][0], shapes[f"{at['text']}.weight"][1]
        out = shapes[f"{at['final']}.weight"][0]
    except KeyError as e:
        raise ConversionError(f"not a CogVideoX transformer: tensor {e.args[0]} is missing") from None
    new = len(into) == 1  # 1.5: dense patches of two frames
    patch = 2 if new else into[1]
    channels, out = (into[0] // 8, out // 8) if new else (into[0], out // patch**2)
    learned, tables = not new and channels != out, {k for k in shapes if k.startswith("mixins.pos_embed.freqs_")}
    rotary = new or learned or bool(tables)
    if not rotary and at["pos"] not in shapes:
        if width not in _WIDTHS:
            raise ConversionError(
                f"CogVideoX of width {width}: neither {at['pos']} nor rotary tables tell its positions"
            )
        rotary = _WIDTHS[width]
    sample: dict[str, Any] = dict(sample_width=300, sample_height=300, sample_frames=81, patch_frames=2) if new else {}
    return CogVideoXConfig(
        heads=width // head_dim, head_dim=head_dim, in_channels=channels, out_channels=out, time_dim=time,
        text_dim=text, ofs_dim=time if f"{at['ofs']}.weight" in shapes else None,
        layers=1 + max(int(m[1]) for k in shapes if (m := re.match(r"transformer\.layers\.(\d+)\.", k))),
        attention_bias="transformer.layers.0.attention.query_key_value.bias" in shapes, patch=patch,
        rotary=rotary, learned=learned, patch_bias=not new, dtype=dtype, rules=rules, **sample,
    )  # fmt: skip


def complete(configs: Mapping[str, Any]) -> dict[str, Any]:
    """The autoencoder's scale, which only the transformer beside it tells: 2B's is the default, 5B's and 1.5's is 0.7,
    and 1.5 was trained with pictures scaled the wrong way round."""
    if not {"transformer", "vae"} <= configs.keys():
        return {}
    cfg, vae = configs["transformer"], configs["vae"]
    scale = 0.7 if cfg.rotary else vae.scale
    return {"vae": dataclasses.replace(vae, scale=scale, invert_scale=cfg.patch_frames is not None)}


def pipeline(configs: Mapping[str, Any]) -> str:
    """Upstream's pipeline class."""
    cfg = configs.get("transformer")
    pictured = cfg is not None and cfg.in_channels != cfg.out_channels
    return "CogVideoXImageToVideoPipeline" if pictured else "CogVideoXPipeline"
