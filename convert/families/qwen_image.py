"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Layered: diffusers folders, and single files of each component. Several
families, for weights do not tell whether they generate or edit; the pipeline's class does."""

import dataclasses

from convert import autoencoder_kl_qwen_image as vae
from convert import qwen2_5_vl, qwen_image, single
from convert.family import Family, Original, Processor
from convert.layout import Signature
from jdit import zoo

_DIT = ("img_in.weight", "txt_norm.weight", "transformer_blocks.{i}.attn.add_q_proj.weight")
_MARKS = (qwen_image.ZERO_COND_T, qwen_image.KINDS)  # Edit-2511's, Layered's; unmarked files are taken to generate
_VAE = ("encoder.conv1.weight", "encoder.middle.0.residual.2.weight", "decoder.head.2.weight")
_PREFIX, _TEXT = "model.diffusion_model.", "text_encoders.qwen25_7b.transformer."


def _signatures(family: str, *marks: str) -> tuple[Signature, ...]:
    """Those of a family whose transformers have one of these marks ("" is none)."""
    prefixes = (_PREFIX, "transformer.", "")
    has, lacks = lambda mark: (*_DIT, *filter(None, [mark])), lambda mark: tuple(m for m in _MARKS if m != mark)
    decoder = lambda p: (f"{p}embed_tokens.weight", f"{p}layers.{{i}}.self_attn.k_proj.bias", f"{p}norm.weight")
    return (
        *(Signature(family, "transformer", has(mark), lacks(mark), prefix) for mark in marks for prefix in prefixes),
        *(Signature(family, "vae", _VAE, (), prefix) for prefix in ("vae.", "")),
        *(Signature(family, "text_encoder", decoder(p), (), at) for at in (_TEXT, "") for p in qwen2_5_vl.LANGUAGE),
    )


FAMILY = Family(
    pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    components={"transformer": qwen_image.CLASS, "vae": vae.CLASS, "text_encoder": qwen2_5_vl.CLASS},
    tokenizers={"tokenizer": "Qwen2Tokenizer"},
    scheduler=zoo.VARIANTS["qwen-image"].scheduler,
    originals={
        "transformer": Original(
            qwen_image.CLASS, qwen_image.original_config, qwen_image.original_rules, _PREFIX, marks=qwen_image.marks
        ),
        "vae": Original(vae.CLASS, vae.original_config, vae.original_rules, "vae."),
        "text_encoder": Original(qwen2_5_vl.CLASS, single.qwen2_5_vl_config, qwen2_5_vl.rules, _TEXT),
    },
    signatures=_signatures("qwen-image", ""),
    ignored=("text_encoders.qwen25_7b.logit_scale",),
    beside={
        "text_encoder": ("qwen_2.5_vl_7b.safetensors", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),
        "vae": ("qwen_image_vae.safetensors",),
    },
)  # fmt: skip
EDIT = dataclasses.replace(
    FAMILY,
    pipelines=("QwenImageEditPipeline", "QwenImageEditInpaintPipeline"),
    signatures=_signatures("qwen-image-edit", ""),
    processor=Processor("processor", "Qwen2VLProcessor", "tokenizer"),
)
EDIT_PLUS = dataclasses.replace(
    EDIT,
    pipelines=("QwenImageEditPlusPipeline",),
    signatures=_signatures("qwen-image-edit-plus", qwen_image.ZERO_COND_T, ""),
)
LAYERED = dataclasses.replace(
    EDIT,
    pipelines=("QwenImageLayeredPipeline",),
    signatures=_signatures("qwen-image-layered", qwen_image.KINDS),
    beside={**FAMILY.beside, "vae": ("qwen_image_layered_vae.safetensors",)},
)
