"""Variants: name -> architecture of each component and how it is run. Literals only; each is checked against upstream's
config.json values and parameter counts in tests/test_zoo.py."""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx

from jdit.nn.mmdit import MMDiT, MMDiTConfig
from jdit.nn.text.clip import CLIPText, CLIPTextConfig
from jdit.nn.text.t5 import T5, T5Config
from jdit.nn.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.nn.vision.clip import CLIPVision, CLIPVisionConfig
from jdit.nn.wan import Wan, WanConfig
from jdit.structs import Plan


class Variant(NamedTuple):
    """A named model: its family, component configs by upstream's names, scheduler config, plan, and where it lives."""

    family: str
    components: dict[str, Any]
    scheduler: dict[str, Any]
    plan: Plan
    source: str
    about: str


MODULES: dict[type, type[nnx.Module]] = {
    MMDiTConfig: MMDiT,
    AutoencoderKLConfig: AutoencoderKL,
    AutoencoderKLWanConfig: AutoencoderKLWan,
    CLIPTextConfig: CLIPText,
    T5Config: T5,
    CLIPVisionConfig: CLIPVision,
    WanConfig: Wan,
}

_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_CLIP_L = CLIPTextConfig()
_CLIP_G = CLIPTextConfig(width=1280, mlp=5120, layers=32, heads=20, act="gelu", projection=1280)
_SD3 = MMDiTConfig(layers=24, heads=24, pos_size=192)
_SD35_LARGE = dataclasses.replace(_SD3, layers=38, heads=38, qk_norm="rms_norm")


def _sd3(transformer: MMDiTConfig) -> dict[str, Any]:
    return {
        "transformer": transformer, "vae": AutoencoderKLConfig(), "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G,
        "text_encoder_3": T5Config(),
    }  # fmt: skip


VARIANTS: dict[str, Variant] = {
    "sd3-medium": Variant(
        "sd3", _sd3(_SD3), _FLOW, Plan(steps=28, guidance=7.0), "stabilityai/stable-diffusion-3-medium-diffusers",
        "Stable Diffusion 3 medium, 2B",
    ),
    "sd3.5-medium": Variant(
        "sd3", _sd3(dataclasses.replace(_SD3, pos_size=384, dual_layers=tuple(range(13)), qk_norm="rms_norm")), _FLOW,
        Plan(steps=40, guidance=4.5), "stabilityai/stable-diffusion-3.5-medium", "Stable Diffusion 3.5 medium, 2.5B",
    ),
    "sd3.5-large": Variant(
        "sd3", _sd3(_SD35_LARGE), _FLOW, Plan(steps=28, guidance=3.5), "stabilityai/stable-diffusion-3.5-large",
        "Stable Diffusion 3.5 large, 8B",
    ),
    "sd3.5-large-turbo": Variant(
        "sd3", _sd3(_SD35_LARGE), _FLOW, Plan(steps=4, guidance=1.0), "stabilityai/stable-diffusion-3.5-large-turbo",
        "Stable Diffusion 3.5 large, distilled to 4 steps",
    ),
}  # fmt: skip

BUNDLED: dict[str, Plan] = {"fluent-image": Plan(steps=20, guidance=4.0)}
"""Models inside the package (jdit/assets), by name; their configs are in their folders."""

DEFAULT = "fluent-image"


def recognise(configs: dict[str, Any], name: str = "") -> str | None:
    """The variant whose transformer has this architecture (placement, dtype aside); `name` decides between equals."""
    same = lambda a, b: a is not None and b is not None and dataclasses.replace(a, dtype=b.dtype, rules=b.rules) == b
    found = [v for v, known in VARIANTS.items() if same(configs.get("transformer"), known.components["transformer"])]
    named = [v for v in found if "turbo" in v] if "turbo" in name.lower() else [v for v in found if "turbo" not in v]
    return (named or found or [None])[0]
