"""CLIP vision encoders: transformers' layout in its two namings, and the tower inside Wan's release
(models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, keys `visual.*`; its text tower is not used).
"""

from collections.abc import Mapping

from convert import ops
from convert.clip import layer_rules
from convert.table import Rule
from jdit.nn.vision.clip import CLIPVisionConfig
from jdit.sharding import Rules

TOWER = "vision_model."
"""Prefix of the tower in published checkpoints. transformers 5 saves a CLIPVisionModel without it and loads both."""

WITH_PROJECTION, PLAIN = "CLIPVisionModelWithProjection", "CLIPVisionModel"


def config(
    upstream: Mapping,
    *,
    architecture: str | None = None,
    dtype: str = "float32",
    rules: Rules = Rules(),
) -> CLIPVisionConfig:
    """Read a config.json; absent keys take the defaults of transformers' CLIPVisionConfig.

    Args:
        upstream: of a vision tower, or of a whole CLIP model with the tower's under `vision_config`.
        architecture: upstream class, where model_index.json names it; None reads it from the config.

    Raises:
        ValueError: another architecture, sizes that differ from side to side, or an activation that is not known.
    """
    name = architecture or (upstream.get("architectures") or [PLAIN])[0]
    if name not in (WITH_PROJECTION, PLAIN):
        raise ValueError(f"architecture {name!r}; CLIP vision encoders are {WITH_PROJECTION} and {PLAIN}")
    get = (upstream.get("vision_config") or upstream).get
    for key in ("image_size", "patch_size"):
        if not isinstance(get(key, 1), int):
            raise ValueError(f"{key}={get(key)!r} is not supported: one number for both sides is")
    return CLIPVisionConfig(
        width=get("hidden_size", 768),
        mlp=get("intermediate_size", 3072),
        layers=get("num_hidden_layers", 12),
        heads=get("num_attention_heads", 12),
        act=get("hidden_act", "quick_gelu"),
        eps=get("layer_norm_eps", 1e-5),
        image_size=get("image_size", 224),
        patch=get("patch_size", 32),
        channels=get("num_channels", 3),
        projection=get("projection_dim", 512) if name == WITH_PROJECTION else None,
        dtype=dtype,
        rules=rules,
    )


def upstream_config(cfg: CLIPVisionConfig) -> dict:
    """A config.json that transformers loads."""
    return {
        "architectures": [PLAIN if cfg.projection is None else WITH_PROJECTION],
        "model_type": "clip_vision_model",
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "hidden_act": cfg.act,
        "layer_norm_eps": cfg.eps,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch,
        "num_channels": cfg.channels,
        "projection_dim": cfg.projection or cfg.width,
    }


def _tower(cfg: CLIPVisionConfig, prefix: str, *, alias: bool = False) -> list[Rule]:
    conv = ops.patch_conv(cfg.patch, cfg.channels)
    out = [
        Rule(f"{prefix}embeddings.class_embedding", "token", alias=alias),
        Rule(f"{prefix}embeddings.patch_embedding.weight", "patch.kernel", conv, alias=alias),
        Rule(f"{prefix}embeddings.position_embedding.weight", "positions", alias=alias),
        Rule(f"{prefix}embeddings.position_ids", None),
    ]
    for name, path in (("pre_layrnorm", "norm_in"), ("post_layernorm", "norm")):  # upstream's spelling
        out.append(Rule(f"{prefix}{name}.weight", f"{path}.scale", alias=alias))
        out.append(Rule(f"{prefix}{name}.bias", f"{path}.bias", alias=alias))
    return out + layer_rules(cfg, prefix, alias=alias)


def rules(cfg: CLIPVisionConfig) -> list[Rule]:
    """Both namings are read, the published one is written. A projection that the class has no use for is left out."""
    projection = None if cfg.projection is None else "projection.kernel"
    return [
        *_tower(cfg, TOWER),
        *_tower(cfg, "", alias=True),
        Rule("visual_projection.weight", projection, ops.linear),
    ]


def original_rules(cfg: CLIPVisionConfig, prefix: str = "") -> list[Rule]:
    """The tower inside Wan's release, or in transformers' naming in a file without config; Wan's is written back.

    Args:
        prefix: `visual.` for the keys of Wan's whole file, nothing for those below it.
    """
    layers, layer = range(cfg.layers), prefix + "transformer.{i}."
    out = [
        Rule(f"{prefix}cls_embedding", "token", ops.reshape((-1,), (1, 1, -1))),
        Rule(f"{prefix}patch_embedding.weight", "patch.kernel", ops.patch_conv(cfg.patch, cfg.channels)),
        Rule(f"{prefix}pos_embedding", "positions", ops.reshape((-1, cfg.width), (1, -1, cfg.width))),
        Rule(f"{prefix}head", None if cfg.projection is None else "projection.kernel"),  # a matrix (D, P), not a layer
        Rule(f"{layer}attn.to_qkv.weight", "blocks.qkv.kernel", ops.fused_linear(3), layers=layers),
        Rule(f"{layer}attn.to_qkv.bias", "blocks.qkv.bias", ops.fused_bias(3), layers=layers),
    ]
    for name, path in (("pre_norm", "norm_in"), ("post_norm", "norm")):
        out.append(Rule(f"{prefix}{name}.weight", f"{path}.scale"))
        out.append(Rule(f"{prefix}{name}.bias", f"{path}.bias"))
    for name, path in (("attn.proj", "out"), ("mlp.0", "mlp.up"), ("mlp.2", "mlp.down")):
        out.append(Rule(f"{layer}{name}.weight", f"blocks.{path}.kernel", ops.linear, layers=layers))
        out.append(Rule(f"{layer}{name}.bias", f"blocks.{path}.bias", layers=layers))
    for n in (1, 2):
        out.append(Rule(f"{layer}norm{n}.weight", f"blocks.norm{n}.scale", layers=layers))
        out.append(Rule(f"{layer}norm{n}.bias", f"blocks.norm{n}.bias", layers=layers))
    return out + [r._replace(alias=True) if r.target else r for r in rules(cfg)]
