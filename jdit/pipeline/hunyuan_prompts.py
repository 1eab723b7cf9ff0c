"""What HunyuanVideo's language model is given around a prompt (diffusers pipeline_hunyuan_video.py)."""

from jdit.pipeline.templates import Template

VIDEO = Template(
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|>",
    95,
    begin="<|begin_of_text|>",
)
"""Text to video."""
SKIP = 2
"""Layers of the language model whose states are passed over."""
