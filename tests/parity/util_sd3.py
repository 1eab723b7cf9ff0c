"""Tiny Stable Diffusion 3 pipelines in torch, every parameter random, saved as diffusers saves them."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ["a", "red", "blue", "cat", "apple", "on", "the", "moon", "sat", "two"]


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.3) -> torch.nn.Module:
    """Every parameter random, norm weights and biases too; matrices are scaled so that states keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + scale * noise if p.ndim == 1 else noise / p[0].numel() ** 0.5
    return model.eval()


def clip_tokenizer(folder: Path, pad: str, limit: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer over bytes and a few merges, in the vocab.json + merges.txt form."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "t</w>"), ("c", "at</w>"), ("r", "e"), ("re", "d</w>"), ("o", "n</w>")]
    vocab = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=limit)


def t5_tokenizer() -> T5TokenizerFast:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [("▁" + w, -3.0 - i / 9) for i, w in enumerate(WORDS)] + [
        (c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz,."
    ]
    return T5TokenizerFast(vocab=vocab, extra_ids=4)


def transformer(**kw) -> SD3Transformer2DModel:
    cfg = dict(
        sample_size=16, patch_size=2, in_channels=16, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=40, caption_projection_dim=32, pooled_projection_dim=28, out_channels=16,
        pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )  # fmt: skip
    return randomise(SD3Transformer2DModel(**(cfg | kw)), 1)


def vae(**kw) -> AutoencoderKL:
    cfg = dict(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 16, 16), layers_per_block=1,
        latent_channels=16, norm_num_groups=4, sample_size=32, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
    return randomise(AutoencoderKL(**(cfg | kw)), 2)


def pipeline(folder: Path, *, t5: bool = True, scheduler=None, **kw) -> StableDiffusion3Pipeline:
    """A whole tiny SD3 pipeline, saved to `folder`."""
    tokens, tokens_2 = clip_tokenizer(folder / "t1", "<|endoftext|>"), clip_tokenizer(folder / "t2", "!")
    clip = lambda seed, width, act: randomise(
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokens),
                hidden_size=width,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                projection_dim=14,
                hidden_act=act,
                eos_token_id=tokens.eos_token_id,
                bos_token_id=tokens.bos_token_id,
                pad_token_id=tokens.pad_token_id,
            )
        ),
        seed,
    )
    t5_tokens = t5_tokenizer() if t5 else None
    encoder = None
    if t5:
        config = T5Config(
            vocab_size=len(t5_tokens), d_model=40, d_kv=8, d_ff=24, num_layers=2, num_heads=3,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        encoder = randomise(T5EncoderModel(config), 5)
    pipe = StableDiffusion3Pipeline(
        transformer(**kw), scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0), vae(),
        clip(3, 16, "quick_gelu"), tokens, clip(4, 20, "gelu"), tokens_2, encoder, t5_tokens,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    return pipe


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).float().numpy()


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
