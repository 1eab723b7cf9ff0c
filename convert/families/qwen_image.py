"""Qwen-Image and Qwen-Image-Edit: diffusers folders, and single files of the transformer and of the autoencoder. Three
families, for the weights do not tell whether they generate or edit; the pipeline's class does."""

import dataclasses

from convert import autoencoder_kl_qwen_image as vae
from convert import qwen2_5_vl, qwen_image
from convert.family import Family, Original, Processor
from convert.layout import Signature
from jdit import zoo

_DIT = ("img_in.weight", "txt_norm.weight", "transformer_blocks.{i}.attn.add_q_proj.weight")
_VAE = ("encoder.conv1.weight", "encoder.middle.0.residual.2.weight", "decoder.head.2.weight")
_PREFIX = "model.diffusion_model."


_MARK = (qwen_image.ZERO_COND_T,)  # Edit-2511's; unmarked files are taken to generate


def _signatures(family: str, marked: bool = False) -> tuple[Signature, ...]:
    return (
        *(Signature(family, "transformer", (*_DIT, *_MARK), (), prefix) for prefix in (_PREFIX, "") if marked),
        Signature(family, "transformer", _DIT, _MARK, _PREFIX),
        Signature(family, "transformer", _DIT, _MARK),
        Signature(family, "vae", _VAE, (), "vae."),
        Signature(family, "vae", _VAE),
    )


FAMILY = Family(
    pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    components={"transformer": qwen_image.CLASS, "vae": vae.CLASS, "text_encoder": qwen2_5_vl.CLASS},
    tokenizers={"tokenizer": "Qwen2Tokenizer"},
    scheduler=zoo.VARIANTS["qwen-image"].scheduler,
    originals={
        "transformer": Original(qwen_image.CLASS, qwen_image.original_config, qwen_image.original_rules, _PREFIX),
        "vae": Original(vae.CLASS, vae.original_config, vae.original_rules, "vae."),
    },
    signatures=_signatures("qwen-image"),
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
