"""Wan-Animate (Wan 2.2 Animate 14B): diffusers folders, the original release, single files repackaged from it."""

from convert import wan_animate
from convert.families import wan
from convert.family import Family, Original
from convert.layout import Signature

_DIT = (wan.POSE, "blocks.{i}.self_attn.q.weight", "face_adapter.fuser_blocks.{i}.linear1_q.weight")

FAMILY = Family(
    pipelines=("WanAnimatePipeline",),
    components={
        "transformer": "WanAnimateTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel",
        "image_encoder": "CLIPVisionModel",
    },
    tokenizers=wan.FAMILY.tokenizers,
    scheduler=wan.FAMILY.scheduler,
    originals={
        "transformer": Original(
            "WanAnimateTransformer3DModel", wan_animate.original_config, wan_animate.original_rules,
            "model.diffusion_model.", release="WanAnimateModel",
        ),
        **wan.ENCODERS,
    },
    signatures=(
        Signature("wan-animate", "transformer", _DIT, (), "model.diffusion_model."),
        Signature("wan-animate", "transformer", _DIT),
        *wan.encoder_signatures("wan-animate"),
    ),
    ignored=wan.FAMILY.ignored,
    tokenizers_beside=wan.FAMILY.tokenizers_beside,
)  # fmt: skip
