"""Qwen2.5-VL (arXiv 2502.13923; transformers' models/qwen2_5_vl/modeling_qwen2_5_vl.py) as an encoder of prompts with
pictures in them: the vision tower's tokens stand in the prompt where its picture tokens are.

B batch, N tokens, D width, M picture tokens, A = 3 axes of positions (frame, row, column).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn.text.decoder import Decoder, DecoderConfig, with_pictures
from jdit.nn.vision.qwen2_5_vl import Qwen2_5Vision, Qwen2_5VisionConfig
from jdit.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Qwen2_5VLConfig:
    """Architecture. The defaults are the 7B model's, which Qwen-Image has.

    Attributes:
        language, vision: the parts, which take dtype and rules from here; vision None leaves out the tower.
        image_token_id: the token that a picture's tokens replace.
    """

    language: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    vision: Qwen2_5VisionConfig | None = dataclasses.field(default_factory=Qwen2_5VisionConfig)
    image_token_id: int = 151655
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        for name, cls in (("language", DecoderConfig), ("vision", Qwen2_5VisionConfig)):
            part: Any = getattr(self, name)
            if isinstance(part, Mapping):  # read from a file
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
                part = cls(**fields)
            if part is not None:
                object.__setattr__(self, name, dataclasses.replace(part, dtype=self.dtype, rules=self.rules))
        if self.vision is not None and self.vision.out != self.language.width:
            raise ValueError(f"vision.out={self.vision.out} must be the language model's width {self.language.width}")


def picture_positions(
    tokens: Int[np.ndarray, "B N"], grids: Sequence[tuple[int, int]], image_token_id: int = 151655
) -> Int[np.ndarray, "B N 3"]:
    """M-RoPE positions of prompts with pictures, on the host (arXiv 2409.12191, section 2.1.1).

    A token of text has the next number on all three axes. A picture's tokens share the next number as their frame, and
    their rows and columns count from it; the text goes on after the longer side.

    Args:
        tokens: padding, if any, goes last.
        grids: rows and columns of tokens of each picture, the same pictures in each prompt.

    Raises:
        ValueError: a prompt whose picture tokens are not those of the pictures, each picture's in one run.
    """
    out = np.empty((*tokens.shape, 3), np.int32)
    for b, row in enumerate(np.asarray(tokens)):
        is_picture, at, now = row == image_token_id, 0, 0
        if (have := int(is_picture.sum())) != (want := sum(h * w for h, w in grids)):
            raise ValueError(f"prompt {b} has {have} picture tokens, its pictures make {want}: {list(grids)}")
        for h, w in grids:
            start = at + int(is_picture[at:].argmax())
            out[b, at:start] = now + np.arange(start - at)[:, None]
            now, at = now + start - at, start + h * w
            if not is_picture[start:at].all():
                raise ValueError(f"prompt {b}: the {h * w} tokens of a picture do not follow one another")
            cells = np.meshgrid([0], np.arange(h), np.arange(w), indexing="ij")
            out[b, start:at] = now + np.stack(cells, -1).reshape(-1, 3)
            now += max(h, w)
        out[b, at:] = now + np.arange(len(row) - at)[:, None]
    return out


class Qwen2_5VL(nnx.Module):
    """Language model and, unless the config leaves it out, vision tower."""

    def __init__(self, cfg: Qwen2_5VLConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.language = Decoder(cfg.language, rngs=rngs)
        if cfg.vision is not None:
            self.vision = Qwen2_5Vision(cfg.vision, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B N"],
        features: Float[Array, "_ M D"] | None = None,
        positions: Int[Array, "B N 3"] | None = None,
        *,
        skip: int = 0,
    ) -> Float[Array, "B N D"]:
        """Encode prompts: `hidden_states[-1]` upstream, or an earlier one (`Decoder.states`).

        Args:
            tokens: right-padded. Their picture tokens become the features, in order.
            features: what `vision` makes of the pictures, for each prompt, or once for all.
            positions: `picture_positions`; None numbers the tokens from 0 on, as is right without pictures.

        Raises:
            ValueError: features without positions.
        """
        x = self.language.tokens(tokens)
        if features is not None:
            if positions is None:
                raise ValueError("prompts with pictures need `positions` (picture_positions makes them)")
            x = with_pictures(x, tokens == self.cfg.image_token_id, features)
        return self.language.states(x, positions, skip=skip)

    def padded(
        self,
        tokens: Int[Array, "B N"],
        lengths: Int[Array, "B"],
        drop: int,
        features: Float[Array, "_ M D"] | None = None,
        positions: Int[Array, "B N 3"] | None = None,
    ) -> Float[Array, "B N-drop D"]:
        """States without the first `drop` of each row (the template's), zeros from `lengths` on, as Qwen-Image's
        pipelines hand them to the transformer; the rows' lengths become `lengths` - `drop`."""
        states = self(tokens, features, positions)[:, drop:]
        return jnp.where((jnp.arange(states.shape[1]) < (lengths - drop)[:, None])[..., None], states, 0)
