"""Wan-Animate's transformer: config and RULES of the diffusers layout and of the original release, where not Wan's."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from convert import ops, wan
from convert.table import ConversionError, Rule
from jdit.nn.motion import LINEARS
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.sharding import Rules

CLASS = "WanAnimateTransformer3DModel"
FIELDS = wan.FIELDS | {  # upstream's name -> ours
    "motion_style_dim": "motion_features", "motion_dim": "motion_directions", "motion_encoder_dim": "motion_width",
    "face_encoder_hidden_dim": "face_width", "face_encoder_num_heads": "face_tokens",
    "inject_face_latents_blocks": "group", "motion_encoder_batch_size": "face_chunk",
}  # fmt: skip
CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
"""Upstream's widths of the motion encoder where a config names none: rows of pixels -> channels."""
_OWN = ("latent_channels", "motion_encoder_size", "motion_encoder_channel_sizes", "in_channels")


def config(upstream: Mapping, *, dtype: str = "float32", rules: Rules = Rules()) -> WanAnimateConfig:
    """WanAnimateConfig of a config.json of WanAnimateTransformer3DModel; absent fields take upstream's defaults.

    Raises:
        ValueError: a field that is not known, or a value that is not supported.
    """
    latent, channels = upstream.get("latent_channels", 16), upstream.get("in_channels", WanAnimateConfig.in_channels)
    if channels is None and latent is not None:
        channels = 2 * latent + 4
    if channels is None or latent not in (None, (channels - 4) / 2):
        raise ValueError(f"{CLASS}: in_channels={channels} must be 2 * latent_channels + 4 (latent_channels={latent})")
    values: dict[str, Any] = {"in_channels": channels, "face_channels": _face_channels(upstream)}
    if not upstream.get("out_channels", WanAnimateConfig.out_channels):
        values["out_channels"] = (channels - 4) // 2
    return wan.read(CLASS, WanAnimateConfig, upstream, FIELDS, _OWN, dtype=dtype, rules=rules, **values)


def _face_channels(upstream: Mapping) -> tuple[int, ...]:
    size, given = upstream.get("motion_encoder_size", 512), upstream.get("motion_encoder_channel_sizes")
    sizes = {int(k): v for k, v in (CHANNELS if given is None else given).items()}
    if size < 4 or size & (size - 1):
        raise ValueError(f"{CLASS}: motion_encoder_size={size} must be a power of two from 4")
    levels = [size >> n for n in range(size.bit_length() - 2)]
    if missing := [n for n in levels if n not in sizes]:
        raise ValueError(f"{CLASS}: motion_encoder_channel_sizes names no channels for {missing} of size {size}")
    return tuple(sizes[n] for n in levels)


def upstream_config(cfg: WanAnimateConfig) -> dict:
    """The config.json that diffusers reads."""
    sizes = {cfg.face_size >> n: c for n, c in enumerate(cfg.face_channels)}
    usual = sizes.items() <= CHANNELS.items()
    return wan.written(CLASS, cfg, FIELDS) | {
        "latent_channels": cfg.latent_channels, "motion_encoder_size": cfg.face_size,
        "motion_encoder_channel_sizes": None if usual else {str(k): v for k, v in sizes.items()},
    }  # fmt: skip


def _adapters(cfg: WanAnimateConfig) -> range:
    return range(cfg.layers // cfg.group)


def _shared(cfg: WanAnimateConfig, conv: str) -> list[Rule]:
    """What has one name in both layouts; `conv` is what comes after the name of a convolution over time."""
    return [
        *wan.dense("pose_patch_embedding", "pose", ops.patch_conv3d(cfg.patch, cfg.latent_channels)),
        *(r for n in (2, 3) for r in wan.dense(f"face_encoder.conv{n}{conv}", f"face.conv{n}", ops.conv)),
        *wan.dense(f"face_encoder.conv1_local{conv}", "face.conv1", ops.conv),
        *wan.dense("face_encoder.out_proj", "face.out"),
        Rule("face_encoder.padding_tokens", "face.token", ops.reshape((-1,), (1, 1, 1, -1))),
    ]


def _linears(source: str) -> list[Rule]:
    hidden = wan.dense(f"{source}.{{i}}", "motion.linears", layers=range(LINEARS - 1))
    return [*hidden, *wan.dense(f"{source}.{LINEARS - 1}", "motion.linear_out")]


def rules(cfg: WanAnimateConfig) -> list[Rule]:
    """RULES of the diffusers layout."""
    at, adapter = _adapters(cfg), "face_adapter.{i}"
    out = [*wan.rules(cfg), *_shared(cfg, ""), *_linears("motion_encoder.motion_network")]
    out.append(Rule("motion_encoder.motion_synthesis_weight", "motion.basis"))
    convs = ["conv_in", *(f"res_blocks.{{i}}.{x}" for x in ("conv1", "conv2"))]
    for conv in convs:
        ours = conv.replace("res_blocks", "blocks")
        out.append(Rule(f"motion_encoder.{conv}.weight", f"motion.{ours}.kernel", ops.conv))
        out.append(Rule(f"motion_encoder.{conv}.act_fn.bias", f"motion.{ours}.bias"))
    out.append(Rule("motion_encoder.res_blocks.{i}.conv_skip.weight", "motion.blocks.{i}.skip.kernel", ops.conv))
    out.append(Rule("motion_encoder.conv_out.weight", "motion.conv_out.kernel", ops.conv))
    for theirs, ours in (("to_q", "q"), ("to_out", "out")):
        out += wan.dense(f"{adapter}.{theirs}", f"adapters.{ours}", layers=at)
    out += wan.fused([f"{adapter}.to_k", f"{adapter}.to_v"], "adapters.kv", at)
    return out + [Rule(f"{adapter}.norm_{x}.weight", f"adapters.norm_{x}.scale", layers=at) for x in "qk"]


def original_rules(cfg: WanAnimateConfig) -> list[Rule]:
    """RULES of the original release, keys without their `model.diffusion_model.` prefix."""
    at, adapter, net = _adapters(cfg), "face_adapter.fuser_blocks.{i}", "motion_encoder.enc.net_app.convs"
    last, bias = len(cfg.face_channels), ops.reshape((-1,), (1, -1, 1, 1))
    out = [*wan.original_rules(cfg), *_shared(cfg, ".conv"), *_linears("motion_encoder.enc.fc")]
    out.append(Rule("motion_encoder.dec.direction.weight", "motion.basis"))
    convs = [(f"{net}.0", 0, "conv_in")]  # what their number begins with is a filter or the convolution
    for n in range(last - 1):
        block, ours = f"{net}.{n + 1}", f"blocks.{n}"
        convs += [(f"{block}.conv1", 0, f"{ours}.conv1"), (f"{block}.conv2", 1, f"{ours}.conv2")]
        out.append(Rule(f"{block}.skip.1.weight", f"motion.{ours}.skip.kernel", ops.conv))
        out += [Rule(f"{block}.{x}.0.kernel", None) for x in ("conv2", "skip")]  # the filter, always [1, 3, 3, 1]
    for theirs, n, ours in convs:
        out.append(Rule(f"{theirs}.{n}.weight", f"motion.{ours}.kernel", ops.conv))
        out.append(Rule(f"{theirs}.{n + 1}.bias", f"motion.{ours}.bias", bias))
    out.append(Rule(f"{net}.{last}.weight", "motion.conv_out.kernel", ops.conv))
    for theirs, ours in (("linear1_q", "q"), ("linear2", "out")):
        out += wan.dense(f"{adapter}.{theirs}", f"adapters.{ours}", layers=at)
    out.append(Rule(f"{adapter}.linear1_kv.weight", "adapters.kv.kernel", ops.fused_linear(2), layers=at))
    out.append(Rule(f"{adapter}.linear1_kv.bias", "adapters.kv.bias", ops.fused_bias(2), layers=at))
    return out + [Rule(f"{adapter}.{x}_norm.weight", f"adapters.norm_{x}.scale", layers=at) for x in "qk"]


def original_config(
    shapes: Mapping[str, Sequence[int]],
    release: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    rules: Rules = Rules(),
) -> WanAnimateConfig:
    """The architecture of an original release, read off its shapes and, where there is one, its config.json.

    Args:
        release: config.json of class WanAnimateModel; see `convert.wan.original_config`.

    Raises:
        ConversionError: a tensor that the architecture is read from is missing, or config.json does not fit.
    """
    net = "motion_encoder.enc.net_app.convs"
    try:
        channels = [shapes[f"{net}.0.0.weight"][0]]
        for n in itertools.count(1):
            if f"{net}.{n}.weight" in shapes:
                break
            channels.append(shapes[f"{net}.{n}.conv2.1.weight"][0])
        width, directions = shapes["motion_encoder.dec.direction.weight"]
        face, locals_ = (shapes[f"face_encoder.{x}.conv.weight"][0] for x in ("conv2", "conv1_local"))
        values: dict[str, Any] = dict(
            face_channels=tuple(channels), motion_features=shapes["motion_encoder.enc.fc.0.weight"][0],
            motion_directions=directions, motion_width=width, face_width=face, face_tokens=locals_ // face,
            group=wan.count(shapes, "blocks") // max(1, wan.count(shapes, "face_adapter.fuser_blocks")),
        )  # fmt: skip
    except KeyError as e:
        raise ConversionError(f"not a Wan-Animate transformer: tensor {e.args[0]} is missing") from None
    fixed = {"motion_encoder_dim": width, "use_img_emb": True}
    unread = ("use_context_parallel",)
    cfg = wan.read_original(
        "Wan-Animate", WanAnimateConfig, shapes, release, fixed, unread, dtype=dtype, rules=rules, **values
    )
    if not cfg.image_keys:
        raise ConversionError("a Wan-Animate transformer whose pictures have no keys of their own is not known")
    return cfg
