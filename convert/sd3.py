"""Stable Diffusion 3's transformer: config and RULES of the diffusers layout and of the original single files."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from convert import fields, ops
from convert.table import ALL, ConversionError, Rule
from jdit.nn.mmdit import Group, MMDiTConfig
from jdit.sharding import Rules

_FIELDS = {  # upstream's name -> ours
    "sample_size": "sample_size", "patch_size": "patch", "in_channels": "in_channels", "out_channels": "out_channels",
    "num_layers": "layers", "num_attention_heads": "heads", "attention_head_dim": "head_dim",
    "joint_attention_dim": "joint_dim", "pooled_projection_dim": "pooled_dim", "pos_embed_max_size": "pos_size",
    "dual_attention_layers": "dual_layers", "qk_norm": "qk_norm",
}  # fmt: skip


def config(upstream: dict, *, dtype: str = "float32", rules: Rules = Rules()) -> MMDiTConfig:
    """MMDiTConfig of a config.json of SD3Transformer2DModel; absent fields take upstream's defaults.

    Raises:
        ValueError: a field that is not known, or a value that is not supported.
    """
    values = fields.read("SD3Transformer2DModel", upstream, _FIELDS | {"caption_projection_dim": "caption"})
    caption = values.pop("caption", None)
    if values.get("out_channels", 0) is None:
        values["out_channels"] = values.get("in_channels", MMDiTConfig.in_channels)
    values["dual_layers"] = tuple(values.get("dual_layers") or ())
    if values.get("pos_size", 1) is None:
        raise ValueError("SD3Transformer2DModel: pos_embed_max_size=null (interpolated positions) is not supported")
    cfg = MMDiTConfig(**values, dtype=dtype, rules=rules)
    if caption is not None and caption != cfg.width:
        raise ValueError(f"SD3Transformer2DModel: caption_projection_dim={caption} must equal the width {cfg.width}")
    return cfg


def upstream_config(cfg: MMDiTConfig) -> dict:
    """The config.json that diffusers reads."""
    values = dataclasses.asdict(cfg)
    out = {up: values[ours] for up, ours in _FIELDS.items()}
    return {"_class_name": "SD3Transformer2DModel", **out, "caption_projection_dim": cfg.width}


def _dense(source: str, target: str, op=ops.linear, **kw) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", op, **kw), Rule(f"{source}.bias", f"{target}.bias", **kw)]


def _parts(source: str, target: str, n: int, layers=None, *, swap: bool = False) -> list[Rule]:
    """A matrix of n stacked parts; `swap` where upstream stores (scale, shift) and we (shift, scale)."""
    w, b = (ops.fused_linear_reversed, ops.fused_bias_reversed) if swap else (ops.fused_linear, ops.fused_bias)
    return [
        Rule(f"{source}.weight", f"{target}.kernel", w(n), layers=layers),
        Rule(f"{source}.bias", f"{target}.bias", b(n), layers=layers),
    ]


def _separate_qkv(names: Iterable[str], target: str, layers) -> list[Rule]:
    out = []
    for i, name in enumerate(names):
        out.append(Rule(f"{name}.weight", f"{target}.kernel", ops.linear, (ALL, i), layers))
        out.append(Rule(f"{name}.bias", f"{target}.bias", ops.same, (i,), layers))
    return out


def _mlp(up: str, down: str, target: str, layers=None) -> list[Rule]:
    return [*_dense(up, f"{target}.up", layers=layers), *_dense(down, f"{target}.down", layers=layers)]


def _edges(cfg: MMDiTConfig) -> list[Rule]:
    table = ops.reshape((cfg.pos_size, cfg.pos_size, -1), (1, cfg.pos_size**2, -1))
    embed = "time_text_embed"
    return [
        *_dense("pos_embed.proj", "patch", ops.patch_conv(cfg.patch, cfg.in_channels)),
        Rule("pos_embed.pos_embed", "pos", table),
        *_mlp(f"{embed}.timestep_embedder.linear_1", f"{embed}.timestep_embedder.linear_2", "time"),
        *_mlp(f"{embed}.text_embedder.linear_1", f"{embed}.text_embedder.linear_2", "pooled"),
        *_dense("context_embedder", "context"),
        *_parts("norm_out.linear", "final_mod", 2, swap=True),
        *_dense("proj_out", "final"),
    ]


def _group(cfg: MMDiTConfig, g: Group, target: str) -> list[Rule]:
    b, at = "transformer_blocks.{i}", g.layers
    out = [
        *_parts(f"{b}.norm1.linear", f"{target}.image.mod", 9 if g.dual else 6, g.layers),
        *_parts(f"{b}.norm1_context.linear", f"{target}.context.mod", 2 if g.last else 6, g.layers, swap=g.last),
        *_separate_qkv([f"{b}.attn.to_{x}" for x in "qkv"], f"{target}.image.attn.qkv", g.layers),
        *_separate_qkv([f"{b}.attn.add_{x}_proj" for x in "qkv"], f"{target}.context.attn.qkv", g.layers),
        *_dense(f"{b}.attn.to_out.0", f"{target}.image.attn.out", layers=at),
        *_mlp(f"{b}.ff.net.0.proj", f"{b}.ff.net.2", f"{target}.image.mlp", g.layers),
    ]
    if not g.last:
        out += _dense(f"{b}.attn.to_add_out", f"{target}.context.attn.out", layers=at)
        out += _mlp(f"{b}.ff_context.net.0.proj", f"{b}.ff_context.net.2", f"{target}.context.mlp", g.layers)
    if g.dual:
        out += _separate_qkv([f"{b}.attn2.to_{x}" for x in "qkv"], f"{target}.attn2.qkv", g.layers)
        out += _dense(f"{b}.attn2.to_out.0", f"{target}.attn2.out", layers=at)
    if cfg.qk_norm:
        for x in "qk":
            out.append(Rule(f"{b}.attn.norm_{x}.weight", f"{target}.image.attn.norm_{x}.scale", layers=at))
            out.append(Rule(f"{b}.attn.norm_added_{x}.weight", f"{target}.context.attn.norm_{x}.scale", layers=at))
            if g.dual:
                out.append(Rule(f"{b}.attn2.norm_{x}.weight", f"{target}.attn2.norm_{x}.scale", layers=at))
    return out


def rules(cfg: MMDiTConfig) -> list[Rule]:
    """RULES of the diffusers layout."""
    return _edges(cfg) + [r for n, g in enumerate(cfg.groups) for r in _group(cfg, g, f"blocks.{n}")]


def _original_group(cfg: MMDiTConfig, g: Group, target: str) -> list[Rule]:
    out: list[Rule] = []
    sides = [("x_block", "image", 9 if g.dual else 6), ("context_block", "context", 2 if g.last else 6)]
    for theirs, ours, parts in sides:
        b, t, at = f"joint_blocks.{{i}}.{theirs}", f"{target}.{ours}", g.layers
        out += _parts(f"{b}.adaLN_modulation.1", f"{t}.mod", parts, g.layers)
        out += _parts(f"{b}.attn.qkv", f"{t}.attn.qkv", 3, g.layers)
        if cfg.qk_norm:
            out += [Rule(f"{b}.attn.ln_{x}.weight", f"{t}.attn.norm_{x}.scale", layers=at) for x in "qk"]
        if ours == "image" or not g.last:
            out += _dense(f"{b}.attn.proj", f"{t}.attn.out", layers=at)
            out += _mlp(f"{b}.mlp.fc1", f"{b}.mlp.fc2", f"{t}.mlp", g.layers)
    if g.dual:
        b, t, at = "joint_blocks.{i}.x_block.attn2", f"{target}.attn2", g.layers
        out += [*_parts(f"{b}.qkv", f"{t}.qkv", 3, g.layers), *_dense(f"{b}.proj", f"{t}.out", layers=at)]
        if cfg.qk_norm:
            out += [Rule(f"{b}.ln_{x}.weight", f"{t}.norm_{x}.scale", layers=at) for x in "qk"]
    return out


def original_rules(cfg: MMDiTConfig) -> list[Rule]:
    """RULES of the original releases, keys without their `model.diffusion_model.` prefix."""
    table = ops.reshape((cfg.pos_size, cfg.pos_size, -1), (1, cfg.pos_size**2, -1))
    edges = [
        *_dense("x_embedder.proj", "patch", ops.patch_conv(cfg.patch, cfg.in_channels)),
        Rule("pos_embed", "pos", table),
        *_mlp("t_embedder.mlp.0", "t_embedder.mlp.2", "time"),
        *_mlp("y_embedder.mlp.0", "y_embedder.mlp.2", "pooled"),
        *_dense("context_embedder", "context"),
        *_parts("final_layer.adaLN_modulation.1", "final_mod", 2),
        *_dense("final_layer.linear", "final"),
    ]
    return edges + [r for n, g in enumerate(cfg.groups) for r in _original_group(cfg, g, f"blocks.{n}")]


def original_config(
    shapes: Mapping[str, Sequence[int]], *, dtype: str = "float32", rules: Rules = Rules()
) -> MMDiTConfig:
    """The architecture of an original single file, read off its shapes (it carries no config).

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        side = round(shapes["pos_embed"][1] ** 0.5)
        joint, pooled = shapes["context_embedder.weight"][1], shapes["y_embedder.mlp.0.weight"][1]
        out = shapes["final_layer.linear.weight"][0] // patch**2
    except KeyError as e:
        raise ConversionError(f"not a Stable Diffusion 3 transformer: tensor {e.args[0]} is missing") from None
    layer = re.compile(r"joint_blocks\.(\d+)\.x_block\.(attn2\.)?")
    found = [(int(m[1]), m[2]) for k in shapes if (m := layer.match(k))]
    head_dim = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (64,))[0]
    return MMDiTConfig(
        sample_size=128, patch=patch, in_channels=channels, out_channels=out, layers=1 + max(i for i, _ in found),
        heads=width // head_dim, head_dim=head_dim, joint_dim=joint, pooled_dim=pooled, pos_size=side,
        dual_layers=tuple(sorted({i for i, dual in found if dual})),
        qk_norm="rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None, dtype=dtype, rules=rules,
    )  # fmt: skip
