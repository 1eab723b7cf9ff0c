"""Tiny Qwen-Image pipelines in torch, every parameter random, in the folders that diffusers saves."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as layered
from PIL import Image
from test_autoencoder_kl_wan import randomise as randomise_vae
from test_token_ids import real
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from util_qwen2_5_vl import TEXT, VISION
from util_sd3 import noise, randomise

from convert import autoencoder_kl_qwen_image as vae_tables
from convert import registry, stream, write
from convert.readers import open_folder
from jdit import sharding, zoo
from jdit.nn.vae.autoencoder_kl_wan_config import MEAN_21, STD_21
from jdit.pipeline import qwen_edit, qwen_layered

PAD = "<|image_pad|>"
SIDE = 96
"""Pixels a side that stand for upstream's 1024 in editing, and for its 640 in layers."""
SHORT = FlowMatchEulerDiscreteScheduler(
    **{k: v for k, v in zoo.VARIANTS["qwen-image"].scheduler.items() if k[0] != "_"}
)
PIPELINES = {
    "QwenImagePipeline": QwenImagePipeline, "QwenImageEditPipeline": QwenImageEditPipeline,
    "QwenImageEditPlusPipeline": QwenImageEditPlusPipeline,
}  # fmt: skip


class Processor:
    """Qwen2_5_VLProcessor's work (its class needs torchvision): pictures, and a token for each of theirs in a text."""

    def __init__(self, tokenizer, image_processor):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(self, text, images, padding, return_tensors):
        images = images if isinstance(images, list) else [images]
        pictures = self.image_processor(images, return_tensors=return_tensors)
        parts, grids = text[0].split(PAD), pictures["image_grid_thw"].tolist()
        assert len(text) == 1 and len(parts) == len(grids) + 1
        text = parts[0] + "".join(PAD * (h * w // 4) + part for (_, h, w), part in zip(grids, parts[1:]))
        return transformers.BatchFeature({**self.tokenizer([text], return_tensors="pt"), **pictures})


def text_encoder(words: int) -> transformers.Qwen2_5_VLForConditionalGeneration:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": words, "num_hidden_layers": 2}, vision_config={**VISION, "depth": 2,
        "fullatt_block_indexes": [1]}, image_token_id=151655,
    )  # fmt: skip
    model = randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), 3)
    forward = model.forward

    def typed(input_ids, **kw):
        """This release's pipelines lose the types of the tokens, and with them the positions of the pictures'."""
        return forward(input_ids=input_ids, mm_token_type_ids=(input_ids == 151655).int(), **kw)

    model.forward = typed
    return model


def components(channels: int = 3, z: int = 4, **transformer) -> dict:
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(real("qwen_image/tokenizer"))
    rng = np.random.default_rng(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=z, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=rng.normal(size=z).tolist(),
        latents_std=rng.uniform(0.5, 2, z).tolist(), input_channels=channels,
    )  # fmt: skip
    dit = QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * z, out_channels=z, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT["hidden_size"], axes_dims_rope=(4, 6, 6), **transformer,
    )  # fmt: skip
    return {
        "scheduler": SHORT, "vae": randomise_vae(vae), "text_encoder": text_encoder(151700), "tokenizer": tokenizer,
        "transformer": randomise(dit, 1),
    }  # fmt: skip


def original_vae(file: Path, **config):
    """Write a random autoencoder as the single files of releases are; returns our config of it."""
    kw = dict(base_dim=4, z_dim=16, latents_mean=list(MEAN_21), latents_std=list(STD_21))
    folder, vae = file.with_suffix(""), registry.COMPONENTS[vae_tables.CLASS]
    randomise_vae(AutoencoderKLQwenImage(**kw, **config)).save_pretrained(folder)
    cfg = vae.config(json.loads((folder / "config.json").read_text()))
    with open_folder(folder) as reader:
        leaves = stream.load_leaves(reader, vae.rules(cfg), vae.targets(cfg))
    dotted = {sharding.dotted(path): array for path, array in leaves.items()}
    write.write_tensors(file, write.outputs(dotted, vae_tables.original_rules(cfg)))
    shutil.rmtree(folder)
    return cfg


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(patch_size=4, min_pixels=24 * 24, max_pixels=88 * 88)


def made(cls, parts: dict):
    shown = any(kind in cls.__name__ for kind in ("Edit", "Layered"))
    more = {"processor": Processor(parts["tokenizer"], image_processor())} if shown else {}
    pipe = cls(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(folder: Path, parts: dict, names: Sequence[str] = tuple(PIPELINES)[1:]) -> dict[str, Path]:
    """Folders of pipelines with the same weights, QwenImagePipeline's among them."""
    made(QwenImagePipeline, parts).save_pretrained(folder / "QwenImagePipeline")
    index = json.loads((folder / "QwenImagePipeline" / "model_index.json").read_text())
    for name in names:
        shutil.copytree(folder / "QwenImagePipeline", folder / name)
        more = {"_class_name": name, "processor": ["transformers", "Qwen2VLProcessor"]}
        (folder / name / "model_index.json").write_text(json.dumps(index | more))
        image_processor().save_pretrained(folder / name / "processor")
    return {name: folder / name for name in ("QwenImagePipeline", *names)}


def smaller(monkeypatch, side: int = SIDE):
    """Editing at a small size in both: the areas are those of `side` in the place of 1024."""
    share = (side / 1024) ** 2
    for module in (edit, plus):
        full = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, full=full: full(area * share, ratio))
    monkeypatch.setattr(qwen_edit, "AREA", qwen_edit.AREA * share)
    monkeypatch.setattr(qwen_edit.QwenImageEditing, "prompt_area", qwen_edit.AREA)
    monkeypatch.setattr(qwen_edit.QwenImageEditingPlus, "prompt_area", qwen_edit.PROMPT_AREA * share)


def smaller_layers(monkeypatch, side: int = SIDE):
    """Layers at a small size in both: `side` pixels in the place of 640."""
    share, theirs, ours = (side / 640) ** 2, layered.calculate_dimensions, qwen_layered.area_size
    monkeypatch.setattr(layered, "calculate_dimensions", lambda area, ratio: theirs(area * share, ratio))
    monkeypatch.setattr(qwen_layered, "area_size", lambda height, width, area: ours(height, width, area * share))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def latents(count: int, height: int, width: int, seed: int = 0):
    """(packed as upstream wants it, channels last as we want it), for a picture of that many pixels."""
    z = noise(seed, count, 4, height // 8, width // 8)
    return QwenImagePipeline._pack_latents(z, count, 4, height // 8, width // 8), z.movedim(1, -1).numpy()


def unpacked(packed: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Upstream's latents, channels last."""
    return QwenImagePipeline._unpack_latents(packed, height, width, 8)[:, :, 0].movedim(1, -1).numpy()
