"""Wan 2.1 and 2.2: diffusers folders, the original releases, and single files repackaged from them."""

from convert import autoencoder_kl_wan as vae
from convert import clip_vision, single, t5, wan
from convert.family import Family, Original
from convert.layout import Signature

_DIT = ("patch_embedding.weight", "head.modulation", "blocks.{i}.self_attn.q.weight")
POSE = "pose_patch_embedding.weight"
"""What tells Wan-Animate's transformer from the others."""
_UMT5 = ("token_embedding.weight", "blocks.{i}.attn.q.weight", "blocks.{i}.ffn.gate.0.weight")
_VIT = ("cls_embedding", "transformer.{i}.attn.to_qkv.weight")
_VISION = ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.{i}.self_attn.q_proj.weight")
_VAE = ("encoder.conv1.weight", "encoder.middle.0.residual.2.weight", "decoder.head.2.weight")
_TEXT = "text_encoders.umt5xxl.transformer."
_TRANSFORMER = Original(
    "WanTransformer3DModel", wan.original_config, wan.original_rules, "model.diffusion_model.", release="WanModel"
)

ENCODERS = {
    "vae": Original("AutoencoderKLWan", vae.original_config, vae.original_rules, "vae."),
    "text_encoder": Original("UMT5EncoderModel", single.umt5_config, t5.umt5_rules, _TEXT),
    "image_encoder": Original("CLIPVisionModel", single.clip_vision_config, clip_vision.original_rules, "visual."),
}


def encoder_signatures(family: str) -> tuple[Signature, ...]:
    """How the encoders and the autoencoder are told, which Wan's releases share."""
    return (
        Signature(family, "text_encoder", _UMT5, (), _TEXT),
        Signature(family, "text_encoder", t5.KEYS, (), _TEXT),
        Signature(family, "image_encoder", _VIT, (), "visual."),
        Signature(family, "vae", _VAE, (), "vae."),
        Signature(family, "vae", _VAE),
        Signature(family, "text_encoder", _UMT5),
        Signature(family, "text_encoder", (*t5.KEYS, t5.SECOND_BIAS)),
        Signature(family, "image_encoder", _VISION),
    )


FAMILY = Family(
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    components={
        "transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel", "vae": "AutoencoderKLWan",
        "text_encoder": "UMT5EncoderModel", "image_encoder": "CLIPVisionModel",
    },
    tokenizers={"tokenizer": "T5TokenizerFast"},
    scheduler={
        "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2,
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0,
    },
    originals={"transformer": _TRANSFORMER, "transformer_2": _TRANSFORMER, **ENCODERS},
    signatures=(
        Signature("wan", "transformer", _DIT, (POSE,), "model.diffusion_model."),
        Signature("wan", "transformer", _DIT, (POSE,)),
        *encoder_signatures("wan"),
    ),
    settings=("boundary_ratio", "expand_timesteps"),
    guess=wan.settings,
    pipeline=wan.pipeline,
    ignored=("text_encoders.umt5xxl.logit_scale", "textual.", "log_scale"),
    tokenizers_beside={"tokenizer": ("google/umt5-xxl",)},
    folders={"low_noise_model": "transformer_2"},
)  # fmt: skip
