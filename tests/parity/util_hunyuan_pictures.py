"""Tiny HunyuanVideo image-to-video pipelines in torch, every parameter random, saved as diffusers saves them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import util_hunyuan_video
import util_llava
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoImageToVideoPipeline
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as upstream
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from util_hunyuan_pipeline import SIZE, clip_text, vae
from util_sd3 import WORDS
from util_tokenizers import LLAMA_SPECIAL, llama3_folder

from convert import tokenizers as convert
from jdit.nn.text.llava import Llava
from jdit.nn.text.tokenizer import Tokenizer

DEFAULT = upstream.DEFAULT_PROMPT_TEMPLATE
_END = DEFAULT["image_emb_start"] + util_llava.TOKENS
TEMPLATE = DEFAULT | {"image_emb_len": util_llava.TOKENS, "image_emb_end": _END}
"""Upstream's, of an encoder with fewer tokens a picture."""
KINDS: dict[str, dict[str, Any]] = {
    "latent_concat": dict(image_condition_type="latent_concat", in_channels=9, guidance_embeds=False),
    "token_replace": dict(image_condition_type="token_replace"),
}


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The words of the template and some more are whole tokens, so that places in the template are upstream's."""
    text = DEFAULT["template"]
    for special in (*LLAMA_SPECIAL, "<image>"):
        text = text.replace(special, "\n")
    text = text.replace("{}", " ".join(WORDS))
    return PreTrainedTokenizerFast.from_pretrained(llama3_folder(folder, text, more=["<image>"]))


def encoders(folder: Path, original: bool = False) -> dict[str, Any]:
    """LLaVA with its tokenizer and its pictures' processor, by upstream's names; `original` as files without config
    imply it."""
    tokens = tokenizer(folder / "t1")
    named = {"image_token_index": "<image>", "pad_token_id": "<pad>"}
    ids = {name: tokens.convert_tokens_to_ids(token) for name, token in named.items()}
    text, vision = util_llava.TEXT | {"vocab_size": len(tokens)}, util_llava.VISION
    if original:
        text |= dict(head_dim=128, num_attention_heads=1, num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=5e5)
        vision = vision | dict(hidden_size=64, num_attention_heads=1, layer_norm_eps=1e-5)
    model = util_llava.upstream(3, text, vision, **ids)
    side = util_llava.SIDE
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return dict(tokenizer=tokens, text_encoder=model, image_processor=processor)


def encoder(folder: Path) -> tuple[HunyuanVideoImageToVideoPipeline, Llava, Tokenizer]:
    """Upstream's pipeline with nothing but what encodes prompts, and ours."""
    parts = encoders(folder)
    parts["text_encoder"].save_pretrained(folder)
    none = dict.fromkeys(("transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_2"))
    pipe = HunyuanVideoImageToVideoPipeline(**parts, **none)  # type: ignore[arg-type]
    return pipe, util_llava.ported(folder), convert.load(folder / "t1")


def pipeline(folder: Path, kind: str, original: bool = False) -> HunyuanVideoImageToVideoPipeline:
    """A whole tiny pipeline, saved to `folder / "model"`; see `encoders`."""
    groups = dict(block_out_channels=(32,) * 4, norm_num_groups=32) if original else {}
    more = dict(attention_head_dim=32, rope_axes_dim=(4, 14, 14)) if original else {}
    pipe = HunyuanVideoImageToVideoPipeline(
        **encoders(folder, original), **clip_text(folder, original), vae=vae(**groups),
        transformer=util_hunyuan_video.transformer(**more, **KINDS[kind]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    return pipe


def pictures(count: int, size: tuple[int, int] = (29, 41), seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def black(size: tuple[int, int] = (29, 41)) -> Image.Image:
    return Image.new("RGB", size[::-1])


def negatives(pipe: HunyuanVideoImageToVideoPipeline, texts: list[str], most: int) -> dict[str, torch.Tensor]:
    """Negative prompts as upstream encodes one, which of several it cannot: it shows them one black picture in all."""
    size = SIZE["height"], SIZE["width"]
    with torch.no_grad():
        each = [pipe.encode_prompt(black(size), t, prompt_template=TEMPLATE, max_sequence_length=most) for t in texts]
    states, pooled, mask = (torch.cat(parts) for parts in zip(*each))
    return {
        "negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled,
        "negative_prompt_attention_mask": mask,
    }  # fmt: skip
