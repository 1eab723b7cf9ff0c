"""LLaVA (arXiv 2304.08485, 2310.03744; transformers' models/llava/modeling_llava.py) as an encoder of prompts with a
picture in them: what a CLIP tower sees stands in the prompt of a Llama where its picture tokens are.

B batch, N tokens, D width, Y X pixel rows and columns, M picture tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jdit.nn.layers import Mlp
from jdit.nn.text.activations import ACTIVATIONS, check_activation
from jdit.nn.text.decoder import LLAMA_3, Decoder, DecoderConfig, with_pictures
from jdit.nn.vision.clip import CLIP_L_336, CLIPVision, CLIPVisionConfig
from jdit.sharding import Rules


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """Architecture. The defaults are llava-llama-3-8b-v1_1's, which HunyuanVideo's image to video has.

    Attributes:
        language, vision: the parts, which take dtype and rules from here.
        image_token_id: the token that a picture's tokens replace.
        pad_token_id: kept for upstream's pipeline, which needs it; padding goes last here, whatever it is.
        feature_layer: which of the tower's states the language model sees, as an index into what upstream calls
            hidden_states: 0 is what enters the first layer, -1 what leaves the last, -2 what enters it.
        class_token: whether it sees the tower's class token, too.
        act: of the projector between them.
    """

    language: DecoderConfig = LLAMA_3
    vision: CLIPVisionConfig = CLIP_L_336
    image_token_id: int = 128257
    pad_token_id: int | None = 128258
    feature_layer: int = -2
    class_token: bool = False
    act: str = "gelu"
    dtype: str = "float32"
    rules: Rules = Rules()

    def __post_init__(self):
        for name, cls in (("language", DecoderConfig), ("vision", CLIPVisionConfig)):
            part: Any = getattr(self, name)
            if isinstance(part, Mapping):  # read from a file
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
                part = cls(**fields)
            object.__setattr__(self, name, dataclasses.replace(part, dtype=self.dtype, rules=self.rules))
        check_activation(self.act)
        states = self.vision.layers + 1
        if not -states <= self.feature_layer < states:
            raise ValueError(
                f"feature_layer={self.feature_layer}; with {states - 1} layers it can be {-states} to {states - 1}"
            )

    @property
    def width(self) -> int:
        """Width D of the states."""
        return self.language.width

    @property
    def tokens(self) -> int:
        """Tokens M of a picture."""
        return self.vision.tokens - (not self.class_token)


class Llava(nnx.Module):
    """Vision tower, projector, language model."""

    def __init__(self, cfg: LlavaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.language = Decoder(cfg.language, rngs=rngs)
        self.vision = CLIPVision(cfg.vision, rngs=rngs)
        seen, width = cfg.vision.width, cfg.language.width
        dtype = jnp.dtype(cfg.dtype)
        self.projector = Mlp(seen, width, ACTIVATIONS[cfg.act], d_out=width, dtype=dtype, rngs=rngs)

    @jax.named_scope("pictures")
    def features(self, pixels: Float[Array, "B Y X 3"]) -> Float[Array, "B M D"]:
        """What stands in a prompt for each of its picture's tokens, of normalised pictures (jdit.preprocess)."""
        cfg, layers = self.cfg, self.cfg.vision.layers
        layer = cfg.feature_layer % (layers + 1)
        seen = self.vision(pixels, skip=max(layers - 1 - layer, 0))
        states = seen.last if layer == layers else seen.states
        return self.projector(states if cfg.class_token else states[:, 1:])

    def __call__(
        self, tokens: Int[Array, "B N"], features: Float[Array, "_ M D"] | None = None, *, skip: int = 0
    ) -> Float[Array, "B N D"]:
        """Encode prompts: `hidden_states[-1]` upstream, or an earlier one (`Decoder.states`).

        Args:
            tokens: right-padded. The M picture tokens of each become the features, in order.
            features: of each prompt's picture, or of one picture for all.
        """
        x = self.language.tokens(tokens)
        if features is not None:
            x = with_pictures(x, tokens == self.cfg.image_token_id, features)
        return self.language.states(x, skip=skip)
