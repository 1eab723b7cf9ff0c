"""HunyuanVideo: picture to video (upstream pipelines/hunyuan_video/pipeline_hunyuan_video_image2video.py). The stages
are in `hunyuan_pictures` and `hunyuan_stages`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jdit import media
from jdit.nn.text.llava import LlavaConfig
from jdit.pipeline import base, calls
from jdit.pipeline import hunyuan_pictures as pictured
from jdit.pipeline import hunyuan_stages as stage
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage, run
from jdit.pipeline.hunyuan_video import HunyuanVideoGeneration
from jdit.preprocess import ImageProcessor
from jdit.structs import Prompt


class HunyuanVideoFromPicture(HunyuanVideoGeneration):
    """HunyuanVideo's picture to video, of both kinds: the picture beside the noise ("latent_concat"), or as the first
    frame ("token_replace").

    Takes what `HunyuanVideoGeneration` takes, and `image`, which it needs. The first of the two leaves out the first
    four frames that it makes, as upstream: of `num_frames` 129 there are 125. A negative prompt is encoded with a black
    picture.
    """

    takes = (*HunyuanVideoGeneration.takes, "image")
    of_text = ("max_text_tokens", "image")
    kinds = HunyuanVideoGeneration.kinds | {"text_encoder": LlavaConfig}
    conditions = ("latent_concat", "token_replace")
    encode_text: ClassVar[Stage] = pictured.ENCODE_TEXT
    begin: ClassVar[tuple[Stage, ...]] = (pictured.BEGIN, stage.PREPARE)

    # ---- what the checkpoint is

    @property
    def _concat(self) -> bool:
        return self._cfg.condition == "latent_concat"

    @classmethod
    def misfits(cls, parts: base.Parts) -> list[str]:
        """See the base class."""
        out, encoder = super().misfits(parts), parts.configs.get("text_encoder")
        if not isinstance(encoder, LlavaConfig):
            return out
        try:
            crop, side = _processor(parts).crop, encoder.vision.image_size
            if crop != (side, side):
                out.append(f"image_processor makes pictures of {crop}, the text_encoder takes {(side, side)}")
        except ValueError as e:
            out.append(f"image_processor: {e}")
        if tokenizer := parts.tokenizers.get("tokenizer"):
            have, want = tokenizer.backend.token_to_id(pictured.PICTURE), encoder.image_token_id
            if have != want:
                out.append(f"tokenizer: {pictured.PICTURE} is {have}, the text_encoder's image_token_index is {want}")
        return out

    # ---- arguments

    def frames(self, num_frames: int | None = None) -> int:
        """See the base class."""
        frames, least = super().frames(num_frames), pictured.LEFT_OUT + 1
        if self._concat and frames < least:
            raise ValueError(
                f"num_frames={frames} does not work, {least} would: this model leaves out the first {least - 1}"
            )
        return frames

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        needed = [] if given.get("image") is not None else ["this model makes videos of a picture: it needs image"]
        return needed + super().problems(given)

    # ---- prompts

    def _encode(self, prompt, negative, timings, max_text_tokens=None, image=None) -> Prompt:
        if problems := calls.number_problems({"max_text_tokens": max_text_tokens}):
            raise ValueError("; ".join(problems))
        if image is None:
            raise ValueError("this model makes videos of a picture: its prompts are encoded with image")
        texts, count = calls.both_texts(prompt, negative)
        self.ready()
        (picture,), negatives = self.pictures(image), len(texts) - count
        every = [pictured.NEGATIVE_EVERY] * negatives + [pictured.EVERY[self._cfg.condition]] * count
        most, encoder = or_(max_text_tokens, self.plan.max_text_tokens), self.parts.configs["text_encoder"]
        ids = pictured.prompt_ids(self.parts.tokenizers["tokenizer"], texts, every, encoder.tokens, most)
        shown = [np.zeros_like(picture)] * (negatives > 0) + [picture]
        values: dict[str, Any] = {
            "tokens": jnp.asarray(ids.tokens), "seen": jnp.asarray(ids.seen), "lengths": jnp.asarray(ids.lengths),
            "clip_ids": self._clip_ids(texts), "pixels": jnp.asarray(_processor(self.parts)(shown)),
            "which": jnp.asarray([0] * negatives + [len(shown) - 1] * count),
        }  # fmt: skip
        values, spent = run([self.encode_text], self.weights, values)
        timings |= spent
        return calls.halves(values["encoded"], count, negative)

    # ---- the call

    @property
    def decode(self) -> Stage:
        """See the base class."""
        return pictured.DECODE_REST if self._concat else stage.DECODE

    @property
    def _text_tokens(self) -> int:
        every = pictured.EVERY[self._cfg.condition] if self.rows == 1 else pictured.NEGATIVE_EVERY
        encoder = self.parts.configs.get("text_encoder", LlavaConfig())
        return pictured.seen_tokens(encoder.tokens, every, self.plan.max_text_tokens)

    def _picture(self, a: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
        image = media.resize(media.picture(a["image"]), height, width)
        return {"image": jnp.asarray(image)[None], "concat": self._concat}


def _processor(parts: base.Parts) -> ImageProcessor:
    """What brings a picture to the encoder's form."""
    return ImageProcessor.of(parts.settings, parts.configs["text_encoder"].vision.image_size)
