"""Tiny HunyuanVideo image-to-video pipelines in torch, every parameter random, saved as diffusers saves them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import util_llava
from diffusers import HunyuanVideoImageToVideoPipeline
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as theirs
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from convert import tokenizers as convert
from jdit.nn.text.llava import Llava
from jdit.nn.text.tokenizer import Tokenizer as Ours

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"]


def llama_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Bytes, the words of the template's headers, and special tokens, split as Llama 3 splits, saved to `folder`."""
    merges = [(a, b) for word in ("system", "user", "assistant", "ĊĊ") for a, b in zip(_heads(word), word[1:])]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    begin = (SPECIAL[0], backend.token_to_id(SPECIAL[0]))
    backend.post_processor = processors.TemplateProcessing(f"{SPECIAL[0]} $A", special_tokens=[begin])
    out = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL[0], pad_token=SPECIAL[-1])
    out.save_pretrained(folder)
    return out


def _heads(word: str) -> list[str]:
    return [word[:i] for i in range(1, len(word))]


def template(tokenizer) -> dict[str, Any]:
    """Upstream's, with the places that it has for this tokenizer and encoder."""
    text = theirs.DEFAULT_PROMPT_TEMPLATE["template"]
    ids = tokenizer(text.split("{}")[0]).input_ids
    at, size = ids.index(tokenizer.convert_tokens_to_ids("<image>")), util_llava.TOKENS
    more = dict(crop_start=len(ids), image_emb_start=at, image_emb_end=at + size, image_emb_len=size)
    return {"template": text, **more}


def text_encoder(tokenizer, seed: int = 3):
    named = {"image_token_index": "<image>", "pad_token_id": "<pad>"}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    return util_llava.upstream(seed, util_llava.TEXT | {"vocab_size": len(tokenizer)}, **ids)


def image_processor() -> CLIPImageProcessorPil:
    side = util_llava.SIDE
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def encoder(folder: Path) -> tuple[HunyuanVideoImageToVideoPipeline, Llava, Ours]:
    """Upstream's pipeline with nothing but what encodes prompts, and ours."""
    tokenizer = llama_tokenizer(folder)
    model = text_encoder(tokenizer)
    model.save_pretrained(folder)
    names = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_2")
    parts: dict[str, Any] = dict.fromkeys(names) | {"text_encoder": model, "tokenizer": tokenizer}
    pipe = HunyuanVideoImageToVideoPipeline(**parts, image_processor=image_processor())
    with torch.no_grad():
        return pipe, util_llava.ported(folder), convert.load(folder)


def pictures(count: int, size: tuple[int, int] = (29, 41), seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def black(size: tuple[int, int] = (29, 41)) -> Image.Image:
    return Image.new("RGB", size[::-1])
