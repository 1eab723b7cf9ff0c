"""AutoencoderKLCogVideoX: diffusers' layout and the original one of CogVideoX's releases (SAT, vae/3d-vae.pt).

Sources: diffusers models/autoencoders/autoencoder_kl_cogvideox.py and scripts/convert_cogvideox_to_diffusers.py.
The two differ in the names of levels and blocks; the original counts the decoder's levels from the finest.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from convert import ops, table
from convert.ops import Op
from convert.table import ALL, Rule
from jdit.nn.vae.autoencoder_kl_cogvideox_config import ACTIVATIONS, AutoencoderKLCogVideoXConfig
from jdit.sharding import Rules

CLASS = "AutoencoderKLCogVideoX"
# upstream's name -> ours; our defaults are upstream's
FIELDS = {
    "in_channels": "in_channels", "out_channels": "out_channels", "block_out_channels": "channels",
    "latent_channels": "latent_channels", "layers_per_block": "layers", "act_fn": "act", "norm_eps": "eps",
    "norm_num_groups": "groups", "temporal_compression_ratio": "time_factor", "sample_height": "sample_height",
    "sample_width": "sample_width", "scaling_factor": "scale", "invert_scale_latents": "invert_scale",
    "use_quant_conv": "quant_conv", "use_post_quant_conv": "post_quant_conv", "force_upcast": "force_upcast",
}  # fmt: skip
BLOCKS = {"down_block_types": "CogVideoXDownBlock3D", "up_block_types": "CogVideoXUpBlock3D"}
UNUSED = ("shift_factor", "latents_mean", "latents_std")  # no pipeline of CogVideoX reads them


def config(
    upstream: Mapping[str, Any], *, dtype: str = "float32", rules: Rules = Rules()
) -> AutoencoderKLCogVideoXConfig:
    """Our config of an upstream config.json; absent fields take upstream's defaults.

    Raises:
        ValueError: fields or values that this architecture does not have, all at once.
    """
    given = {k: v for k, v in upstream.items() if not k.startswith("_")}
    wrong = [f"{k} is not a known field" for k in given if k not in FIELDS and k not in BLOCKS and k not in UNUSED]
    if (name := upstream.get("_class_name", CLASS)) != CLASS:
        wrong.append(f"_class_name is {name!r}, wanted {CLASS!r}")
    levels = len(given.get("block_out_channels", AutoencoderKLCogVideoXConfig.channels))
    for field, block in BLOCKS.items():
        if (kinds := list(given.get(field, [block] * 4))) != [block] * levels:
            wrong.append(f"{field} is {kinds}, supported is {[block] * levels} (one for each of block_out_channels)")
    wrong += [f"{field} is {given[field]}; only scaling_factor is supported, as by upstream's pipelines"
              for field in UNUSED if given.get(field) is not None]  # fmt: skip
    if (act := given.get("act_fn", "silu")) not in ACTIVATIONS:
        wrong.append(f"act_fn is {act!r}, supported are {list(ACTIVATIONS)}")
    if wrong:
        raise ValueError(f"{CLASS} config: " + "; ".join(wrong))
    ours: dict[str, Any] = {FIELDS[k]: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in FIELDS}
    return AutoencoderKLCogVideoXConfig(**ours, dtype=dtype, rules=rules)


def upstream_config(cfg: AutoencoderKLCogVideoXConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
    out: dict[str, Any] = {"_class_name": CLASS} | {name: getattr(cfg, ours) for name, ours in FIELDS.items()}
    out |= {field: [block] * len(cfg.channels) for field, block in BLOCKS.items()}
    return out | {"block_out_channels": list(cfg.channels)} | dict.fromkeys(UNUSED)


class Names(NamedTuple):
    """What the two layouts name differently."""

    level: Callable[[str, int], str]
    block: str
    change: dict[str, str]
    mid: Callable[[int], str]
    shortcut: str


DIFFUSERS = Names(
    lambda side, i: f"down_blocks.{i}" if side == "encoder" else f"up_blocks.{i}", "resnets",
    {"encoder": "downsamplers.0", "decoder": "upsamplers.0"}, lambda j: f"mid_block.resnets.{j}", "conv_shortcut",
)  # fmt: skip


def _original(levels: int) -> Names:
    return Names(
        lambda side, i: f"down.{i}" if side == "encoder" else f"up.{levels - 1 - i}", "block",
        {"encoder": "downsample", "decoder": "upsample"}, lambda j: f"mid.block_{j + 1}", "nin_shortcut",
    )  # fmt: skip


def _layer(source: str, target: str, op: Op = ops.same, weight: str = "kernel") -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.{weight}", op), Rule(f"{source}.bias", f"{target}.bias")]


def _norm(source: str, target: str, spatial: bool) -> list[Rule]:
    if not spatial:
        return _layer(source, target, weight="scale")
    out = _layer(f"{source}.norm_layer", f"{target}.norm", weight="scale")
    for i, part in enumerate(("conv_y", "conv_b")):
        out.append(Rule(f"{source}.{part}.conv.weight", f"{target}.condition.kernel", ops.pointwise_3d, (ALL, i)))
        out.append(Rule(f"{source}.{part}.conv.bias", f"{target}.condition.bias", at=(i,)))
    return out


def _resnet(source: str, target: str, spatial: bool, names: Names) -> list[Rule]:
    out = _layer(f"{source}.{names.shortcut}", f"{target}.shortcut", ops.pointwise_3d)
    for n in "12":
        out += _norm(f"{source}.norm{n}", f"{target}.norm{n}", spatial)
        out += _layer(f"{source}.conv{n}.conv", f"{target}.conv{n}", ops.causal_conv)
    return out


def _rules(cfg: AutoencoderKLCogVideoXConfig, names: Names) -> list[Rule]:
    out = [rule for name in ("quant_conv", "post_quant_conv") for rule in _layer(name, name, ops.pointwise_3d)]
    for side, level, spatial in (("encoder", "down", False), ("decoder", "up", True)):
        out += _norm(f"{side}.norm_out", f"{side}.norm_out", spatial)
        for name in ("conv_in", "conv_out"):
            out += _layer(f"{side}.{name}.conv", f"{side}.{name}", ops.causal_conv)
        for j in range(2):
            out += _resnet(f"{side}.{names.mid(j)}", f"{side}.mid.resnets.{j}", spatial, names)
        for i in range(len(cfg.channels)):
            source, target = f"{side}.{names.level(side, i)}", f"{side}.{level}.{i}"
            out += _resnet(f"{source}.{names.block}.{{j}}", f"{target}.resnets.{{j}}", spatial, names)
            out += _layer(f"{source}.{names.change[side]}.conv", f"{target}.change.space.conv", ops.conv)
    return out


def rules(cfg: AutoencoderKLCogVideoXConfig) -> list[Rule]:
    """Diffusers' layout."""
    return _rules(cfg, DIFFUSERS)


def original_rules(cfg: AutoencoderKLCogVideoXConfig) -> list[Rule]:
    """The original layout, without the keys of training's losses that its files also hold (`loss.`)."""
    return _rules(cfg, _original(len(cfg.channels)))


def original_config(
    shapes: Mapping[str, Sequence[int]], *, scale: float = AutoencoderKLCogVideoXConfig.scale,
    invert_scale: bool = False, dtype: str = "float32", rules: Rules = Rules(),
) -> AutoencoderKLCogVideoXConfig:  # fmt: skip
    """The architecture of an original file, read off its shapes: it carries no config.

    Args:
        scale, invert_scale: what shapes do not tell: 1.15258426 belongs to CogVideoX 2B, 0.7 to 5B and 1.5, and 1.5
            inverts it.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing.
    """

    need = functools.partial(table.need, shapes, what="CogVideoX autoencoder")

    block = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.conv\.weight")
    blocks = [m for m in map(block.fullmatch, shapes) if m]
    levels, layers = (max((int(m[n]) for m in blocks), default=0) + 1 for n in (1, 2))
    return AutoencoderKLCogVideoXConfig(
        in_channels=need("encoder.conv_in.conv.weight")[1], out_channels=need("decoder.conv_out.conv.weight")[0],
        channels=tuple(need(f"encoder.down.{i}.block.0.conv1.conv.weight")[0] for i in range(levels)),
        latent_channels=need("decoder.conv_in.conv.weight")[1], layers=layers, scale=scale,
        invert_scale=invert_scale, dtype=dtype, rules=rules,
    )  # fmt: skip
