"""Stable Diffusion 3 and 3.5: diffusers folders and original single files."""

from convert import autoencoder_kl, clip, sd3, single, t5
from convert.family import Family, Original
from convert.layout import Signature

_MMDIT = ("x_embedder.proj.weight", "joint_blocks.{i}.x_block.attn.qkv.weight")
_VAE = ("encoder.down.{i}.block.{j}.conv1.weight", "decoder.conv_in.weight")
_CLIP = ("text_model.encoder.layers.{i}.self_attn.q_proj.weight",)
_WIDE = "text_model.encoder.layers.31.self_attn.q_proj.weight"
_ENCODERS = "text_encoders."

FAMILY = Family(
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    components={
        "transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection", "text_encoder_3": "T5EncoderModel",
    },
    tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"},
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    originals={
        "transformer": Original(
            "SD3Transformer2DModel", sd3.original_config, sd3.original_rules, "model.diffusion_model."
        ),
        "vae": Original(
            "AutoencoderKL", single.vae_config, lambda c: autoencoder_kl.original_rules(c, ""), "first_stage_model."
        ),
        "text_encoder": Original(
            "CLIPTextModelWithProjection", lambda s: single.clip_config(s, act="quick_gelu"), clip.original_rules,
            f"{_ENCODERS}clip_l.transformer.", clip.implied,
        ),
        "text_encoder_2": Original(
            "CLIPTextModelWithProjection", lambda s: single.clip_config(s, act="gelu"), clip.original_rules,
            f"{_ENCODERS}clip_g.transformer.", clip.implied,
        ),
        "text_encoder_3": Original(
            "T5EncoderModel", single.t5_config, t5.original_rules, f"{_ENCODERS}t5xxl.transformer."
        ),
    },
    signatures=(
        Signature("sd3", "transformer", _MMDIT, (), "model.diffusion_model."),
        Signature("sd3", "vae", _VAE, (), "first_stage_model."),
        Signature("sd3", "text_encoder", _CLIP, (), f"{_ENCODERS}clip_l.transformer."),
        Signature("sd3", "text_encoder_2", _CLIP, (), f"{_ENCODERS}clip_g.transformer."),
        Signature("sd3", "text_encoder_3", t5.KEYS, (), f"{_ENCODERS}t5xxl.transformer."),
        Signature("sd3", "transformer", _MMDIT),
        Signature("sd3", "text_encoder_2", (*_CLIP, _WIDE)),
        Signature("sd3", "text_encoder", _CLIP, (_WIDE,)),
        Signature("sd3", "text_encoder_3", t5.KEYS, (t5.SECOND_BIAS,)),
        Signature("sd3", "vae", _VAE),
    ),
    ignored=("model_ema.", "model_sampling.", "cond_stage_model.",
             *(f"{_ENCODERS}{n}.logit_scale" for n in ("clip_l", "clip_g", "t5xxl"))),
    beside={
        "text_encoder": ("clip_l.safetensors",), "text_encoder_2": ("clip_g.safetensors",),
        "text_encoder_3": ("t5xxl_fp16.safetensors", "t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors",
                           "t5xxl_fp8_e4m3fn_scaled.safetensors"),
    },
)  # fmt: skip
