"""From the results of a recipe's stages to one diffusers folder."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jdit.atomic import whole, write_file

SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "flow_shift": 1.0, "solver_order": 2, "solver_type": "bh2",
}  # fmt: skip
"""Second order on the times of training, unshifted."""


class Layout(NamedTuple):
    """parts: component -> the stage whose folder has it, in the order of the stages. index: model_index.json."""

    parts: dict[str, str]
    index: dict[str, Any]


_SCHEDULER_CLASS = ["diffusers", SCHEDULER["_class_name"]]
SD3 = Layout(
    {
        "vae": "vae", "text_encoder": "text", "text_encoder_2": "text", "tokenizer": "text", "tokenizer_2": "text",
        "transformer": "mmdit",
    },
    {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.31.0",
        "scheduler": _SCHEDULER_CLASS,
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    },
)  # fmt: skip
WAN = Layout(
    {"vae": "vae", "tokenizer": "wan", "text_encoder": "wan", "transformer": "wan"},
    {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": _SCHEDULER_CLASS,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
)

WAN_ANIMATE = Layout(
    {
        "vae": "fluent-video/vae", "tokenizer": "fluent-video/wan", "text_encoder": "fluent-video/wan",
        "image_encoder": "animate", "image_processor": "animate", "transformer": "animate",
    },
    {
        "_class_name": "WanAnimatePipeline",
        "_diffusers_version": "0.36.0",
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
        "scheduler": _SCHEDULER_CLASS,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanAnimateTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
)  # fmt: skip


def export(stages: dict[str, Path], out: str | Path, *, layout: Layout = SD3, overwrite: bool = False) -> Path:
    """Write a pipeline that diffusers' StableDiffusion3Pipeline (WanPipeline, WanAnimatePipeline) and jdit load.

    Args:
        stages: stage -> the folder of that run.

    Raises:
        ValueError: a run that is not finished.
    """
    sources = {part: Path(stages[stage]) / part for part, stage in layout.parts.items()}
    if missing := [str(p) for p in sources.values() if not p.is_dir()]:
        raise ValueError(f"missing {', '.join(missing)}: finish these runs first")
    with whole(out, overwrite=overwrite) as folder:
        for part, source in sources.items():
            shutil.copytree(source, folder / part)
            if part in (
                "text_encoder",
                "text_encoder_2",
                "image_encoder",
            ):  # else transformers loads bfloat16 where diffusers loads float32
                config = json.loads((source / "config.json").read_text())
                write_file(folder / part / "config.json", json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
        (folder / "scheduler").mkdir()
        write_file(folder / "scheduler" / "scheduler_config.json", json.dumps(SCHEDULER, indent=2) + "\n")
        write_file(folder / "model_index.json", json.dumps(layout.index, indent=2) + "\n")
    return Path(out)
