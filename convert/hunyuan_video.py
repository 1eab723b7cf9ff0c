"""HunyuanVideo's transformer: config and RULES of the diffusers layout and of the original releases."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from convert import fields, ops
from convert.table import ALL, ConversionError, Rule
from jdit.nn.hunyuan_video import HunyuanVideoConfig
from jdit.sharding import Rules

CLASS = "HunyuanVideoTransformer3DModel"
_FIELDS = {  # upstream's name -> ours
    "in_channels": "in_channels", "out_channels": "out_channels", "num_attention_heads": "heads",
    "attention_head_dim": "head_dim", "num_layers": "layers", "num_single_layers": "single_layers",
    "num_refiner_layers": "refiner_layers", "mlp_ratio": "mlp_ratio", "patch_size": "patch",
    "patch_size_t": "patch_frames", "qk_norm": "qk_norm", "guidance_embeds": "guidance", "text_embed_dim": "text_dim",
    "pooled_projection_dim": "pooled_dim", "rope_theta": "theta", "rope_axes_dim": "rope_dims",
    "image_condition_type": "condition",
}  # fmt: skip
_NULL = ("out_channels", "qk_norm", "image_condition_type")


def config(upstream: Mapping, *, dtype: str = "float32", rules: Rules = Rules()) -> HunyuanVideoConfig:
    """HunyuanVideoConfig of a config.json of HunyuanVideoTransformer3DModel; absent fields take upstream's defaults.

    Raises:
        ValueError: a field that is not known, or a value that is not supported.
    """
    values = fields.read(CLASS, upstream, _FIELDS, null=_NULL)
    ratio = values.get("mlp_ratio", HunyuanVideoConfig.mlp_ratio)
    if ratio != int(ratio) or ratio < 1:
        raise ValueError(f"{CLASS}: mlp_ratio={ratio} must be a whole number from 1 on")
    values["mlp_ratio"] = int(ratio)
    values["rope_dims"] = tuple(values.get("rope_dims", HunyuanVideoConfig.rope_dims))
    channels = values.get("in_channels", HunyuanVideoConfig.in_channels)
    values["out_channels"] = values.get("out_channels", HunyuanVideoConfig.out_channels) or channels
    try:
        return HunyuanVideoConfig(**values, dtype=dtype, rules=rules)
    except ValueError as e:
        raise ValueError(f"{CLASS}: {e}") from None


def upstream_config(cfg: HunyuanVideoConfig) -> dict:
    """The config.json that diffusers reads."""
    out: dict[str, Any] = {up: getattr(cfg, ours) for up, ours in _FIELDS.items()}
    return {"_class_name": CLASS, **out, "mlp_ratio": float(cfg.mlp_ratio)}


_REFINER = "context_embedder.token_refiner.refiner_blocks.{i}"
_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
DIFFUSERS: dict[str, Any] = {  # our path -> names; several where upstream has apart what is one product here
    "patch": "x_embedder.proj", "final": "proj_out",
    "time.up": "time_text_embed.timestep_embedder.linear_1", "time.down": "time_text_embed.timestep_embedder.linear_2",
    "guidance.up": "time_text_embed.guidance_embedder.linear_1",
    "guidance.down": "time_text_embed.guidance_embedder.linear_2",
    "pooled.up": "time_text_embed.text_embedder.linear_1", "pooled.down": "time_text_embed.text_embedder.linear_2",
    "refiner.time.up": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "refiner.time.down": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "refiner.pooled.up": "context_embedder.time_text_embed.text_embedder.linear_1",
    "refiner.pooled.down": "context_embedder.time_text_embed.text_embedder.linear_2",
    "refiner.proj": "context_embedder.proj_in",
    "refiner.blocks.mod": f"{_REFINER}.norm_out.linear", "refiner.blocks.norm1": f"{_REFINER}.norm1",
    "refiner.blocks.norm2": f"{_REFINER}.norm2", "refiner.blocks.attn.out": f"{_REFINER}.attn.to_out.0",
    "refiner.blocks.attn.qkv": [f"{_REFINER}.attn.to_{x}" for x in "qkv"],
    "refiner.blocks.mlp.up": f"{_REFINER}.ff.net.0.proj", "refiner.blocks.mlp.down": f"{_REFINER}.ff.net.2",
    "blocks.image.mod": f"{_DOUBLE}.norm1.linear", "blocks.context.mod": f"{_DOUBLE}.norm1_context.linear",
    "blocks.image.attn.qkv": [f"{_DOUBLE}.attn.to_{x}" for x in "qkv"],
    "blocks.context.attn.qkv": [f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"],
    "blocks.image.attn.norm_q": f"{_DOUBLE}.attn.norm_q", "blocks.image.attn.norm_k": f"{_DOUBLE}.attn.norm_k",
    "blocks.context.attn.norm_q": f"{_DOUBLE}.attn.norm_added_q",
    "blocks.context.attn.norm_k": f"{_DOUBLE}.attn.norm_added_k",
    "blocks.image.attn.out": f"{_DOUBLE}.attn.to_out.0", "blocks.context.attn.out": f"{_DOUBLE}.attn.to_add_out",
    "blocks.image.mlp.up": f"{_DOUBLE}.ff.net.0.proj", "blocks.image.mlp.down": f"{_DOUBLE}.ff.net.2",
    "blocks.context.mlp.up": f"{_DOUBLE}.ff_context.net.0.proj",
    "blocks.context.mlp.down": f"{_DOUBLE}.ff_context.net.2",
    "singles.mod": f"{_SINGLE}.norm.linear", "singles.out": f"{_SINGLE}.proj_out",
    "singles.attn.qkv": [*(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_SINGLE}.proj_mlp"],
    "singles.attn.norm_q": f"{_SINGLE}.attn.norm_q", "singles.attn.norm_k": f"{_SINGLE}.attn.norm_k",
    "final_mod": "norm_out.linear",
}  # fmt: skip
_TXT, _TWO, _ONE = "txt_in.individual_token_refiner.blocks.{i}", "double_blocks.{i}", "single_blocks.{i}"
ORIGINAL: dict[str, Any] = {
    "patch": "img_in.proj", "final": "final_layer.linear", "time.up": "time_in.mlp.0", "time.down": "time_in.mlp.2",
    "guidance.up": "guidance_in.mlp.0", "guidance.down": "guidance_in.mlp.2", "pooled.up": "vector_in.in_layer",
    "pooled.down": "vector_in.out_layer", "refiner.time.up": "txt_in.t_embedder.mlp.0",
    "refiner.time.down": "txt_in.t_embedder.mlp.2", "refiner.pooled.up": "txt_in.c_embedder.linear_1",
    "refiner.pooled.down": "txt_in.c_embedder.linear_2", "refiner.proj": "txt_in.input_embedder",
    "refiner.blocks.mod": f"{_TXT}.adaLN_modulation.1", "refiner.blocks.norm1": f"{_TXT}.norm1",
    "refiner.blocks.norm2": f"{_TXT}.norm2", "refiner.blocks.attn.out": f"{_TXT}.self_attn_proj",
    "refiner.blocks.attn.qkv": f"{_TXT}.self_attn_qkv", "refiner.blocks.mlp.up": f"{_TXT}.mlp.fc1",
    "refiner.blocks.mlp.down": f"{_TXT}.mlp.fc2",
    "singles.mod": f"{_ONE}.modulation.linear", "singles.out": f"{_ONE}.linear2", "singles.attn.qkv": f"{_ONE}.linear1",
    "singles.attn.norm_q": f"{_ONE}.q_norm", "singles.attn.norm_k": f"{_ONE}.k_norm",
    "final_mod": "final_layer.adaLN_modulation.1",
    **{
        f"blocks.{ours}.{leaf}": f"{_TWO}.{theirs}_{name}"
        for ours, theirs in (("image", "img"), ("context", "txt"))
        for leaf, name in (
            ("mod", "mod.linear"), ("attn.qkv", "attn_qkv"), ("attn.norm_q", "attn_q_norm"),
            ("attn.norm_k", "attn_k_norm"), ("attn.out", "attn_proj"), ("mlp.up", "mlp.fc1"), ("mlp.down", "mlp.fc2"),
        )
    },
}  # fmt: skip


def _table(cfg: HunyuanVideoConfig, names: Mapping[str, Any], *, scale_first: bool) -> list[Rule]:
    """RULES of a layout. `scale_first`: its last modulation is (scale, shift), ours is (shift, scale)."""
    depth = {"refiner.blocks": cfg.refiner_layers, "blocks": cfg.layers, "singles": cfg.single_layers}
    at = lambda path: next((range(n) for stack, n in depth.items() if path.startswith(f"{stack}.")), None)
    table = []

    def dense(path: str, op: ops.Op = ops.linear, bias: ops.Op = ops.same):
        table.append(Rule(f"{names[path]}.weight", f"{path}.kernel", op, layers=at(path)))
        table.append(Rule(f"{names[path]}.bias", f"{path}.bias", bias, layers=at(path)))

    def fused(path: str, parts: int):
        """One product here; there one, too, or q, k and v, and what is left of the parts."""
        if isinstance(names[path], str):
            return dense(path, ops.fused_linear(parts), ops.fused_bias(parts))
        for i, name in enumerate(names[path]):
            here, n = (slice(3, parts), parts - 3) if i == 3 else (i, 1)
            op, bias = (ops.fused_linear(n), ops.fused_bias(n)) if i == 3 else (ops.linear, ops.same)
            table.append(Rule(f"{name}.weight", f"{path}.kernel", op, (ALL, here), at(path)))
            table.append(Rule(f"{name}.bias", f"{path}.bias", bias, (here,), at(path)))

    dense("patch", ops.patch_conv3d(cfg.patch_3d, cfg.in_channels))
    for mlp in ("time", "pooled", "refiner.time", "refiner.pooled", *["guidance"] * cfg.guidance):
        dense(f"{mlp}.up")
        dense(f"{mlp}.down")
    dense("refiner.proj")
    fused("refiner.blocks.mod", 2)
    fused("refiner.blocks.attn.qkv", 3)
    for norm in ("norm1", "norm2"):
        path = f"refiner.blocks.{norm}"
        table.append(Rule(f"{names[path]}.weight", f"{path}.scale", layers=at(path)))
        table.append(Rule(f"{names[path]}.bias", f"{path}.bias", layers=at(path)))
    for stream in ("blocks.image", "blocks.context"):
        fused(f"{stream}.mod", 6)
        fused(f"{stream}.attn.qkv", 3)
    for stream in ("refiner.blocks", "blocks.image", "blocks.context"):
        for layer in ("attn.out", "mlp.up", "mlp.down"):
            dense(f"{stream}.{layer}")
    fused("singles.mod", 3)
    fused("singles.attn.qkv", 3 + cfg.mlp_ratio)
    dense("singles.out", ops.joined_linear(1 + cfg.mlp_ratio))
    for stream in ("blocks.image", "blocks.context", "singles") if cfg.qk_norm else ():
        for norm in ("norm_q", "norm_k"):
            path = f"{stream}.attn.{norm}"
            table.append(Rule(f"{names[path]}.weight", f"{path}.scale", layers=at(path)))
    if scale_first:
        dense("final_mod", ops.fused_linear_reversed(2), ops.fused_bias_reversed(2))
    else:
        fused("final_mod", 2)
    out = (cfg.patch_3d, cfg.out_channels)
    dense("final", ops.patch_linear_out(*out), ops.patch_bias(*out))
    return table


def rules(cfg: HunyuanVideoConfig) -> list[Rule]:
    """RULES of the diffusers layout."""
    return _table(cfg, DIFFUSERS, scale_first=True)


def original_rules(cfg: HunyuanVideoConfig) -> list[Rule]:
    """RULES of the original releases (`module` of mp_rank_00_model_states.pt)."""
    return _table(cfg, ORIGINAL, scale_first=False)


def beside_noise(channels: int, out: int) -> bool:
    """Whether a transformer of so many channels in and out has a picture and its mask among them."""
    return channels == 2 * out + 1


def original_config(
    shapes: Mapping[str, Sequence[int]],
    *,
    condition: str | None = None,
    dtype: str = "float32",
    rules: Rules = Rules(),
) -> HunyuanVideoConfig:
    """The architecture of an original release, read off its shapes, with rotary positions that split a head as the
    releases' do.

    Args:
        condition: of a release with as many channels in as out, which its shapes do not tell: None or "token_replace".
            Where there are twice as many and one more, it is "latent_concat".

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """
    try:
        width, channels, *patch = shapes["img_in.proj.weight"]
        head_dim = shapes["double_blocks.0.img_attn_q_norm.weight"][0]
        mlp, text = shapes["double_blocks.0.img_mlp.fc1.weight"][0], shapes["txt_in.input_embedder.weight"][1]
        out, pooled = shapes["final_layer.linear.weight"][0], shapes["vector_in.in_layer.weight"][1]
    except KeyError as e:
        raise ConversionError(f"not a HunyuanVideo transformer: tensor {e.args[0]} is missing") from None
    depth = lambda stack: 1 + max((int(m[1]) for k in shapes if (m := re.match(rf"{stack}\.(\d+)\.", k))), default=-1)
    out //= patch[0] * patch[1] * patch[2]
    return HunyuanVideoConfig(
        patch=patch[1], patch_frames=patch[0], in_channels=channels, out_channels=out, layers=depth("double_blocks"),
        single_layers=depth("single_blocks"), refiner_layers=depth(r"txt_in\.individual_token_refiner\.blocks"),
        heads=width // head_dim, head_dim=head_dim, mlp_ratio=mlp // width,
        guidance="guidance_in.mlp.0.weight" in shapes, text_dim=text, pooled_dim=pooled,
        rope_dims=(head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16),
        condition="latent_concat" if beside_noise(channels, out) else condition, dtype=dtype, rules=rules,
    )  # fmt: skip
