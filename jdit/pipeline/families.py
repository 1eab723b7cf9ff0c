"""The pipeline of each family, by the name that `convert.registry` gives it."""

from jdit.pipeline.base import Pipeline
from jdit.pipeline.cogvideox import CogVideoXVideo
from jdit.pipeline.hunyuan_i2v import HunyuanVideoFromPicture
from jdit.pipeline.hunyuan_video import HunyuanVideoGeneration
from jdit.pipeline.qwen_edit import QwenImageEditing, QwenImageEditingPlus
from jdit.pipeline.qwen_image import QwenImageGeneration
from jdit.pipeline.qwen_layered import QwenImageLayering
from jdit.pipeline.sd3 import StableDiffusion3
from jdit.pipeline.wan import WanVideo
from jdit.pipeline.wan_animate import WanAnimation

PIPELINES: dict[str, type[Pipeline]] = {
    "sd3": StableDiffusion3, "wan": WanVideo, "wan-animate": WanAnimation, "cogvideox": CogVideoXVideo,
    "qwen-image": QwenImageGeneration, "qwen-image-edit": QwenImageEditing,
    "qwen-image-edit-plus": QwenImageEditingPlus, "qwen-image-layered": QwenImageLayering,
    "hunyuan-video": HunyuanVideoGeneration, "hunyuan-video-i2v": HunyuanVideoFromPicture,
}  # fmt: skip
