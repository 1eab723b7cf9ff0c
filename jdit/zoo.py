"""Variants: name -> architecture of each component and how it is run. Literals only; each is checked against upstream's
config.json values and parameter counts in tests/test_zoo.py."""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx

from jdit.nn.cogvideox import CogVideoX, CogVideoXConfig
from jdit.nn.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from jdit.nn.mmdit import MMDiT, MMDiTConfig
from jdit.nn.qwen_image import QwenImage, QwenImageConfig
from jdit.nn.text.clip import CLIPText, CLIPTextConfig
from jdit.nn.text.decoder import LLAMA_3, Decoder, DecoderConfig
from jdit.nn.text.llava import Llava, LlavaConfig
from jdit.nn.text.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig
from jdit.nn.text.t5 import T5, T5Config
from jdit.nn.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from jdit.nn.vae.autoencoder_kl_cogvideox_config import AutoencoderKLCogVideoXConfig
from jdit.nn.vae.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from jdit.nn.vae.autoencoder_kl_hunyuan_video_config import AutoencoderKLHunyuanVideoConfig
from jdit.nn.vae.autoencoder_kl_qwen_image import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.autoencoder_kl_wan_config import MEAN_22, STD_22, AutoencoderKLWanConfig
from jdit.nn.vision.clip import CLIPVision, CLIPVisionConfig
from jdit.nn.wan import Wan, WanConfig
from jdit.nn.wan_animate import WanAnimate
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.structs import Plan


class Variant(NamedTuple):
    """A named model: its family, component configs by upstream's names, scheduler config, plan, and where it lives."""

    family: str
    components: dict[str, Any]
    scheduler: dict[str, Any]
    plan: Plan
    source: str
    about: str
    settings: dict[str, Any] | None = None  # what upstream's model_index.json says beside the components


MODULES: dict[type, type[nnx.Module]] = {
    MMDiTConfig: MMDiT,
    AutoencoderKLConfig: AutoencoderKL,
    AutoencoderKLWanConfig: AutoencoderKLWan,
    CLIPTextConfig: CLIPText,
    T5Config: T5,
    DecoderConfig: Decoder,
    Qwen2_5VLConfig: Qwen2_5VL,
    LlavaConfig: Llava,
    CLIPVisionConfig: CLIPVision,
    WanConfig: Wan,
    WanAnimateConfig: WanAnimate,
    CogVideoXConfig: CogVideoX,
    QwenImageConfig: QwenImage,
    HunyuanVideoConfig: HunyuanVideo,
    AutoencoderKLCogVideoXConfig: AutoencoderKLCogVideoX,
    AutoencoderKLQwenImageConfig: AutoencoderKLQwenImage,
    AutoencoderKLHunyuanVideoConfig: AutoencoderKLHunyuanVideo,
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


PLANS = {
    "wan": Plan(steps=50, guidance=5.0, height=480, width=832, max_text_tokens=512, num_frames=81),
    "wan-animate": Plan(
        steps=20, guidance=1.0, height=720, width=1280, max_text_tokens=512, fps=30.0, segment_frames=77,
    ),
    "cogvideox": Plan(steps=50, guidance=6.0, max_text_tokens=226),  # sizes and frames are in the transformer's config
    "qwen-image": Plan(steps=50, guidance=4.0, max_text_tokens=512),
    "qwen-image-edit": Plan(steps=50, guidance=4.0),  # the picture has the size
    "qwen-image-edit-plus": Plan(steps=40, guidance=4.0),
    "qwen-image-layered": Plan(steps=50, guidance=4.0, max_text_tokens=512),  # and its proportions
    "hunyuan-video": Plan(steps=50, guidance=6.0, height=720, width=1280, num_frames=129, fps=24.0),
    "hunyuan-video-i2v": Plan(steps=50, guidance=6.0, height=720, width=1280, num_frames=129, fps=24.0),
}  # fmt: skip
"""How a family's unknown variants are run; others as Plan() has it."""


def _unipc(shift: float) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2,
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift,
    }  # fmt: skip


_UMT5 = T5Config(vocab_size=256384, shared_bias=False)
_WAN_14B = WanConfig()
_WAN_I2V = dataclasses.replace(_WAN_14B, in_channels=36, image_dim=1280, image_keys=True)
_WAN_22_I2V = dataclasses.replace(_WAN_14B, in_channels=36)
_WAN_5B = WanConfig(heads=24, in_channels=48, out_channels=48, mlp=14336, layers=30)
_WAN_22_VAE = AutoencoderKLWanConfig(
    in_channels=12, out_channels=12, width=160, decoder_width=256, latent_channels=48, residual=True, patch=2,
    mean=MEAN_22, std=STD_22, space_factor=16,
)  # fmt: skip


def _wan(transformer: WanConfig, shift: float, source: str, about: str, vae: Any = None, more: Any = None,
         settings: Any = None, **plan: Any) -> Variant:  # fmt: skip
    components = {"transformer": transformer, "vae": vae or AutoencoderKLWanConfig(), "text_encoder": _UMT5}
    plan_ = dataclasses.replace(PLANS["wan"], **{"fps": 16.0, **plan})
    return Variant("wan", components | (more or {}), _unipc(shift), plan_, source, about, settings)


_VISION = {"image_encoder": CLIPVisionConfig()}
_720P = {"height": 720, "width": 1280}
_WAN_VARIANTS = {  # shifts, steps and guidance of the original releases (wan/configs, generate.py)
    "wan2.1-t2v-1.3b": _wan(
        dataclasses.replace(_WAN_14B, heads=12, mlp=8960, layers=30), 5.0, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "Wan 2.1 text to video, 1.4B",
    ),
    "wan2.1-t2v-14b": _wan(_WAN_14B, 5.0, "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan 2.1 text to video, 14B"),
    "wan2.1-i2v-14b-480p": _wan(
        _WAN_I2V, 3.0, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan 2.1 image to video, 480 x 832", more=_VISION,
        steps=40,
    ),
    "wan2.1-i2v-14b-720p": _wan(
        _WAN_I2V, 5.0, "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "Wan 2.1 image to video, 720 x 1280", more=_VISION,
        steps=40, **_720P,
    ),
    "wan2.1-flf2v-14b-720p": _wan(
        dataclasses.replace(_WAN_I2V, image_positions=514), 16.0, "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        "Wan 2.1 first and last frame to video", more=_VISION, **_720P,
    ),
    "wan2.2-t2v-a14b": _wan(
        _WAN_14B, 12.0, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan 2.2 text to video, two experts of 14B",
        more={"transformer_2": _WAN_14B}, settings={"boundary_ratio": 0.875}, steps=40, guidance=4.0, guidance_2=3.0,
        **_720P,
    ),
    "wan2.2-i2v-a14b": _wan(
        _WAN_22_I2V, 5.0, "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "Wan 2.2 image to video, two experts of 14B",
        more={"transformer_2": _WAN_22_I2V}, settings={"boundary_ratio": 0.9}, steps=40, guidance=3.5, guidance_2=3.5,
    ),
    "wan2.2-ti2v-5b": _wan(
        _WAN_5B, 5.0, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Wan 2.2 text or image to video, 5B", vae=_WAN_22_VAE,
        settings={"expand_timesteps": True}, height=704, width=1280, num_frames=121, fps=24.0,
    ),
}  # fmt: skip

_WAN_ANIMATE = {  # shift, steps, guidance and rate of the original release (wan/configs/wan_animate_14B.py)
    "wan2.2-animate-14b": Variant(
        "wan-animate", {
            "transformer": WanAnimateConfig(image_keys=True), "vae": AutoencoderKLWanConfig(), "text_encoder": _UMT5,
            **_VISION,
        },
        _unipc(5.0), PLANS["wan-animate"],
        "Wan-AI/Wan2.2-Animate-14B-Diffusers", "Wan 2.2 Animate: a character moved by a pose and a face video, 17B",
    ),
}  # fmt: skip


def _cogvideox(transformer: CogVideoXConfig, source: str, about: str, *, scale: float = 0.7, invert: bool = False,
               snr: float = 1.0, **plan: Any) -> Variant:  # fmt: skip
    vae = AutoencoderKLCogVideoXConfig(scale=scale, invert_scale=invert)
    scheduler = {
        "_class_name": "CogVideoXDDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "set_alpha_to_one": True, "snr_shift_scale": snr,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    own = dict(height=480, width=720, num_frames=49, fps=8.0) | plan
    components = {"transformer": transformer, "vae": vae, "text_encoder": T5Config()}
    return Variant("cogvideox", components, scheduler, dataclasses.replace(PLANS["cogvideox"], **own), source, about)


_COG_5B = CogVideoXConfig(heads=48, layers=42, rotary=True)
_COG_15 = dataclasses.replace(
    _COG_5B, patch_frames=2, patch_bias=False, sample_width=300, sample_height=300, sample_frames=81
)
_COG_15_PLAN: dict[str, Any] = {"height": 768, "width": 1360, "num_frames": 81, "fps": 16.0}
_COGVIDEOX_VARIANTS = {
    "cogvideox-2b": _cogvideox(
        CogVideoXConfig(), "zai-org/CogVideoX-2b", "CogVideoX text to video, 2B", scale=1.15258426, snr=3.0
    ),
    "cogvideox-5b": _cogvideox(_COG_5B, "zai-org/CogVideoX-5b", "CogVideoX text to video, 5B"),
    "cogvideox-5b-i2v": _cogvideox(
        dataclasses.replace(_COG_5B, in_channels=32, learned=True), "zai-org/CogVideoX-5b-I2V",
        "CogVideoX image to video, 5B",
    ),
    "cogvideox1.5-5b": _cogvideox(
        _COG_15, "zai-org/CogVideoX1.5-5B", "CogVideoX 1.5 text to video, 5B", invert=True, **_COG_15_PLAN
    ),
    "cogvideox1.5-5b-i2v": _cogvideox(
        dataclasses.replace(_COG_15, in_channels=32, ofs_dim=512), "zai-org/CogVideoX1.5-5B-I2V",
        "CogVideoX 1.5 image to video, 5B", invert=True, **_COG_15_PLAN,
    ),
}  # fmt: skip

_QWEN_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
    "use_dynamic_shifting": True, "time_shift_type": "exponential", "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02,
}  # fmt: skip


def _qwen(family: str, source: str, about: str, transformer: Any = None, vae: Any = None, **plan: Any) -> Variant:
    components = {
        "transformer": transformer or QwenImageConfig(), "vae": vae or AutoencoderKLQwenImageConfig(),
        "text_encoder": Qwen2_5VLConfig(),
    }  # fmt: skip
    return Variant(family, components, _QWEN_SCHEDULER, dataclasses.replace(PLANS[family], **plan), source, about)


_QWEN_VARIANTS = {
    "qwen-image": _qwen(
        "qwen-image", "Qwen/Qwen-Image", "Qwen-Image, 20B", height=1328, width=1328,
    ),
    "qwen-image-2512": _qwen(
        "qwen-image", "Qwen/Qwen-Image-2512", "Qwen-Image of December 2025, 20B", height=1328, width=1328,
    ),
    "qwen-image-edit": _qwen("qwen-image-edit", "Qwen/Qwen-Image-Edit", "Qwen-Image-Edit, one picture, 20B"),
    "qwen-image-edit-2509": _qwen(
        "qwen-image-edit-plus", "Qwen/Qwen-Image-Edit-2509", "Qwen-Image-Edit, several pictures, 20B",
    ),
    "qwen-image-edit-2511": _qwen(
        "qwen-image-edit-plus", "Qwen/Qwen-Image-Edit-2511", "Qwen-Image-Edit, several pictures, 20B",
        QwenImageConfig(zero_cond_t=True),
    ),
    "qwen-image-layered": _qwen(
        "qwen-image-layered", "Qwen/Qwen-Image-Layered", "Qwen-Image-Layered, a picture to its layers, 20B",
        QwenImageConfig(added_t=True, layered=True), AutoencoderKLQwenImageConfig(in_channels=4, out_channels=4),
    ),
}  # fmt: skip


def _hunyuan(source: str, about: str, *, family: str = "hunyuan-video", **plan: Any) -> Variant:
    components = {
        "transformer": HunyuanVideoConfig(), "vae": AutoencoderKLHunyuanVideoConfig(), "text_encoder": LLAMA_3,
        "text_encoder_2": dataclasses.replace(_CLIP_L, projection=None),
    }  # fmt: skip
    own = dataclasses.replace(PLANS[family], **plan)
    return Variant(family, components, {**_FLOW, "shift": own.shift or 7.0}, own, source, about)


def _hunyuan_i2v(source: str, about: str, transformer: HunyuanVideoConfig, **plan: Any) -> Variant:
    variant = _hunyuan(source, about, family="hunyuan-video-i2v", **plan)
    return variant._replace(components=variant.components | {"transformer": transformer, "text_encoder": LlavaConfig()})


_HUNYUAN_VARIANTS = {  # steps, shift and guidance of the original releases (hyvideo/config.py, FastVideo's scripts)
    "hunyuan-video": _hunyuan("hunyuanvideo-community/HunyuanVideo", "HunyuanVideo text to video, 13B"),
    "fasthunyuan": _hunyuan(
        "FastVideo/FastHunyuan-diffusers", "HunyuanVideo text to video, distilled to 6 steps, 13B", steps=6, shift=17.0,
        num_frames=125,
    ),
    "hunyuan-video-i2v": _hunyuan_i2v(
        "hunyuanvideo-community/HunyuanVideo-I2V", "HunyuanVideo picture to video, 13B",
        HunyuanVideoConfig(condition="token_replace"),
    ),
    "hunyuan-video-i2v-33ch": _hunyuan_i2v(
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch", "HunyuanVideo picture to video of March 6, 2025, 13B",
        HunyuanVideoConfig(in_channels=33, guidance=False, condition="latent_concat"), guidance=1.0,
    ),
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
    **_WAN_VARIANTS,
    **_WAN_ANIMATE,
    **_COGVIDEOX_VARIANTS,
    **_QWEN_VARIANTS,
    **_HUNYUAN_VARIANTS,
}  # fmt: skip

BUNDLED: dict[str, Plan] = {
    "fluent-image": Plan(steps=20, guidance=4.0, height=128, width=128),
    "fluent-video": Plan(steps=20, guidance=4.0, height=64, width=64, max_text_tokens=512, num_frames=17, fps=6.0),
    "fluent-animate": Plan(
        steps=20, guidance=1.0, height=64, width=64, max_text_tokens=512, fps=12.0, segment_frames=17,
    ),
}  # fmt: skip
"""Models inside the package (jdit/assets), by name; their configs are in their folders."""

DEFAULT = "fluent-image"


MARKS = ("turbo", "720p", "2512", "fasthunyuan")  # tell variants of one architecture apart


def recognise(configs: dict[str, Any], name: str = "", family: str | None = None) -> str | None:
    """The variant whose transformers have this architecture (placement, dtype aside), of one family or of all; `name`
    decides between equals."""
    plain = lambda cfg, like: None if cfg is None else dataclasses.replace(cfg, dtype=like.dtype, rules=like.rules)
    parts, marks = ("transformer", "transformer_2"), lambda text: {m for m in MARKS if m in text.lower()}
    like = lambda known: all(plain(configs.get(p), known["transformer"]) == known.get(p) for p in parts)
    found = [v for v, known in VARIANTS.items() if family in (None, known.family) and like(known.components)]
    return max((v for v in found if marks(v) <= marks(name)), key=lambda v: len(marks(v)), default=(found or [None])[0])
