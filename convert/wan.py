"""Wan's transformer: config and RULES of the diffusers layout and of the original releases."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from convert import fields, ops
from convert.table import ALL, ConversionError, Rule
from jdit.nn.wan import WanConfig
from jdit.sharding import Rules

FIELDS = {  # upstream's name -> ours
    "patch_size": "patch", "num_attention_heads": "heads", "attention_head_dim": "head_dim",
    "in_channels": "in_channels", "out_channels": "out_channels", "text_dim": "text_dim", "freq_dim": "freq_dim",
    "ffn_dim": "mlp", "num_layers": "layers", "cross_attn_norm": "cross_norm", "eps": "eps", "image_dim": "image_dim",
    "rope_max_seq_len": "max_positions", "pos_embed_seq_len": "image_positions",
}  # fmt: skip
_QK_NORM = "rms_norm_across_heads"
CLASS = "WanTransformer3DModel"
C = TypeVar("C", bound=WanConfig)


def config(upstream: Mapping, *, dtype: str = "float32", rules: Rules = Rules()) -> WanConfig:
    """WanConfig of a config.json of WanTransformer3DModel; absent fields take upstream's defaults.

    Raises:
        ValueError: a field that is not known, or a value that is not supported.
    """
    return read(CLASS, WanConfig, upstream, FIELDS, dtype=dtype, rules=rules)


def read(
    name: str, make: type[C], upstream: Mapping, names: Mapping[str, str], more: Sequence[str] = (), **values
) -> C:
    """A config of class `make` from a config.json of upstream's class `name`.

    Args:
        names: upstream's fields -> ours. more: fields that the caller has read itself into `values`, ours.
    """
    further = {"qk_norm": "qk_norm", "added_kv_proj_dim": "added"}
    values = fields.read(name, upstream, {**names, **further}, unread=more) | values
    qk_norm, added = values.pop("qk_norm", _QK_NORM), values.pop("added", None)
    if qk_norm not in (_QK_NORM, None):  # upstream normalises whatever it says
        raise ValueError(f"{name}: qk_norm={qk_norm!r} is not supported; it may be {_QK_NORM!r}")
    values["patch"] = tuple(values.get("patch", make.patch))
    channels = values.get("in_channels", make.in_channels)
    values["out_channels"] = values.get("out_channels", make.out_channels) or channels
    cfg = make(**values, image_keys=added is not None)
    if added not in (None, cfg.width):
        raise ValueError(f"{name}: added_kv_proj_dim={added} must equal the width {cfg.width}")
    return cfg


def upstream_config(cfg: WanConfig) -> dict:
    """The config.json that diffusers reads."""
    return written(CLASS, cfg, FIELDS)


def written(name: str, cfg: WanConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `read`."""
    out: dict[str, Any] = {up: getattr(cfg, ours) for up, ours in names.items()}
    added = cfg.width if cfg.image_keys else None
    return {
        "_class_name": name, **out, "patch_size": list(cfg.patch), "qk_norm": _QK_NORM, "added_kv_proj_dim": added,
    }  # fmt: skip


DIFFUSERS = {  # names in WanTransformer3DModel; the keys are ours in this file alone
    "patch": "patch_embedding", "final": "proj_out", "final_table": "scale_shift_table",
    "time": "condition_embedder.time_embedder.linear_1", "time_2": "condition_embedder.time_embedder.linear_2",
    "time_mod": "condition_embedder.time_proj",
    "text": "condition_embedder.text_embedder.linear_1", "text_2": "condition_embedder.text_embedder.linear_2",
    "image_in": "condition_embedder.image_embedder.norm1", "image": "condition_embedder.image_embedder.ff.net.0.proj",
    "image_2": "condition_embedder.image_embedder.ff.net.2", "image_out": "condition_embedder.image_embedder.norm2",
    "image_pos": "condition_embedder.image_embedder.pos_embed",
    "table": "scale_shift_table", "norm": "norm2", "mlp": "ffn.net.0.proj", "mlp_2": "ffn.net.2",
    "self": "attn1", "cross": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0",
    "image_k": "add_k_proj", "image_v": "add_v_proj", "norm_image_k": "norm_added_k",
}  # fmt: skip
ORIGINAL = {
    "patch": "patch_embedding", "final": "head.head", "final_table": "head.modulation", "time": "time_embedding.0",
    "time_2": "time_embedding.2", "time_mod": "time_projection.1", "text": "text_embedding.0",
    "text_2": "text_embedding.2", "image_in": "img_emb.proj.0", "image": "img_emb.proj.1", "image_2": "img_emb.proj.3",
    "image_out": "img_emb.proj.4", "image_pos": "img_emb.emb_pos", "table": "modulation", "norm": "norm3",
    "mlp": "ffn.0", "mlp_2": "ffn.2", "self": "self_attn", "cross": "cross_attn", "q": "q", "k": "k", "v": "v",
    "out": "o", "image_k": "k_img", "image_v": "v_img", "norm_image_k": "norm_k_img",
}  # fmt: skip


def dense(source: str, target: str, op=ops.linear, **kw) -> list[Rule]:
    """RULES of a dense layer's weight and bias."""
    return [Rule(f"{source}.weight", f"{target}.kernel", op, **kw), Rule(f"{source}.bias", f"{target}.bias", **kw)]


def _norm(source: str, target: str, **kw) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale", **kw), Rule(f"{source}.bias", f"{target}.bias", **kw)]


def fused(sources: Sequence[str], target: str, layers) -> list[Rule]:
    """RULES of stacked dense layers that are one product here."""
    out = []
    for n, source in enumerate(sources):
        out.append(Rule(f"{source}.weight", f"{target}.kernel", ops.linear, (ALL, n), layers))
        out.append(Rule(f"{source}.bias", f"{target}.bias", ops.same, (n,), layers))
    return out


def _table(parts: int) -> ops.Op:
    return ops.reshape((parts, -1), (1, parts, -1))


def _edges(cfg: WanConfig, n: Mapping[str, str]) -> list[Rule]:
    out = [
        *dense(n["patch"], "patch", ops.patch_conv3d(cfg.patch, cfg.in_channels)),
        *dense(n["time"], "time.up"), *dense(n["time_2"], "time.down"),
        Rule(f"{n['time_mod']}.weight", "time_mod.kernel", ops.fused_linear(6)),
        Rule(f"{n['time_mod']}.bias", "time_mod.bias", ops.fused_bias(6)),
        *dense(n["text"], "text.up"), *dense(n["text_2"], "text.down"),
        Rule(n["final_table"], "final_table", _table(2)),
        *dense(n["final"], "final"),
    ]  # fmt: skip
    if cfg.image_dim is not None:
        out += [*_norm(n["image_in"], "image.norm_in"), *_norm(n["image_out"], "image.norm_out")]
        out += [*dense(n["image"], "image.mlp.up"), *dense(n["image_2"], "image.mlp.down")]
        if cfg.image_positions is not None:
            out.append(Rule(n["image_pos"], "image.pos", _table(cfg.image_positions)))
    return out


def block_rules(
    cfg: WanConfig,
    n: Mapping[str, str],
    prefix: str = "blocks.{i}",
    target: str = "blocks",
    layers: Sequence[int] | None = None,
) -> list[Rule]:
    """RULES of the blocks `layers` (None: all), stacked in `target`; `n` is DIFFUSERS or ORIGINAL."""
    at = range(cfg.layers) if layers is None else layers
    attn, cross = f"{prefix}.{n['self']}", f"{prefix}.{n['cross']}"
    out = [
        Rule(f"{prefix}.{n['table']}", f"{target}.table", _table(6), layers=at),
        *fused([f"{attn}.{n[x]}" for x in "qkv"], f"{target}.attn.qkv", at),
        *dense(f"{cross}.{n['q']}", f"{target}.cross.q", layers=at),
        *fused([f"{cross}.{n[x]}" for x in "kv"], f"{target}.cross.kv", at),
        *dense(f"{prefix}.{n['mlp']}", f"{target}.mlp.up", layers=at),
        *dense(f"{prefix}.{n['mlp_2']}", f"{target}.mlp.down", layers=at),
    ]
    for theirs, ours in ((attn, f"{target}.attn"), (cross, f"{target}.cross")):
        out += dense(f"{theirs}.{n['out']}", f"{ours}.out", layers=at)
        out += [Rule(f"{theirs}.norm_{x}.weight", f"{ours}.norm_{x}.scale", layers=at) for x in "qk"]
    if cfg.cross_norm:
        out += _norm(f"{prefix}.{n['norm']}", f"{target}.norm", layers=at)
    if cfg.image_keys:
        out += fused([f"{cross}.{n['image_k']}", f"{cross}.{n['image_v']}"], f"{target}.cross.image_kv", at)
        out.append(Rule(f"{cross}.{n['norm_image_k']}.weight", f"{target}.cross.norm_image_k.scale", layers=at))
    return out


def rules(cfg: WanConfig) -> list[Rule]:
    """RULES of the diffusers layout."""
    unused = Rule("blocks.{i}.attn2.norm_added_q.weight", None)  # upstream's first I2V releases carry it
    return [*_edges(cfg, DIFFUSERS), *block_rules(cfg, DIFFUSERS), unused]


def original_rules(cfg: WanConfig) -> list[Rule]:
    """RULES of the original releases, keys without their `model.diffusion_model.` prefix."""
    return [*_edges(cfg, ORIGINAL), *block_rules(cfg, ORIGINAL)]


def settings(configs: Mapping[str, Any]) -> dict[str, Any]:
    """How releases without model_index.json are run: Wan 2.2's experts change over at the published timestep (0.9 of
    the noise with a picture, 0.875 without), and its residual autoencoder goes with a timestep for each frame (5B)."""
    if "transformer_2" in configs:
        return {"boundary_ratio": 0.9 if _pictured(configs) else 0.875}
    return {"expand_timesteps": True} if "vae" in configs and configs["vae"].residual else {}


def pipeline(configs: Mapping[str, Any]) -> str:
    """Upstream's pipeline class."""
    return "WanImageToVideoPipeline" if "image_encoder" in configs or _pictured(configs) else "WanPipeline"


def _pictured(configs: Mapping[str, Any]) -> bool:
    cfg = configs.get("transformer")
    return cfg is not None and cfg.in_channels != cfg.out_channels


HEAD_DIM = 128
"""Of every published Wan: shapes do not tell it."""
_RELEASE = {  # fields of an original config.json that shapes tell too
    "patch_size": "patch", "dim": "width", "in_dim": "in_channels", "out_dim": "out_channels", "ffn_dim": "mlp",
    "text_dim": "text_dim", "freq_dim": "freq_dim", "num_layers": "layers", "cross_attn_norm": "cross_norm",
    "num_heads": "heads", "eps": "eps",
}  # fmt: skip
_FIXED = {"window_size": (-1, -1), "qk_norm": True}
_UNREAD = ("model_type", "text_len")


def original_config(
    shapes: Mapping[str, Sequence[int]],
    release: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    rules: Rules = Rules(),
) -> WanConfig:
    """The architecture of an original release, read off its shapes and, where there is one, its config.json.

    Args:
        release: config.json of class WanModel. Without it heads have 128 dims and eps is 1e-6, as in all published.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing, or config.json does not fit.
    """
    return read_original("Wan", WanConfig, shapes, release, dtype=dtype, rules=rules)


def read_original(
    name: str,
    make: type[C],
    shapes: Mapping[str, Sequence[int]],
    release: Mapping[str, Any] | None,
    fixed: Mapping[str, Any] | None = None,
    unread: Sequence[str] = (),
    **values,
) -> C:
    """`original_config` for a config of class `make`.

    Args:
        fixed: further fields of config.json and the only values that they may have. unread: fields without meaning.
        values: what the caller has read off the shapes itself, ours.
    """
    fields = {k: v for k, v in (release or {}).items() if not k.startswith("_")}
    told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        width, channels, *patch = shapes["patch_embedding.weight"]
        mlp, text = shapes["blocks.0.ffn.0.weight"][0], shapes["text_embedding.0.weight"][1]
        freq, out = shapes["time_embedding.0.weight"][1], shapes["head.head.weight"][0]
    except KeyError as e:
        raise ConversionError(f"not a {name} transformer: tensor {e.args[0]} is missing") from None
    heads = told.get("num_heads", max(1, width // HEAD_DIM))
    if not heads or width % heads:
        raise ConversionError(f"a {name} transformer of width {width} cannot have num_heads={heads}")
    positions, image = shapes.get("img_emb.emb_pos"), shapes.get("img_emb.proj.0.weight")
    cfg = make(
        patch=(patch[0], patch[1], patch[2]), heads=heads, head_dim=width // heads, in_channels=channels,
        out_channels=out // math.prod(patch), text_dim=text, freq_dim=freq, mlp=mlp, layers=count(shapes, "blocks"),
        cross_norm="blocks.0.norm3.weight" in shapes, eps=told.get("eps", 1e-6), image_dim=image[0] if image else None,
        image_keys="blocks.0.cross_attn.k_img.weight" in shapes, image_positions=positions[1] if positions else None,
        **values,
    )  # fmt: skip
    own = _FIXED | dict(fixed or {}) | {theirs: getattr(cfg, ours) for theirs, ours in _RELEASE.items()}
    wrong = [f"{k}={v!r} (it is {own[k]!r})" for k, v in told.items() if k in own and v != own[k]]
    wrong += [f"{k}={v!r} (not known)" for k, v in told.items() if k not in (*own, *_UNREAD, *unread)]
    if wrong:
        raise ConversionError(f"config.json of this {name} transformer does not fit its tensors: {', '.join(wrong)}")
    return cfg


def count(shapes: Mapping[str, Any], prefix: str) -> int:
    """How many numbered modules there are below `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for k in shapes if (m := pattern.match(k))), default=-1)
