"""What Wan's pipelines share: prompts through UMT5, sizes, the memory they need."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdit.nn.text.clean import clean
from jdit.nn.wan import Context
from jdit.pipeline import base, calls
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage, run
from jdit.pipeline.wan_conditions import encode_text
from jdit.preprocess import ImageProcessor
from jdit.structs import Prompt, Text

TEXT = Stage("encode_text", encode_text, ("text_encoder",), ("ids", "lengths"), ("encoded",))


def texts(positive: Text, negative: Text | None) -> Float[Array, "P L J"]:
    """States of all prompts of a call: under guidance the negative ones first."""
    return positive.states if negative is None else jnp.concatenate([negative.states, positive.states])


def change_rows(context: Context, change) -> Context:
    """A change of the batch axis, which comes after that of the layers."""
    return context._replace(**jax.tree.map(change, {"text": context.text, "image": context.image}))


def contexts(transformer, text: Float[Array, "P L J"], tokens: Float[Array, "1 I E"] | None, rows: int) -> Context:
    """Keys and values of the prompts, of each as often as it takes to make `rows`; the picture is everyone's."""
    pictures = None if tokens is None else jnp.broadcast_to(tokens, (text.shape[0], *tokens.shape[1:]))
    context, repeats = transformer.embed_context(text, pictures), rows // text.shape[0]
    return context if repeats == 1 else change_rows(context, lambda a: jnp.repeat(a, repeats, 1))


class WanPipeline(base.Pipeline):
    """Wan's prompts and sizes."""

    def _encode(self, prompt, negative, timings, max_text_tokens=None) -> Prompt:
        if problems := calls.number_problems({"max_text_tokens": max_text_tokens}):
            raise ValueError("; ".join(problems))
        both, count = calls.both_texts(prompt, negative)
        self.ready()
        tokenizer, length = self.parts.tokenizers["tokenizer"], or_(max_text_tokens, self.plan.max_text_tokens)
        ids, lengths = tokenizer.encode_with_lengths([clean(t) for t in both], length)
        values, spent = run([TEXT], self.weights, {"ids": jnp.asarray(ids), "lengths": jnp.asarray(lengths)})
        timings |= spent
        return calls.halves(values["encoded"], count, negative)

    @property
    def needs(self) -> tuple[str, ...]:
        """See the base class."""
        return ("text_encoder", "tokenizer")

    @property
    def processor(self) -> ImageProcessor:
        """What brings a picture to the image encoder's form."""
        return ImageProcessor.of(self.parts.settings)

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """The size of a run, checked.

        Raises:
            ValueError: naming the nearest sizes that work.
        """
        cfg, factor = self.parts.configs["transformer"], self.parts.configs["vae"].space_factor
        size = or_(height, self.plan.height or 480), or_(width, self.plan.width or 832)
        calls.check_size(*size, (factor * cfg.patch[1], factor * cfg.patch[2]), cfg.max_positions)
        return size

    def tokens(self) -> int:
        """See the base class."""
        cfg, vae = self.parts.configs["transformer"], self.parts.configs["vae"]
        (height, width), frames = self.size(), self.frames() or 1
        frames = (frames - 1) // vae.time_factor + 1
        return frames * height * width // vae.space_factor**2 // math.prod(cfg.patch)

    def activations(self) -> float:
        """See the base class; fitted to what 1.3B, 14B and the autoencoder took at 81 x 480 x 832 in bfloat16
        (benchmarks/wan_h200.md)."""
        cfg, vae = self.parts.configs["transformer"], self.parts.configs["vae"]
        height, width = self.size()
        rows = self.rows
        context = 4 * cfg.layers * self.plan.max_text_tokens * cfg.width
        pixels = height * width // (vae.patch or 1) ** 2
        return max(rows * (28 * self.tokens() * cfg.width + context), 110 * pixels * (vae.decoder_width or vae.width))
