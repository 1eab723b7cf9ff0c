"""What is known: upstream's component classes, the families' pipelines, and how single files are told apart."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from convert import autoencoder_kl as kl
from convert import autoencoder_kl_wan as wan_vae
from convert import clip, clip_vision, sd3, single, t5, wan, wan_animate
from convert.component import Component
from convert.layout import Signature
from convert.table import Rule
from jdit.nn.mmdit import MMDiT
from jdit.nn.text.clip import CLIPText
from jdit.nn.text.t5 import T5
from jdit.nn.vae.autoencoder_kl import AutoencoderKL
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vision.clip import CLIPVision
from jdit.nn.wan import Wan
from jdit.nn.wan_animate import WanAnimate
from jdit.sharding import Rules
from jdit.zoo import MODULES


def _clip(name: str) -> Component:
    return Component(name, CLIPText, lambda c: clip.config(c, architecture=name), clip.upstream_config, clip.rules)


def _clip_vision(name: str) -> Component:
    read = lambda c: clip_vision.config(c, architecture=name)
    return Component(name, CLIPVision, read, clip_vision.upstream_config, clip_vision.rules)


def _t5(name: str) -> Component:
    return Component(name, T5, lambda c: t5.config(c, architecture=name), t5.upstream_config, t5.rules)


COMPONENTS: dict[str, Component] = {
    c.upstream_class: c
    for c in (
        Component("SD3Transformer2DModel", MMDiT, sd3.config, sd3.upstream_config, sd3.rules),
        Component("AutoencoderKL", AutoencoderKL, kl.config, kl.upstream_config, kl.rules),
        Component("AutoencoderKLWan", AutoencoderKLWan, wan_vae.config, wan_vae.upstream_config, wan_vae.rules),
        _clip("CLIPTextModelWithProjection"),
        _clip("CLIPTextModel"),
        _clip_vision("CLIPVisionModelWithProjection"),
        _clip_vision("CLIPVisionModel"),
        _t5("T5EncoderModel"),
        _t5("UMT5EncoderModel"),
        Component("WanTransformer3DModel", Wan, wan.config, wan.upstream_config, wan.rules),
        Component(
            "WanAnimateTransformer3DModel", WanAnimate, wan_animate.config, wan_animate.upstream_config,
            wan_animate.rules,
        ),
    )
}  # fmt: skip
"""Upstream class -> component."""

LIBRARY = {
    "SD3Transformer2DModel": "diffusers", "AutoencoderKL": "diffusers", "CLIPTextModelWithProjection": "transformers",
    "CLIPTextModel": "transformers", "T5EncoderModel": "transformers", "UMT5EncoderModel": "transformers",
    "CLIPVisionModelWithProjection": "transformers", "CLIPVisionModel": "transformers",
    "WanTransformer3DModel": "diffusers", "AutoencoderKLWan": "diffusers", "WanAnimateTransformer3DModel": "diffusers",
}  # fmt: skip


class Family(NamedTuple):
    """A family as checkpoints show it.

    Attributes:
        pipelines: upstream's pipeline classes; the first is written back.
        components: our component names and the class each is written back as.
        tokenizers: names of the tokenizer folders and the class each is written back as.
        scheduler: the scheduler config of releases that carry none (single files).
        settings: fields of model_index.json that say how the pipeline is run.
        guess: our configs -> those settings, for releases that carry none.
        pipeline: our configs -> the pipeline class to be written back, where it is not the first.
    """

    pipelines: tuple[str, ...]
    components: dict[str, str]
    tokenizers: dict[str, str]
    scheduler: dict[str, Any]
    settings: tuple[str, ...] = ()
    guess: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    pipeline: Callable[[Mapping[str, Any]], str] | None = None


FAMILIES: dict[str, Family] = {
    "sd3": Family(
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        {
            "transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL",
            "text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    ),
    "wan": Family(
        ("WanPipeline", "WanImageToVideoPipeline"),
        {
            "transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel", "vae": "AutoencoderKLWan",
            "text_encoder": "UMT5EncoderModel", "image_encoder": "CLIPVisionModel",
        },
        {"tokenizer": "T5TokenizerFast"},
        {
            "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2,
            "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0,
        },
        ("boundary_ratio", "expand_timesteps"), wan.settings, wan.pipeline,
    ),
}  # fmt: skip


class Original(NamedTuple):
    """A component inside an original release: its config is read off the shapes.

    Attributes:
        config: (key -> shape) -> our config. rules: our config -> RULES of the keys below the prefix.
        prefix: of its keys when written back.
        implied: (config, keys) -> tensors that such files leave out.
        release: `_class_name` of the config.json that releases have beside the weights; where it is there, `config`
            takes its content as `release=`.
    """

    upstream_class: str
    config: Any
    rules: Any
    prefix: str
    implied: Any = None
    release: str | None = None


_ORIGINALS = {
    "transformer": Original("SD3Transformer2DModel", sd3.original_config, sd3.original_rules, "model.diffusion_model."),
    "vae": Original(
        "AutoencoderKL", single.vae_config, lambda c: kl.original_rules(c, ""), "first_stage_model."
    ),
    "text_encoder": Original(
        "CLIPTextModelWithProjection", lambda s: single.clip_config(s, act="quick_gelu"), clip.original_rules,
        "text_encoders.clip_l.transformer.", clip.implied,
    ),
    "text_encoder_2": Original(
        "CLIPTextModelWithProjection", lambda s: single.clip_config(s, act="gelu"), clip.original_rules,
        "text_encoders.clip_g.transformer.", clip.implied,
    ),
    "text_encoder_3": Original(
        "T5EncoderModel", single.t5_config, t5.original_rules, "text_encoders.t5xxl.transformer."
    ),
}  # fmt: skip
_WAN_TRANSFORMER = Original(
    "WanTransformer3DModel", wan.original_config, wan.original_rules, "model.diffusion_model.", release="WanModel"
)
_WAN = {
    "transformer": _WAN_TRANSFORMER, "transformer_2": _WAN_TRANSFORMER,
    "vae": Original("AutoencoderKLWan", wan_vae.original_config, wan_vae.original_rules, "vae."),
    "text_encoder": Original(
        "UMT5EncoderModel", single.umt5_config, t5.umt5_rules, "text_encoders.umt5xxl.transformer."
    ),
    "image_encoder": Original("CLIPVisionModel", single.clip_vision_config, clip_vision.original_rules, "visual."),
}  # fmt: skip
ORIGINALS: dict[str, dict[str, Original]] = {"sd3": _ORIGINALS, "wan": _WAN}
EXPERTS = {"low_noise_model": "transformer_2"}
"""Folders of original releases whose transformer is not the first one."""

_MMDIT = ("x_embedder.proj.weight", "joint_blocks.{i}.x_block.attn.qkv.weight")
_VAE = ("encoder.down.{i}.block.{j}.conv1.weight", "decoder.conv_in.weight")
_CLIP = ("text_model.encoder.layers.{i}.self_attn.q_proj.weight",)
_T5 = ("encoder.block.{i}.layer.0.SelfAttention.q.weight",)
_WAN_DIT = ("patch_embedding.weight", "head.modulation", "blocks.{i}.self_attn.q.weight")
_UMT5 = ("token_embedding.weight", "blocks.{i}.attn.q.weight", "blocks.{i}.ffn.gate.0.weight")
_SECOND_BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
_VIT = ("cls_embedding", "transformer.{i}.attn.to_qkv.weight")
_VISION = ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.{i}.self_attn.q_proj.weight")
_WAN_VAE = ("encoder.conv1.weight", "encoder.middle.0.residual.2.weight", "decoder.head.2.weight")
_WIDE = "text_model.encoder.layers.31.self_attn.q_proj.weight"
SIGNATURES: list[Signature] = [
    Signature("sd3", "transformer", _MMDIT, (), "model.diffusion_model."),
    Signature("sd3", "vae", _VAE, (), "first_stage_model."),
    Signature("sd3", "text_encoder", _CLIP, (), "text_encoders.clip_l.transformer."),
    Signature("sd3", "text_encoder_2", _CLIP, (), "text_encoders.clip_g.transformer."),
    Signature("sd3", "text_encoder_3", _T5, (), "text_encoders.t5xxl.transformer."),
    Signature("wan", "transformer", _WAN_DIT, (), "model.diffusion_model."),
    Signature("wan", "text_encoder", _UMT5, (), "text_encoders.umt5xxl.transformer."),
    Signature("wan", "text_encoder", _T5, (), "text_encoders.umt5xxl.transformer."),
    Signature("wan", "image_encoder", _VIT, (), "visual."),
    Signature("sd3", "transformer", _MMDIT),
    Signature("wan", "vae", _WAN_VAE, (), "vae."),
    Signature("wan", "transformer", _WAN_DIT),
    Signature("wan", "vae", _WAN_VAE),
    Signature("wan", "text_encoder", _UMT5),
    Signature("wan", "text_encoder", (*_T5, _SECOND_BIAS)),
    Signature("wan", "image_encoder", _VISION),
    Signature("sd3", "text_encoder_2", (*_CLIP, _WIDE)),
    Signature("sd3", "text_encoder", _CLIP, (_WIDE,)),
    Signature("sd3", "text_encoder_3", _T5, (_SECOND_BIAS,)),
    Signature("sd3", "vae", _VAE),
]
IGNORED_PREFIXES = ("model_ema.", "model_sampling.", "cond_stage_model.", "text_encoders.clip_l.logit_scale",
                    "text_encoders.clip_g.logit_scale", "text_encoders.t5xxl.logit_scale",
                    "text_encoders.umt5xxl.logit_scale", "textual.", "log_scale")  # fmt: skip


def of_config(cfg: Any) -> Component:
    """The component of one of our configs."""
    for component in COMPONENTS.values():
        if component.module is MODULES[type(cfg)]:
            return component
    raise KeyError(type(cfg).__name__)


def describe(cfg: Any) -> dict[str, Any]:
    """A config as JSON: its class and the fields that are architecture (placement and dtype are chosen at loading)."""
    fields = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("dtype", "rules")}
    return {"class": type(cfg).__name__, **fields}


def from_description(value: Mapping[str, Any]) -> Any:
    """The inverse of `describe`.

    Raises:
        ValueError: an unknown class or field.
    """
    classes = {c.__name__: c for c in MODULES}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "class"}
    if value.get("class") not in classes:
        raise ValueError(f"unknown config class {value.get('class')!r}; there are {sorted(classes)}")
    try:
        return classes[value["class"]](**fields)
    except TypeError as e:
        raise ValueError(f"{value['class']}: {e}") from None


def placed(cfg: Any, dtype: str, rules: Rules) -> Any:
    return dataclasses.replace(cfg, dtype=dtype, rules=rules)


def rules_of(cfg: Any) -> Sequence[Rule]:
    """RULES of a config's diffusers (transformers) layout."""
    return of_config(cfg).rules(cfg)
