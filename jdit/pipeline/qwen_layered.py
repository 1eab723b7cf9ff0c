"""Qwen-Image-Layered: a picture taken apart into layers with transparency (arXiv 2512.15603; upstream
pipelines/qwenimage/pipeline_qwenimage_layered.py).

The transformer sees the latents of the picture, numbered -1, beside those which it makes: the whole picture again,
then its layers.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jdit import media
from jdit.pipeline import qwen_stages as stage
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage
from jdit.pipeline.qwen_image import QwenImageGeneration
from jdit.pipeline.qwen_pictures import area_size
from jdit.structs import Prompt

LAYERS = 4
RESOLUTIONS = (640, 1024)
"""The first is that of a call which does not say."""


class QwenImageLayering(QwenImageGeneration):
    """Qwen-Image-Layered, which takes one picture apart: `image`, whose transparency counts, with a prompt that says
    what is in it. The result's `.pixels` are (B, layers, H, W, 4): red, green, blue, opacity; the lowest layer first.

    Beside the common arguments: `layers` (4), `resolution` (640 or 1024: the layers have about its square of pixels, in
    the proportions of the picture, and no other size), `cfg_normalize` (after guidance every token has the norm of the
    positive prediction, False), `two_passes`, `vae_tiling`, `vae_slicing`. `latents` are (B, layers + 1, h, w, C).
    Without a negative prompt guidance steers away from the empty one, as in every family. Upstream lets its language
    model describe the picture where the prompt is empty; here that is refused.
    """

    takes = (
        "negative_prompt", "image", "layers", "resolution", "steps", "guidance", "cfg_normalize", "shift", "solver",
        "latents", "max_text_tokens", "two_passes", "vae_tiling", "vae_slicing",
    )  # fmt: skip
    layered = True
    cfg_normalize = False
    _shown, _decoded = LAYERS + 2, LAYERS

    # ---- arguments

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        if given.get("image") is None:
            return ["this model takes a picture apart: it needs image"]
        resolution, out = given.get("resolution"), self._number_problems(given)
        if resolution not in (None, *RESOLUTIONS):
            out.append(f"resolution={resolution!r}; there are {' and '.join(map(str, RESOLUTIONS))}")
        return out

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """See the base class; that of a square picture."""
        return super().size(or_(height, RESOLUTIONS[0]), or_(width, RESOLUTIONS[0]))

    def run_size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """The size of a call, which the proportions of its picture say.

        Raises:
            ValueError: one side of the picture is far longer than the other.
        """
        height, width, _ = self.pictures(given["image"])[0].shape
        size = area_size(height, width, or_(given.get("resolution"), RESOLUTIONS[0]) ** 2)
        if min(size) < 1:
            raise ValueError(f"a picture of {height} x {width} would become {size[0]} x {size[1]} pixels")
        return size

    def check(self, **arguments: Any):
        """See the base class."""
        super().check(**arguments)
        self.run_size(arguments)

    def check_prompt(self, prompt: Any):
        """See the base class."""
        texts = prompt if isinstance(prompt, list | tuple) and not isinstance(prompt, Prompt) else [prompt]
        if any(text is None or (isinstance(text, str) and not text.strip()) for text in texts):
            raise ValueError("the prompt is empty; describe the picture, for this model writes no captions of its own")

    def _encode(self, prompt, negative, timings, **of_text: Any) -> Prompt:
        self.check_prompt(prompt)
        return super()._encode(prompt, negative, timings, **of_text)

    # ---- the call

    def _mu(self, config: Mapping[str, Any], tokens: int) -> float:
        return math.sqrt(tokens / 256)

    def _layers(self, a: Mapping[str, Any]) -> tuple[int, ...]:
        return (or_(a.get("layers"), LAYERS) + 1,)

    def _redraws(self, a: Mapping[str, Any]) -> bool:
        return False

    def _pictured(self, a: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], list[Stage]]:
        image = media.resize(a["image"][0], height, width)
        return {"images": (jnp.asarray(image)[None],)}, [stage.ENCODE_PICTURES]
