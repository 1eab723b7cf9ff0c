"""AutoencoderKL: diffusers' layout and the original one of latent diffusion, as in the single-file releases.

Sources: diffusers models/autoencoders/autoencoder_kl.py; loaders/single_file_utils.py (convert_ldm_vae_checkpoint).
"""

from collections.abc import Mapping
from typing import Any

from convert import ops
from convert.ops import Op
from convert.table import Rule
from jdit.nn.vae.autoencoder_kl import ACTIVATIONS, AutoencoderKLConfig
from jdit.sharding import Rules

# upstream's name -> (ours, upstream's default); a sparse config.json leaves defaults out
FIELDS: dict[str, tuple[str, Any]] = {
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "block_out_channels": ("channels", (64,)),
    "layers_per_block": ("layers", 1),
    "act_fn": ("act", "silu"),
    "latent_channels": ("latent_channels", 4),
    "norm_num_groups": ("groups", 32),
    "sample_size": ("sample_size", 32),
    "scaling_factor": ("scale", 0.18215),
    "shift_factor": ("shift", None),
    "force_upcast": ("force_upcast", True),
    "use_quant_conv": ("quant_conv", True),
    "use_post_quant_conv": ("post_quant_conv", True),
    "mid_block_add_attention": ("mid_attention", True),
}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
UNUSED = ("latents_mean", "latents_std")


def config(upstream: Mapping[str, Any], *, dtype: str = "float32", rules: Rules = Rules()) -> AutoencoderKLConfig:
    """Our config of an upstream config.json.

    Raises:
        ValueError: fields or values that this architecture does not have, all at once.
    """
    given = {k: v for k, v in upstream.items() if not k.startswith("_")}
    values = {name: given.get(name, default) for name, (_, default) in FIELDS.items()}
    values["block_out_channels"] = tuple(values["block_out_channels"])
    wrong = [f"{k} is not a known field" for k in given if k not in FIELDS and k not in BLOCKS and k not in UNUSED]
    if (name := upstream.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        wrong.append(f"_class_name is {name!r}, wanted 'AutoencoderKL'")
    for field, block in BLOCKS.items():
        kinds, want = list(given.get(field, (block,))), [block] * len(values["block_out_channels"])
        if kinds != want:
            wrong.append(f"{field} is {kinds}, supported is {want} (one for each of block_out_channels)")
    wrong += [f"{field} is set; only scaling_factor and shift_factor are supported" for field in UNUSED
              if given.get(field) is not None]  # fmt: skip
    values["act_fn"] = "silu" if values["act_fn"] in ("silu", "swish") else values["act_fn"]
    if values["act_fn"] not in ACTIVATIONS:
        wrong.append(f"act_fn is {values['act_fn']!r}, supported are {[*ACTIVATIONS, 'swish']}")
    if wrong:
        raise ValueError("AutoencoderKL config: " + "; ".join(wrong))
    if isinstance(values["sample_size"], list | tuple):
        values["sample_size"] = values["sample_size"][0]
    values["shift_factor"] = values["shift_factor"] or 0.0
    ours = {FIELDS[name][0]: value for name, value in values.items()}
    return AutoencoderKLConfig(**ours, dtype=dtype, rules=rules)


def upstream_config(cfg: AutoencoderKLConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
    out: dict[str, Any] = {"_class_name": "AutoencoderKL"}
    out |= {name: getattr(cfg, ours) for name, (ours, _) in FIELDS.items()}
    out["block_out_channels"] = list(cfg.channels)
    return out | {field: [block] * len(cfg.channels) for field, block in BLOCKS.items()}


def _flat(source: str, target: str, op: Op, *, alias: bool = False, weight: str = "kernel") -> list[Rule]:
    """Weight and bias of one layer."""
    return [
        Rule(f"{source}.weight", f"{target}.{weight}", op, alias=alias),
        Rule(f"{source}.bias", f"{target}.bias", alias=alias),
    ]


def _conv(source: str, target: str) -> list[Rule]:
    return _flat(source, target, ops.conv)


def _norm(source: str, target: str) -> list[Rule]:
    return _flat(source, target, ops.same, weight="scale")


def _resnet(source: str, target: str, shortcut: str) -> list[Rule]:
    parts = [_norm(f"{source}.norm{n}", f"{target}.norm{n}") + _conv(f"{source}.conv{n}", f"{target}.conv{n}")
             for n in (1, 2)]  # fmt: skip
    return sum(parts, _flat(f"{source}.{shortcut}", f"{target}.shortcut", ops.pointwise))


def _ends(side: str, prefix: str, norm: str) -> list[Rule]:
    source = f"{prefix}{side}"
    out = [r for n in ("conv_in", "conv_out") for r in _conv(f"{source}.{n}", f"{side}.{n}")]
    return out + _norm(f"{source}.{norm}", f"{side}.norm_out")


def _quant(cfg: AutoencoderKLConfig, prefix: str) -> list[Rule]:
    present = {"quant_conv": cfg.quant_conv, "post_quant_conv": cfg.post_quant_conv}
    return [r for n, there in present.items() if there for r in _flat(f"{prefix}{n}", n, ops.pointwise)]


# names of q, k, v and out: today's, and those of files from before diffusers 0.15
ATTENTION = {"q": ("to_q", "query"), "k": ("to_k", "key"), "v": ("to_v", "value"), "out": ("to_out.0", "proj_attn")}


def rules(cfg: AutoencoderKLConfig) -> list[Rule]:
    """Diffusers' layout; the deprecated names of the attention layers are aliases."""
    out = _quant(cfg, "")
    for side, level, change in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        mid, blocks = f"{side}.mid_block", f"{side}.{level}_blocks.{{i}}"
        out += _ends(side, "", "conv_norm_out")
        out += _resnet(f"{blocks}.resnets.{{j}}", f"{side}.{level}.{{i}}.resnets.{{j}}", "conv_shortcut")
        out += _conv(f"{blocks}.{change}rs.0.conv", f"{side}.{level}.{{i}}.{change}.conv")
        out += _resnet(f"{mid}.resnets.{{j}}", f"{side}.mid.resnets.{{j}}", "conv_shortcut")
        out += _norm(f"{mid}.attentions.0.group_norm", f"{side}.mid.attention.norm")
        for ours, names in ATTENTION.items():
            for n, name in enumerate(names):
                target = f"{side}.mid.attention.{ours}"
                out += _flat(f"{mid}.attentions.0.{name}", target, ops.linear, alias=n > 0)
    return out


# 1x1 convolutions of one or two dimensions, and the plain matrices that some tools write in their place
any_pointwise = Op("any_pointwise", lambda w: w.reshape(w.shape[:2]).T, lambda w: w.T[:, :, None, None])


def original_rules(cfg: AutoencoderKLConfig, prefix: str = "first_stage_model.") -> list[Rule]:
    """The original layout, where the decoder's levels are numbered from fine to coarse.

    Args:
        prefix: what stands before every key: "first_stage_model." in Stable Diffusion's single files, "vae." or "" in
            others.
    """
    out = _quant(cfg, prefix)
    for side, level, change in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        out += _ends(side, prefix, "norm_out")
        for i in range(n := len(cfg.channels)):
            ours = f"{side}.{level}.{i}"
            theirs = f"{prefix}{side}.{level}.{i if level == 'down' else n - 1 - i}"
            out += _resnet(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}", "nin_shortcut")
            out += _conv(f"{theirs}.{change}.conv", f"{ours}.{change}.conv")
        mid = f"{prefix}{side}.mid"
        for j in range(2):
            out += _resnet(f"{mid}.block_{j + 1}", f"{side}.mid.resnets.{j}", "nin_shortcut")
        out += _norm(f"{mid}.attn_1.norm", f"{side}.mid.attention.norm")
        for ours, name in {"q": "q", "k": "k", "v": "v", "out": "proj_out"}.items():
            out += _flat(f"{mid}.attn_1.{name}", f"{side}.mid.attention.{ours}", any_pointwise)
    return out
