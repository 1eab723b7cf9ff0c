"""AutoencoderKLHunyuanVideo: diffusers' layout, whose names those of the original release are (vae/pytorch_model.pt).

Source: diffusers models/autoencoders/autoencoder_kl_hunyuan_video.py and
scripts/convert_hunyuan_video_to_diffusers.py, which renames no tensor of the autoencoder.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from convert import ops, table
from convert.ops import Op
from convert.table import Rule
from jdit.nn.vae.autoencoder_kl_hunyuan_video_config import ACTIVATIONS, AutoencoderKLHunyuanVideoConfig
from jdit.sharding import Rules

CLASS = "AutoencoderKLHunyuanVideo"
# upstream's name -> ours; our defaults are upstream's
FIELDS = {
    "in_channels": "in_channels", "out_channels": "out_channels", "latent_channels": "latent_channels",
    "block_out_channels": "channels", "layers_per_block": "layers", "act_fn": "act", "norm_num_groups": "groups",
    "scaling_factor": "scale", "spatial_compression_ratio": "space_factor",
    "temporal_compression_ratio": "time_factor", "mid_block_add_attention": "mid_attention",
}  # fmt: skip
BLOCKS = {"down_block_types": "HunyuanVideoDownBlock3D", "up_block_types": "HunyuanVideoUpBlock3D"}
DENSE = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}


def config(
    upstream: Mapping[str, Any], *, dtype: str = "float32", rules: Rules = Rules()
) -> AutoencoderKLHunyuanVideoConfig:
    """Our config of an upstream config.json; absent fields take upstream's defaults.

    Raises:
        ValueError: fields or values that this architecture does not have, all at once.
    """
    given = {k: v for k, v in upstream.items() if not k.startswith("_")}
    wrong = [f"{k} is not a known field" for k in given if k not in FIELDS and k not in BLOCKS]
    if (name := upstream.get("_class_name", CLASS)) != CLASS:
        wrong.append(f"_class_name is {name!r}, wanted {CLASS!r}")
    levels = len(given.get("block_out_channels", AutoencoderKLHunyuanVideoConfig.channels))
    for field, block in BLOCKS.items():
        if (kinds := list(given.get(field, [block] * 4))) != [block] * levels:
            wrong.append(f"{field} is {kinds}, supported is {[block] * levels} (one for each of block_out_channels)")
    if (act := given.get("act_fn", "silu")) not in ACTIVATIONS:
        wrong.append(f"act_fn is {act!r}, supported are {list(ACTIVATIONS)}")
    if (ratio := given.get("temporal_compression_ratio", 4)) != 4:
        wrong.append(f"temporal_compression_ratio is {ratio}, supported is 4, as by upstream's decoder")
    if wrong:
        raise ValueError(f"{CLASS} config: " + "; ".join(wrong))
    ours: dict[str, Any] = {FIELDS[k]: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in FIELDS}
    return AutoencoderKLHunyuanVideoConfig(**ours, dtype=dtype, rules=rules)


def upstream_config(cfg: AutoencoderKLHunyuanVideoConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
    out: dict[str, Any] = {"_class_name": CLASS} | {name: getattr(cfg, ours) for name, ours in FIELDS.items()}
    out |= {field: [block] * len(cfg.channels) for field, block in BLOCKS.items()}
    return out | {"block_out_channels": list(cfg.channels)}


def _layer(source: str, target: str, op: Op = ops.same, weight: str = "kernel") -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.{weight}", op), Rule(f"{source}.bias", f"{target}.bias")]


def _resnet(source: str, target: str) -> list[Rule]:
    out = _layer(f"{source}.conv_shortcut.conv", f"{target}.shortcut", ops.pointwise_3d)
    for n in "12":
        out += _layer(f"{source}.norm{n}", f"{target}.norm{n}", weight="scale")
        out += _layer(f"{source}.conv{n}.conv", f"{target}.conv{n}", ops.causal_conv)
    return out


def rules(cfg: AutoencoderKLHunyuanVideoConfig) -> list[Rule]:
    """The layout of diffusers and of the original release."""
    out = [rule for name in ("quant_conv", "post_quant_conv") for rule in _layer(name, name, ops.pointwise_3d)]
    for side, level, changes, change in (
        ("encoder", "down", "downsamplers", "shrink"), ("decoder", "up", "upsamplers", "grow"),
    ):  # fmt: skip
        out += _layer(f"{side}.conv_norm_out", f"{side}.norm_out", weight="scale")
        for name in ("conv_in", "conv_out"):
            out += _layer(f"{side}.{name}.conv", f"{side}.{name}", ops.causal_conv)
        attention = f"{side}.mid_block.attentions.0", f"{side}.mid.attention"
        out += _layer(f"{attention[0]}.group_norm", f"{attention[1]}.norm", weight="scale")
        for theirs, ours in DENSE.items():
            out += _layer(f"{attention[0]}.{theirs}", f"{attention[1]}.{ours}", ops.linear)
        out += _resnet(f"{side}.mid_block.resnets.{{j}}", f"{side}.mid.resnets.{{j}}")
        source, target = f"{side}.{level}_blocks.{{i}}", f"{side}.{level}.{{i}}"
        out += _resnet(f"{source}.resnets.{{j}}", f"{target}.resnets.{{j}}")
        out += _layer(f"{source}.{changes}.0.conv.conv", f"{target}.{change}", ops.causal_conv)
    return out


def original_config(
    shapes: Mapping[str, Sequence[int]], *, dtype: str = "float32", rules: Rules = Rules()
) -> AutoencoderKLHunyuanVideoConfig:
    """The architecture of a file without config, read off its shapes; what they do not tell is as published.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """

    need = functools.partial(table.need, shapes, what="HunyuanVideo autoencoder")

    block = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.conv\.weight")
    blocks = [m for m in map(block.fullmatch, shapes) if m]
    levels, layers = (max((int(m[n]) for m in blocks), default=0) + 1 for n in (1, 2))
    return AutoencoderKLHunyuanVideoConfig(
        in_channels=need("encoder.conv_in.conv.weight")[1], out_channels=need("decoder.conv_out.conv.weight")[0],
        latent_channels=need("decoder.conv_in.conv.weight")[1], layers=layers, dtype=dtype, rules=rules,
        channels=tuple(need(f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight")[0] for i in range(levels)),
        mid_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
    )  # fmt: skip
