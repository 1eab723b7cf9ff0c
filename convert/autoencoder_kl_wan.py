"""AutoencoderKLWan: diffusers' layout and the original one of Wan2.1_VAE.pth and Wan2.2_VAE.pth.

Sources: diffusers models/autoencoders/autoencoder_kl_wan.py, loaders/single_file_utils.py
(convert_wan_vae_to_diffusers) and scripts/convert_wan_to_diffusers.py (convert_vae_22). The two releases name their
levels differently: 2.1 counts the blocks of all levels in one row, 2.2 (`residual`) within each level.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convert import ops, table
from convert.ops import Op
from convert.table import ConversionError, Rule
from jdit.nn.vae.autoencoder_kl_wan_config import MEAN_21, MEAN_22, STD_21, STD_22, AutoencoderKLWanConfig
from jdit.sharding import Rules

# upstream's name -> ours; our defaults are upstream's
FIELDS = {
    "base_dim": "width", "decoder_base_dim": "decoder_width", "z_dim": "latent_channels", "dim_mult": "multipliers",
    "num_res_blocks": "layers", "attn_scales": "attention", "temperal_downsample": "temporal", "dropout": "dropout",
    "latents_mean": "mean", "latents_std": "std", "is_residual": "residual", "in_channels": "in_channels",
    "out_channels": "out_channels", "patch_size": "patch", "scale_factor_temporal": "time_factor",
    "scale_factor_spatial": "space_factor",
}  # fmt: skip
UNUSED = ("clip_output",)  # in Wan 2.2's config.json; no class of diffusers reads it
STATISTICS = {16: (MEAN_21, STD_21), 48: (MEAN_22, STD_22)}  # by latent channels: no file carries them


def config(upstream: Mapping[str, Any], *, dtype: str = "float32", rules: Rules = Rules()) -> AutoencoderKLWanConfig:
    """Our config of an upstream config.json; absent fields take upstream's defaults.

    Raises:
        ValueError: fields or values that this architecture does not have, all at once.
    """
    given = {k: v for k, v in upstream.items() if not k.startswith("_") and k not in UNUSED}
    wrong = [f"{k} is not a known field" for k in given if k not in FIELDS]
    if (name := upstream.get("_class_name", "AutoencoderKLWan")) != "AutoencoderKLWan":
        wrong.append(f"_class_name is {name!r}, wanted 'AutoencoderKLWan'")
    if wrong:
        raise ValueError("AutoencoderKLWan config: " + "; ".join(wrong))
    ours: dict[str, Any] = {FIELDS[k]: tuple(v) if isinstance(v, list | tuple) else v for k, v in given.items()}
    return AutoencoderKLWanConfig(**ours, dtype=dtype, rules=rules)


def upstream_config(cfg: AutoencoderKLWanConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
    values = {name: getattr(cfg, ours) for name, ours in FIELDS.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {"_class_name": "AutoencoderKLWan", **plain}


_PIXEL_3D = ops.reshape((-1,), (-1, 1, 1, 1))
_PIXEL_2D = ops.reshape((-1,), (-1, 1, 1))
_fused = ops.fused_linear(3)
_qkv = Op("fused_pointwise(3)", lambda w: _fused.forward(w[:, :, 0, 0]), lambda w: _fused.inverse(w)[:, :, None, None])


def _layer(source: str, target: str, op: Op, bias: Op = ops.same) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", op), Rule(f"{source}.bias", f"{target}.bias", bias)]


def _causal(source: str, target: str) -> list[Rule]:
    return _layer(source, target, ops.causal_conv)


RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
ORIGINAL_RESIDUAL = {
    "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "shortcut": "shortcut",
}  # fmt: skip


def _resnet(source: str, target: str, names: Mapping[str, str]) -> list[Rule]:
    out = _layer(f"{source}.{names['shortcut']}", f"{target}.shortcut", ops.pointwise_3d)
    for n in "12":
        out.append(Rule(f"{source}.{names[f'norm{n}']}.gamma", f"{target}.norm{n}.scale", _PIXEL_3D))
        out += _causal(f"{source}.{names[f'conv{n}']}", f"{target}.conv{n}")
    return out


def _attention(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.norm.gamma", f"{target}.norm.scale", _PIXEL_2D),
        *_layer(f"{source}.to_qkv", f"{target}.qkv", _qkv, ops.fused_bias(3)),
        *_layer(f"{source}.proj", f"{target}.out", ops.pointwise),
    ]


def _resample(source: str, target: str) -> list[Rule]:
    return _layer(f"{source}.resample.1", f"{target}.space.conv", ops.conv) + _causal(
        f"{source}.time_conv", f"{target}.time"
    )


def _quant(names: tuple[str, str], prefix: str = "") -> list[Rule]:
    return [r for theirs, ours in zip(names, ("quant_conv", "post_quant_conv"))
            for r in _layer(f"{prefix}{theirs}", ours, ops.pointwise_3d)]  # fmt: skip


def _ends(side: str, source: str, first: str, norm: str, last: str) -> list[Rule]:
    return [
        *_causal(f"{source}.{first}", f"{side}.conv_in"),
        Rule(f"{source}.{norm}.gamma", f"{side}.norm_out.scale", _PIXEL_3D),
        *_causal(f"{source}.{last}", f"{side}.conv_out"),
    ]


def _levels(
    cfg: AutoencoderKLWanConfig, side: str, name: Callable[[int, int, str], str], names: Mapping[str, str]
) -> list[Rule]:
    """All levels of a side. `name` (level, block's number in its level, kind) -> upstream's path of the block."""
    encoder = side == "encoder"
    level, change = ("down", "shrink") if encoder else ("up", "grow")
    sizes = cfg.encoder_levels if encoder else cfg.decoder_levels
    out: list[Rule] = []
    for i, (*_, space) in enumerate(sizes):
        block = itertools.count()
        for j in range(cfg.layers + (not encoder)):
            out += _resnet(name(i, next(block), "resnet"), f"{side}.{level}.{i}.resnets.{j}", names)
            if encoder and not cfg.residual and 0.5**i in cfg.attention:
                out += _attention(name(i, next(block), "attention"), f"{side}.{level}.{i}.attentions.{j}")
        if space > 1:
            out += _resample(name(i, next(block), "change"), f"{side}.{level}.{i}.{change}")
    return out


def _blocks_before(cfg: AutoencoderKLWanConfig, side: str, level: int) -> int:
    """Blocks of the finer (coarser, in the decoder) levels, where all are counted in one row."""
    if side == "decoder":
        return level * (cfg.layers + 2)
    return sum(cfg.layers * (2 if 0.5**i in cfg.attention else 1) + 1 for i in range(level))


def rules(cfg: AutoencoderKLWanConfig) -> list[Rule]:
    """Diffusers' layout."""

    def down(i: int, n: int, kind: str) -> str:
        if not cfg.residual:
            return f"encoder.down_blocks.{_blocks_before(cfg, 'encoder', i) + n}"
        return f"encoder.down_blocks.{i}." + ("downsampler" if kind == "change" else f"resnets.{n}")

    def up(i: int, n: int, kind: str) -> str:
        change = "upsampler" if cfg.residual else "upsamplers.0"
        return f"decoder.up_blocks.{i}." + (change if kind == "change" else f"resnets.{n}")

    out = _quant(("quant_conv", "post_quant_conv"))
    for side, name in (("encoder", down), ("decoder", up)):
        out += _ends(side, side, "conv_in", "norm_out", "conv_out") + _levels(cfg, side, name, RESIDUAL)
        out += _attention(f"{side}.mid_block.attentions.0", f"{side}.mid.attention")
        out += _resnet(f"{side}.mid_block.resnets.{{j}}", f"{side}.mid.resnets.{{j}}", RESIDUAL)
    return out


def original_rules(cfg: AutoencoderKLWanConfig, prefix: str = "") -> list[Rule]:
    """The original layout.

    Args:
        prefix: what stands before every key: nothing in Wan's releases, "model." or "vae." in others.
    """
    out = _quant(("conv1", "conv2"), prefix)
    for side, change in (("encoder", "downsamples"), ("decoder", "upsamples")):
        source = f"{prefix}{side}"
        if cfg.residual:
            name = lambda i, n, kind, s=source, c=change: f"{s}.{c}.{i}.{c}.{n}"
        else:
            name = lambda i, n, kind, s=source, c=change, side=side: f"{s}.{c}.{_blocks_before(cfg, side, i) + n}"
        out += _ends(side, source, "conv1", "head.0", "head.2") + _levels(cfg, side, name, ORIGINAL_RESIDUAL)
        out += _attention(f"{source}.middle.1", f"{side}.mid.attention")
        for n in range(2):
            out += _resnet(f"{source}.middle.{2 * n}", f"{side}.mid.resnets.{n}", ORIGINAL_RESIDUAL)
    return out


def original_config(
    shapes: Mapping[str, Sequence[int]], *, dtype: str = "float32", rules: Rules = Rules(), colours: int = 3
) -> AutoencoderKLWanConfig:
    """The architecture of an original file, read off its shapes (it carries no config), keys without prefix.

    The statistics of the latents are those that Wan published for this number of channels; a pixel has `colours`.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing, or channels without statistics.
    """

    need = functools.partial(table.need, shapes, what="Wan autoencoder")

    width, in_channels = need("encoder.conv1.weight")[:2]
    out_channels, last = need("decoder.head.2.weight")[:2]
    channels = need("conv2.weight")[0]
    residual = "encoder.downsamples.0.downsamples.0.residual.2.weight" in shapes
    number = r"(\d+)\.downsamples\.(\d+)" if residual else r"()(\d+)"
    block = re.compile(rf"encoder\.downsamples\.{number}\.(.+)")
    kinds: dict[tuple[int, int], set[str]] = {}
    for m in filter(None, map(block.fullmatch, shapes)):
        kinds.setdefault((int(m[1] or 0), int(m[2])), set()).add(m[3])
    multipliers, temporal, layers, attention = [], [], 0, []
    need_next = True  # a level begins with a residual block and ends with a change of resolution, or at the end
    for (level, n), names in sorted(kinds.items()):
        path = f"encoder.downsamples.{level}.downsamples.{n}" if residual else f"encoder.downsamples.{n}"
        if "resample.1.weight" in names:
            temporal.append("time_conv.weight" in names)
            need_next = True
        elif "to_qkv.weight" in names:
            attention.append(0.5 ** (len(multipliers) - 1))
        else:
            c_out = need(f"{path}.residual.2.weight")[0]
            if need_next:
                multipliers.append(c_out // width)
            layers, need_next = (1 if need_next else layers + 1), False
    if channels not in STATISTICS:
        raise ConversionError(
            f"conv2.weight has {channels} latent channels; latent statistics are known for {sorted(STATISTICS)}"
        )
    patch = math.isqrt(in_channels // colours)
    if in_channels != colours * patch**2:
        raise ConversionError(
            f"encoder.conv1.weight has {in_channels} input channels, not {colours} p p of patches of p pixels"
        )
    mean, std = STATISTICS[channels]
    decoder_width = last // multipliers[0]
    return AutoencoderKLWanConfig(
        in_channels=in_channels, out_channels=out_channels, width=width,
        decoder_width=None if decoder_width == width else decoder_width,
        latent_channels=channels, multipliers=tuple(multipliers), layers=layers,
        attention=tuple(dict.fromkeys(attention)), temporal=tuple(temporal), residual=residual,
        patch=None if patch == 1 else patch, mean=mean, std=std, time_factor=2 ** sum(temporal),
        space_factor=2 ** len(temporal) * patch, dtype=dtype, rules=rules,
    )  # fmt: skip
