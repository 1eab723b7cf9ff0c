"""HunyuanVideo: diffusers folders, the original releases, and single files repackaged from them."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

from convert import autoencoder_kl_hunyuan_video as vae
from convert import clip, clip_vision, hunyuan_video, llama, llava, single
from convert.family import Family, Original
from convert.layout import Signature
from convert.readers import Reader
from convert.table import Rule, need
from jdit import zoo
from jdit.nn.text.clip import CLIPTextConfig
from jdit.nn.vision.clip import CLIPVisionConfig

_DIT = ("img_in.proj.weight", "double_blocks.{i}.img_attn_qkv.weight", "single_blocks.{i}.linear1.weight")
_VAE = ("encoder.conv_in.conv.weight", "decoder.up_blocks.{i}.resnets.{j}.conv1.conv.weight", "quant_conv.weight")
_CLIP = ("text_model.encoder.layers.{i}.self_attn.q_proj.weight",)
_LLAVA = (
    "language_model.model.embed_tokens.weight", "vision_tower.vision_model.embeddings.class_embedding",
    "multi_modal_projector.linear_1.weight",
)  # fmt: skip
_LLAVA_PREFIX = "text_encoders.llava.transformer."
_QWEN = "{p}layers.{i}.self_attn.k_proj.bias"
"""What Qwen's language model has, and Llama has not."""
_PREFIXES = ("model.diffusion_model.", "model.model.", "")
_LLAMA, _CLIP_L = "text_encoders.llama.transformer.", "text_encoders.clip_l.transformer."


def _clip_config(shapes) -> CLIPTextConfig:
    """CLIP-L, whose projection is not used."""
    return dataclasses.replace(single.clip_config(shapes, act="quick_gelu"), projection=None)


def _clip_rules(cfg: CLIPTextConfig) -> list[Rule]:
    """Of a file of CLIP-L's text tower, or of all of CLIP-L, as the original release has it."""
    others = [r._replace(target=None, layers=None, alias=False) for r in clip_vision.rules(CLIPVisionConfig())]
    return [*clip.original_rules(cfg), *(r for r in others if r.source.startswith(("vision_model.", "visual_")))]


def _of_pictures(reader: Reader, prefix: str) -> bool:
    """Whether a transformer makes videos of pictures: it has channels for one; or, for "token_replace" shows in none of
    its tensors, its file's name or folder says so, or LLaVA is in the file."""
    shapes = reader.keys()
    _, channels, *patch = shapes[f"{prefix}img_in.proj.weight"]
    out = need(shapes, f"{prefix}final_layer.linear.weight", "HunyuanVideo transformer")[0] // math.prod(patch)
    names = (part.lower() for file in reader.files for part in file.parts[-3:])
    told = hunyuan_video.beside_noise(channels, out) or any(re.search("i2v|image.to.video", n) for n in names)
    return told or any(key.startswith(_LLAVA_PREFIX) for key in shapes)


def _signatures(family: str, told: Callable[[Reader, str], bool] | None = None) -> tuple[Signature, ...]:
    decoder = lambda p: (f"{p}embed_tokens.weight", f"{p}layers.{{i}}.self_attn.k_proj.weight", f"{p}norm.weight")
    return (
        *(Signature(family, "transformer", _DIT, (), prefix, told) for prefix in _PREFIXES),
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
        "text_encoder_2": Original(clip.PLAIN, _clip_config, _clip_rules, _CLIP_L),
    },
    signatures=_signatures("hunyuan-video"),
    ignored=("text_encoders.llama.logit_scale",),
    beside={
        "vae": ("hunyuan_video_vae_bf16.safetensors",),
        "text_encoder": ("llava_llama3_fp16.safetensors", "llava_llama3_fp8_scaled.safetensors"),
        "text_encoder_2": ("clip_l.safetensors",),
    },
    tokenizers_beside={"tokenizer": ("text_encoder",), "tokenizer_2": ("text_encoder_2",)},
)  # fmt: skip
_I2V = "hunyuan-video-i2v"
FROM_PICTURE = dataclasses.replace(
    FAMILY,
    pipelines=("HunyuanVideoImageToVideoPipeline",),
    components={**FAMILY.components, "text_encoder": llava.CLASS},
    originals={
        **FAMILY.originals,
        "transformer": FAMILY.originals["transformer"]._replace(
            config=functools.partial(hunyuan_video.original_config, condition="token_replace")
        ),
        "text_encoder": Original(llava.CLASS, single.llava_config, llava.rules, _LLAVA_PREFIX),
    },
    signatures=(
        *(s for s in _signatures(_I2V, _of_pictures) if s.component != "text_encoder"),
        *(Signature(_I2V, "text_encoder", _LLAVA, (), at) for at in (_LLAVA_PREFIX, "")),
    ),
    beside={n: files for n, files in FAMILY.beside.items() if n != "text_encoder"},
    tokenizers_beside={**FAMILY.tokenizers_beside, "tokenizer": ("text_encoder_i2v",)},
)
