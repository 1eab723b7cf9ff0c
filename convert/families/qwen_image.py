"""Qwen-Image and Qwen-Image-Edit: diffusers folders, and single files of each component. Three families, for weights do
not tell whether they generate or edit; the pipeline's class does."""

import dataclasses

from convert import autoencoder_kl_qwen_image as vae
from convert import qwen2_5_vl, qwen_image, single
from convert.family import Family, Original, Processor
from convert.layout import Signature
from jdit import zoo

_DIT = ("img_in.weight", "txt_norm.weight", "transformer_blocks.{i}.attn.add_q_proj.weight")
_MARK = (qwen_image.ZERO_COND_T,)  # Edit-2511's; unmarked files are taken to generate
_VAE = ("encoder.conv1.weight", "encoder.middle.0.residual.2.weight", "decoder.head.2.weight")
_PREFIX, _TEXT = "model.diffusion_model.", "text_encoders.qwen25_7b.transformer."


def _signatures(family: str, marked: bool = False) -> tuple[Signature, ...]:
    prefixes = (_PREFIX, "transformer.", "")
    decoder = lambda p: (f"{p}embed_tokens.weight", f"{p}layers.{{i}}.self_attn.k_proj.bias", f"{p}norm.weight")
    return (
        *(Signature(family, "transformer", (*_DIT, *_MARK), (), prefix) for prefix in prefixes if marked),
        *(Signature(family, "transformer", _DIT, _MARK, prefix) for prefix in prefixes),
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
    signatures=_signatures("qwen-image"),
    ignored=("text_encoders.qwen25_7b.logit_scale",),
    beside={
        "text_encoder": ("qwen_2.5_vl_7b.safetensors", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),
        "vae": ("qwen_image_vae.safetensors",),
    },
)  # fmt: skip
EDIT = dataclasses.replace(
    FAMILY,
    pipelines=("QwenImageEditPipeline", "QwenImageEditInpaintPipeline"),
    signatures=_signatures("qwen-image-edit"),
    processor=Processor("processor", "Qwen2VLProcessor", "tokenizer"),
)
EDIT_PLUS = dataclasses.replace(
    EDIT,
    pipelines=("QwenImageEditPlusPipeline",),
    signatures=_signatures("qwen-image-edit-plus", marked=True),
)
