"""CLIP text encoders: transformers' layout, its two namings, and the copies inside single-file releases."""

from collections.abc import Iterable, Mapping

import numpy as np

from convert import ops
from convert.table import ALL, Rule
from jdit.nn.clip import CLIPTowerConfig
from jdit.nn.text.clip import CLIPTextConfig
from jdit.sharding import Rules

TOWER = "text_model."
"""Prefix of the tower in published checkpoints. transformers 5 saves a CLIPTextModel without it and loads both."""

WITH_PROJECTION, PLAIN = "CLIPTextModelWithProjection", "CLIPTextModel"


def config(
    upstream: Mapping,
    *,
    architecture: str | None = None,
    dtype: str = "float32",
    rules: Rules = Rules(),
) -> CLIPTextConfig:
    """Read a config.json; absent keys take the defaults of transformers' CLIPTextConfig.

    Args:
        architecture: upstream class, where model_index.json names it; None reads it from the config.

    Raises:
        ValueError: another architecture, or an activation that is not known.
    """
    name = architecture or (upstream.get("architectures") or [WITH_PROJECTION])[0]
    if name not in (WITH_PROJECTION, PLAIN):
        raise ValueError(f"architecture {name!r}; CLIP text encoders are {WITH_PROJECTION} and {PLAIN}")
    get = upstream.get
    return CLIPTextConfig(
        vocab_size=get("vocab_size", 49408),
        width=get("hidden_size", 512),
        mlp=get("intermediate_size", 2048),
        layers=get("num_hidden_layers", 12),
        heads=get("num_attention_heads", 8),
        max_positions=get("max_position_embeddings", 77),
        act=get("hidden_act", "quick_gelu"),
        eps=get("layer_norm_eps", 1e-5),
        projection=get("projection_dim", 512) if name == WITH_PROJECTION else None,
        eos_token_id=get("eos_token_id", 49407),
        dtype=dtype,
        rules=rules,
    )


def upstream_config(cfg: CLIPTextConfig) -> dict:
    """A config.json that transformers loads."""
    return {
        "architectures": [PLAIN if cfg.projection is None else WITH_PROJECTION],
        "model_type": "clip_text_model",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "max_position_embeddings": cfg.max_positions,
        "hidden_act": cfg.act,
        "layer_norm_eps": cfg.eps,
        "projection_dim": cfg.projection or cfg.width,
        "bos_token_id": 0 if cfg.eos_token_id == 2 else cfg.vocab_size - 2,
        "eos_token_id": cfg.eos_token_id,
        "pad_token_id": 1,
    }


def layer_rules(cfg: CLIPTowerConfig, prefix: str, *, alias: bool = False) -> list[Rule]:
    """Rules of a tower's stacked layers, for text and pictures alike."""
    layers, layer = range(cfg.layers), prefix + "encoder.layers.{i}."
    out: list[Rule] = []
    for n, part in enumerate("qkv"):
        name = f"{layer}self_attn.{part}_proj"
        out.append(Rule(f"{name}.weight", "blocks.qkv.kernel", ops.linear, (ALL, n), layers, alias))
        out.append(Rule(f"{name}.bias", "blocks.qkv.bias", ops.same, (n,), layers, alias))
    for name, path in (("self_attn.out_proj", "out"), ("mlp.fc1", "mlp.up"), ("mlp.fc2", "mlp.down")):
        out.append(Rule(f"{layer}{name}.weight", f"blocks.{path}.kernel", ops.linear, (), layers, alias))
        out.append(Rule(f"{layer}{name}.bias", f"blocks.{path}.bias", ops.same, (), layers, alias))
    for n in (1, 2):
        out.append(Rule(f"{layer}layer_norm{n}.weight", f"blocks.norm{n}.scale", ops.same, (), layers, alias))
        out.append(Rule(f"{layer}layer_norm{n}.bias", f"blocks.norm{n}.bias", ops.same, (), layers, alias))
    return out


def _tower(cfg: CLIPTextConfig, prefix: str, *, alias: bool = False) -> list[Rule]:
    return [
        Rule(f"{prefix}embeddings.token_embedding.weight", "tokens.embedding", alias=alias),
        Rule(f"{prefix}embeddings.position_embedding.weight", "positions.embedding", alias=alias),
        Rule(f"{prefix}embeddings.position_ids", None),
        Rule(f"{prefix}final_layer_norm.weight", "norm.scale", alias=alias),
        Rule(f"{prefix}final_layer_norm.bias", "norm.bias", alias=alias),
        *layer_rules(cfg, prefix, alias=alias),
    ]


def rules(cfg: CLIPTextConfig) -> list[Rule]:
    """Both namings are read, the published one is written."""
    out = _tower(cfg, TOWER) + _tower(cfg, "", alias=True)
    if cfg.projection is not None:
        out.append(Rule("text_projection.weight", "projection.kernel", ops.linear))
    return out


def original_rules(cfg: CLIPTextConfig, prefix: str = "") -> list[Rule]:
    """The tower inside a single-file release.

    Args:
        prefix: `text_encoders.clip_l.transformer.` or `text_encoders.clip_g.transformer.` in a file of several
            components, nothing in clip_l.safetensors and clip_g.safetensors.
    """
    outer = prefix.removesuffix("transformer.")
    out = [*_tower(cfg, prefix + TOWER), Rule(f"{outer}logit_scale", None)]
    if cfg.projection is not None:
        out.append(Rule(f"{prefix}text_projection.weight", "projection.kernel", ops.linear))
        for name in {f"{prefix}text_projection", f"{outer}text_projection"}:  # OpenCLIP's: a matrix (D, P), not a layer
            out.append(Rule(name, "projection.kernel", alias=True))
    else:
        out += [Rule(f"{prefix}text_projection.weight", None), Rule(f"{prefix}text_projection", None)]
    return out


def implied(cfg: CLIPTextConfig, keys: Iterable[str], prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors that a single-file release leaves out and its loaders supply, to be read beside its own.

    CLIP-L there may lack its projection, which then is the identity (diffusers' single_file_utils.py).

    Returns:
        {key that `original_rules(cfg, prefix)` takes: float32 array}, empty where nothing is missing.
    """
    outer = prefix.removesuffix("transformer.")
    names = {f"{prefix}text_projection.weight", f"{prefix}text_projection", f"{outer}text_projection"}
    if cfg.projection is None or cfg.projection != cfg.width or names & set(keys):
        return {}
    return {f"{prefix}text_projection.weight": np.eye(cfg.width, dtype=np.float32)}
