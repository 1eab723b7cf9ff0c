"""AutoencoderKLQwenImage: Wan's tables under another config.

Source: diffusers models/autoencoders/autoencoder_kl_qwenimage.py. Single files have the original layout of Wan 2.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from convert import autoencoder_kl_wan as wan
from convert.table import ConversionError
from jdit.nn.vae.autoencoder_kl_qwen_image import AutoencoderKLQwenImageConfig
from jdit.sharding import Rules

CLASS = "AutoencoderKLQwenImage"

FIELDS = {
    "base_dim": "width", "z_dim": "latent_channels", "dim_mult": "multipliers", "num_res_blocks": "layers",
    "attn_scales": "attention", "temperal_downsample": "temporal", "dropout": "dropout",
    "input_channels": "in_channels", "latents_mean": "mean", "latents_std": "std",
}  # fmt: skip
"""Upstream's name -> ours; our defaults are upstream's. `input_channels` are those of the result too."""

rules, original_rules = wan.rules, wan.original_rules


def config(
    upstream: Mapping[str, Any], *, dtype: str = "float32", rules: Rules = Rules()
) -> AutoencoderKLQwenImageConfig:
    """Our config of an upstream config.json; absent fields take upstream's defaults.

    Raises:
        ValueError: fields or values that this architecture does not have, all at once.
    """
    given = {k: v for k, v in upstream.items() if not k.startswith("_")}
    wrong = [f"{k} is not a known field" for k in given if k not in FIELDS]
    if (name := upstream.get("_class_name", CLASS)) != CLASS:
        wrong.append(f"_class_name is {name!r}, wanted {CLASS!r}")
    if wrong:
        raise ValueError(f"{CLASS} config: " + "; ".join(wrong))
    ours: dict[str, Any] = {FIELDS[k]: tuple(v) if isinstance(v, list | tuple) else v for k, v in given.items()}
    return _whole(ours | {"dtype": dtype, "rules": rules})


def _whole(fields: dict[str, Any]) -> AutoencoderKLQwenImageConfig:
    """A config with what upstream's class derives: the channels of the result, and the compression."""
    cfg = AutoencoderKLQwenImageConfig(**fields)
    derived = {"out_channels": cfg.in_channels, "time_factor": 2 ** sum(cfg.temporal)}
    return AutoencoderKLQwenImageConfig(**fields | derived, space_factor=2 ** len(cfg.temporal))


def upstream_config(cfg: AutoencoderKLQwenImageConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
    values = {name: getattr(cfg, ours) for name, ours in FIELDS.items()}
    return {"_class_name": CLASS, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def original_config(
    shapes: Mapping[str, Sequence[int]], *, dtype: str = "float32", rules: Rules = Rules()
) -> AutoencoderKLQwenImageConfig:
    """The architecture of a single file, read off its shapes (pictures have 3 channels, or with their opacity 4); the
    latents' statistics are those of the release.

    Raises:
        ConversionError: as for Wan, and where it is another of Wan's networks.
    """
    opacity = tuple(shapes.get("encoder.conv1.weight", ()))[1:2] == (4,)
    cfg = wan.original_config(shapes, dtype=dtype, rules=rules, colours=4 if opacity else 3)
    if cfg.residual or cfg.patch or cfg.decoder_width or cfg.in_channels != cfg.out_channels:
        raise ConversionError("not Qwen-Image's autoencoder: its levels have shortcuts, patches or unequal sides")
    names = {*FIELDS.values(), "dtype", "rules"}
    return _whole({k: v for k, v in vars(cfg).items() if k in names})
