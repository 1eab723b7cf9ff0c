"""What is known: upstream's component classes and the families."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert import autoencoder_kl as kl
from convert import autoencoder_kl_cogvideox as cogvideox_vae
from convert import autoencoder_kl_hunyuan_video as hunyuan_vae
from convert import autoencoder_kl_qwen_image as qwen_vae
from convert import autoencoder_kl_wan as wan_vae
from convert import (
    clip,
    clip_vision,
    cogvideox,
    hunyuan_video,
    llama,
    llava,
    qwen2_5_vl,
    qwen_image,
    sd3,
    t5,
    wan,
    wan_animate,
)
from convert.component import Component
from convert.families import cogvideox as cogvideox_family
from convert.families import hunyuan_video as hunyuan_family
from convert.families import qwen_image as qwen_family
from convert.families import sd3 as sd3_family
from convert.families import wan as wan_family
from convert.families import wan_animate as animate_family
from convert.family import Family
from convert.layout import Signature
from convert.table import Rule
from jdit.nn.cogvideox import CogVideoX
from jdit.nn.hunyuan_video import HunyuanVideo
from jdit.nn.mmdit import MMDiT
from jdit.nn.qwen_image import QwenImage
from jdit.nn.text.clip import CLIPText
from jdit.nn.text.decoder import Decoder
from jdit.nn.text.llava import Llava
from jdit.nn.text.qwen2_5_vl import Qwen2_5VL
from jdit.nn.text.t5 import T5
from jdit.nn.vae.autoencoder_kl import AutoencoderKL
from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from jdit.nn.vae.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from jdit.nn.vae.autoencoder_kl_qwen_image import AutoencoderKLQwenImage
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vision.clip import CLIPVision
from jdit.nn.wan import Wan
from jdit.nn.wan_animate import WanAnimate
from jdit.sharding import Rules
from jdit.zoo import MODULES


def _clip(name: str) -> Component:
    read = lambda c: clip.config(c, architecture=name)
    return Component(name, CLIPText, read, clip.upstream_config, clip.rules, "transformers")


def _clip_vision(name: str) -> Component:
    read = lambda c: clip_vision.config(c, architecture=name)
    return Component(name, CLIPVision, read, clip_vision.upstream_config, clip_vision.rules, "transformers")


def _t5(name: str) -> Component:
    read = lambda c: t5.config(c, architecture=name)
    return Component(name, T5, read, t5.upstream_config, t5.rules, "transformers")


def _llama(name: str) -> Component:
    return Component(name, Decoder, llama.config, llama.upstream_config, llama.rules, "transformers")


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
        Component(
            qwen2_5_vl.CLASS, Qwen2_5VL, qwen2_5_vl.config, qwen2_5_vl.upstream_config, qwen2_5_vl.rules, "transformers"
        ),
        _llama(llama.CLASS),
        _llama(llama.CAUSAL),
        Component(llava.CLASS, Llava, llava.config, llava.upstream_config, llava.rules, "transformers"),
        Component("WanTransformer3DModel", Wan, wan.config, wan.upstream_config, wan.rules),
        Component(
            "WanAnimateTransformer3DModel", WanAnimate, wan_animate.config, wan_animate.upstream_config,
            wan_animate.rules,
        ),
        Component(
            cogvideox_vae.CLASS, AutoencoderKLCogVideoX, cogvideox_vae.config, cogvideox_vae.upstream_config,
            cogvideox_vae.rules,
        ),
        Component(
            qwen_vae.CLASS, AutoencoderKLQwenImage, qwen_vae.config, qwen_vae.upstream_config, qwen_vae.rules
        ),
        Component(
            hunyuan_vae.CLASS, AutoencoderKLHunyuanVideo, hunyuan_vae.config, hunyuan_vae.upstream_config,
            hunyuan_vae.rules,
        ),
        Component(cogvideox.CLASS, CogVideoX, cogvideox.config, cogvideox.upstream_config, cogvideox.rules),
        Component(qwen_image.CLASS, QwenImage, qwen_image.config, qwen_image.upstream_config, qwen_image.rules),
        Component(
            hunyuan_video.CLASS, HunyuanVideo, hunyuan_video.config, hunyuan_video.upstream_config, hunyuan_video.rules
        ),
    )
}  # fmt: skip
"""Upstream class -> component."""

FAMILIES: dict[str, Family] = {
    "sd3": sd3_family.FAMILY, "wan": wan_family.FAMILY, "wan-animate": animate_family.FAMILY,
    "cogvideox": cogvideox_family.FAMILY, "qwen-image": qwen_family.FAMILY, "qwen-image-edit": qwen_family.EDIT,
    "qwen-image-edit-plus": qwen_family.EDIT_PLUS, "qwen-image-layered": qwen_family.LAYERED,
    "hunyuan-video": hunyuan_family.FAMILY, "hunyuan-video-i2v": hunyuan_family.FROM_PICTURE,
}  # fmt: skip
"""Our name of a family -> what its checkpoints hold."""

IGNORED_PREFIXES = tuple(prefix for family in FAMILIES.values() for prefix in family.ignored)


def signatures(family: str | None = None) -> list[Signature]:
    """How components are told by their keys, of one family or of all; those with a prefix first, and of them those that
    are told by more than keys."""
    known = [s for n, f in FAMILIES.items() if family in (None, n) for s in f.signatures]
    return sorted(known, key=lambda s: (not s.prefix, s.told is None))


def of_config(cfg: Any) -> Component:
    """The component of one of our configs."""
    for component in COMPONENTS.values():
        if component.module is MODULES[type(cfg)]:
            return component
    raise KeyError(type(cfg).__name__)


def describe(cfg: Any) -> dict[str, Any]:
    """A config as JSON: its class and the fields that are architecture (placement and dtype are chosen at loading)."""
    architecture = lambda fields: {k: v for k, v in fields if k not in ("dtype", "rules")}
    return {"class": type(cfg).__name__, **dataclasses.asdict(cfg, dict_factory=architecture)}


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
