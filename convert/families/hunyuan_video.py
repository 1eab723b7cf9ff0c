"""HunyuanVideo: diffusers folders, the original releases, and single files repackaged from them."""

import dataclasses

from convert import autoencoder_kl_hunyuan_video as vae
from convert import clip, hunyuan_video, llama, llava, single
from convert.family import Family, Original
from convert.layout import Signature
from jdit import zoo
from jdit.nn.text.clip import CLIPTextConfig

_DIT = ("img_in.proj.weight", "double_blocks.{i}.img_attn_qkv.weight", "single_blocks.{i}.linear1.weight")
_VAE = ("encoder.conv_in.conv.weight", "decoder.up_blocks.{i}.resnets.{j}.conv1.conv.weight", "quant_conv.weight")
_CLIP = ("text_model.encoder.layers.{i}.self_attn.q_proj.weight",)
_QWEN = "{p}layers.{i}.self_attn.k_proj.bias"
"""What Qwen's language model has, and Llama has not."""
_PREFIXES = ("model.diffusion_model.", "model.model.", "")
_LLAMA, _CLIP_L = "text_encoders.llama.transformer.", "text_encoders.clip_l.transformer."


def _clip_config(shapes) -> CLIPTextConfig:
    """CLIP-L, whose projection is not used."""
    return dataclasses.replace(single.clip_config(shapes, act="quick_gelu"), projection=None)


def _signatures(family: str) -> tuple[Signature, ...]:
    decoder = lambda p: (f"{p}embed_tokens.weight", f"{p}layers.{{i}}.self_attn.k_proj.weight", f"{p}norm.weight")
    return (
        *(Signature(family, "transformer", _DIT, (), prefix) for prefix in _PREFIXES),
        *(Signature(family, "vae", _VAE, (), prefix) for prefix in ("vae.", "first_stage_model.", "")),
        *(
            Signature(family, "text_encoder", decoder(p), (_QWEN.replace("{p}", p),), at)
            for at in (_LLAMA, "")
            for p in llama.PREFIXES
        ),
        *(Signature(family, "text_encoder_2", _CLIP, (), at) for at in (_CLIP_L, "")),
    )


FAMILY = Family(
    pipelines=("HunyuanVideoPipeline",),
    components={
        "transformer": hunyuan_video.CLASS, "vae": vae.CLASS, "text_encoder": llama.CLASS,
        "text_encoder_2": clip.PLAIN,
    },
    # not LlamaTokenizerFast, which in transformers 5 builds Llama 2's tokenizer whatever tokenizer.json says
    tokenizers={"tokenizer": "PreTrainedTokenizerFast", "tokenizer_2": "CLIPTokenizer"},
    scheduler=zoo.VARIANTS["hunyuan-video"].scheduler,
    originals={
        "transformer": Original(
            hunyuan_video.CLASS, hunyuan_video.original_config, hunyuan_video.original_rules, _PREFIXES[0]
        ),
        "vae": Original(vae.CLASS, vae.original_config, vae.rules, "vae."),
        "text_encoder": Original(llama.CLASS, single.llama_config, llama.rules, _LLAMA),
        "text_encoder_2": Original(clip.PLAIN, _clip_config, clip.original_rules, _CLIP_L),
    },
    signatures=_signatures("hunyuan-video"),
    ignored=("text_encoders.llama.logit_scale",),
    beside={
        "vae": ("hunyuan_video_vae_bf16.safetensors",),
        "text_encoder": ("llava_llama3_fp16.safetensors", "llava_llama3_fp8_scaled.safetensors"),
        "text_encoder_2": ("clip_l.safetensors",),
    },
)  # fmt: skip
FROM_PICTURE = dataclasses.replace(
    FAMILY,
    pipelines=("HunyuanVideoImageToVideoPipeline",),
    components={**FAMILY.components, "text_encoder": llava.CLASS},
)
