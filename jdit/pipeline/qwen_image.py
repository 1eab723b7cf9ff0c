"""Qwen-Image: text to image, image to image and inpainting (upstream pipelines/qwenimage/pipeline_qwenimage.py,
[_img2img.py, _inpaint.py]). Editing is in `qwen_edit`, layers are in `qwen_layered`, the stages in `qwen_stages`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from PIL import Image

from jdit import media, sampling
from jdit.nn.qwen_image import QwenImage, QwenImageConfig
from jdit.nn.text.qwen2_5_vl import Qwen2_5VLConfig
from jdit.nn.vae.autoencoder_kl_qwen_image import AutoencoderKLQwenImageConfig
from jdit.pipeline import base, calls, modulation
from jdit.pipeline import qwen_stages as stage
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage, run
from jdit.pipeline.qwen_prompts import GENERATE, PromptIds, prompt_ids
from jdit.pipeline.templates import Template
from jdit.structs import Output, Prompt

SIDE = 1024
"""Pixels a side where neither the call nor the variant says."""
MOST = 1024
"""Patches a side: positions set no limit that matters."""
MAX_TOKENS = 1024
BUCKET = 64
"""Tokens of text are brought up to a multiple of it with padding, so that few lengths are compiled."""


class QwenImageGeneration(base.Pipeline):
    """Qwen-Image.

    Beside the common arguments: `strength` (with image: the share of the noise that is laid on the picture, 0.6),
    `mask` (with image: a picture that is white where something new is to be generated; the rest is kept), `two_passes`
    (guidance in two calls of the transformer: half the activations), `vae_tiling` and `vae_slicing`. Pictures are drawn
    from the autoencoder's posterior as upstream does; `seed=None` takes its mode. Without a negative prompt guidance
    steers away from the empty one, as in every family; upstream's pipeline is then not guided, which is `guidance=1`.
    """

    takes = (
        "negative_prompt", "image", "mask", "strength", "height", "width", "steps", "guidance", "shift", "solver",
        "latents", "max_text_tokens", "two_passes", "vae_tiling", "vae_slicing",
    )  # fmt: skip
    template: ClassVar[Template] = GENERATE
    several: ClassVar[bool] = False  # whether a call takes several pictures
    strength: ClassVar[float] = 0.6
    cfg_normalize: ClassVar[bool] = True  # whether guidance keeps the norm of the positive prediction

    # ---- what the checkpoint is

    @property
    def _cfg(self) -> QwenImageConfig:
        return self.parts.configs["transformer"]

    @property
    def _vae(self) -> AutoencoderKLQwenImageConfig:
        return self.parts.configs["vae"]

    @property
    def needs(self) -> tuple[str, ...]:
        """See the base class."""
        return ("text_encoder", "tokenizer")

    @classmethod
    def misfits(cls, parts: base.Parts) -> list[str]:
        """See the base class."""
        c = parts.configs
        kinds = {"transformer": QwenImageConfig, "vae": AutoencoderKLQwenImageConfig, "text_encoder": Qwen2_5VLConfig}
        if wrong := [n for n, kind in kinds.items() if n in c and not isinstance(c[n], kind)]:
            return [f"{n} is a {type(c[n]).__name__}, a {kinds[n].__name__} is needed" for n in wrong]
        cfg, vae, out = c["transformer"], c["vae"], []
        if not cfg.in_channels == cfg.out_channels == vae.latent_channels:
            out.append(
                f"transformer takes {cfg.in_channels} and gives {cfg.out_channels} channels of latents, the vae has "
                f"{vae.latent_channels}"
            )
        if (cfg.layered or cfg.added_t) and not cls.layered:
            out.append(
                "transformer has use_additional_t_cond or use_layer3d_rope: it makes layers of a picture, which goes "
                "with QwenImageLayeredPipeline"
            )
        if vae.in_channels != (channels := 4 if cls.layered else 3):
            out.append(f"vae takes pictures of {vae.in_channels} channels, {parts.family} needs {channels}")
        if vae.space_factor != vae.pixel_factor:
            out.append(
                f"vae: temperal_downsample has {len(vae.temporal)} values for {len(vae.multipliers)} levels; "
                f"{len(vae.multipliers) - 1} would fit"
            )
        if "text_encoder" in c and (width := c["text_encoder"].language.width) != cfg.text_dim:
            out.append(f"transformer reads states of width {cfg.text_dim}, but those of the text_encoder have {width}")
        return out

    @classmethod
    def reduced(cls, configs: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class: no picture goes through the vision tower."""
        encoder = configs.get("text_encoder")
        if not isinstance(encoder, Qwen2_5VLConfig) or encoder.vision is None:
            return {}
        return {"text_encoder": dataclasses.replace(encoder, vision=None)}

    # ---- arguments

    @property
    def size_multiple(self) -> int:
        """Pixels of a patch, which the sides are multiples of."""
        return self._vae.pixel_factor * self._cfg.patch

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """The size of a run, checked.

        Raises:
            ValueError: naming the nearest sizes that work.
        """
        size = or_(height, self.plan.height or SIDE), or_(width, self.plan.width or SIDE)
        calls.check_size(*size, self.size_multiple, MOST)
        return size

    def pictures(self, given: Any) -> list[np.ndarray]:
        """See the base class."""
        several = list(given) if isinstance(given, list | tuple) else [given]
        if not several or (len(several) > 1 and not self.several):
            raise ValueError(
                f"{len(several)} pictures; {self.parts.family} takes one{' or several' * self.several} as image"
            )
        return [media.picture(p, alpha=self.layered) for p in several]

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        image, mask, strength = (given.get(n) is not None for n in ("image", "mask", "strength"))
        out = [f"{n} goes with image" for n, there in (("mask", mask), ("strength", strength)) if there and not image]
        return out + self._number_problems(given)

    def _number_problems(self, given: Mapping[str, Any]) -> list[str]:
        out, tokens = [], given.get("max_text_tokens")
        if tokens is not None and tokens > MAX_TOKENS:
            out.append(f"max_text_tokens={tokens}; it may be 1 to {MAX_TOKENS}")
        if given.get("strength") is not None:
            try:
                sampling.start_index(or_(given.get("steps"), self.plan.steps), given["strength"])
            except ValueError as e:
                out.append(str(e))
        return out

    def check(self, **arguments: Any):
        """See the base class."""
        super().check(**arguments)
        if arguments.get("mask") is not None:
            media.picture(arguments["mask"])

    # ---- prompts

    def _encode(self, prompt, negative, timings, max_text_tokens=None, image=None) -> Prompt:
        given = {"max_text_tokens": max_text_tokens}
        if problems := calls.number_problems(given) or self._number_problems(given):
            raise ValueError("; ".join(problems))
        texts, count = calls.both_texts(prompt, negative)
        self.ready()
        ids, pictures = self._prompts(texts, max_text_tokens, image)
        values: dict[str, Any] = {
            "tokens": jnp.asarray(ids.tokens), "lengths": jnp.asarray(ids.lengths), "drop": self.template.drop,
            "positions": None if ids.positions is None else jnp.asarray(ids.positions), "prompt_pictures": pictures,
        }  # fmt: skip
        values, spent = run([stage.ENCODE_TEXT], self.weights, values)
        timings |= spent
        return calls.halves(values["encoded"], count, negative)

    def _prompts(self, texts: Sequence[str], tokens: int | None, image: Any) -> tuple[PromptIds, tuple]:
        """Texts in their template as tokens, and the pictures in it as the vision tower takes them."""
        tokenizer, most = self.parts.tokenizers["tokenizer"], or_(tokens, self.plan.max_text_tokens)
        return prompt_ids(tokenizer, texts, self.template, max_tokens=most, multiple=BUCKET), ()

    # ---- the call

    def usual_stages(self) -> list[Stage]:
        """See the base class."""
        solving = stage.solving(tabled=modulation.tabled(*self._modulation(self.plan.steps)))
        pictured = [stage.ENCODE_PICTURES] if self._shown > 1 else []
        return [stage.ENCODE_TEXT, *pictured, stage.PREPARE, *solving, stage.DECODE]

    def tables(self) -> dict[str, int]:
        """See the base class."""
        return {"modulation": modulation.table_bytes(*self._modulation(self.plan.steps))}

    def _modulation(self, steps: int) -> tuple[Any, ...]:
        """What the size of a table depends on."""
        return QwenImage, self._cfg, modulation.spec(steps)

    def tokens(self) -> int:
        """See the base class; those of the pictures that are shown beside it count too."""
        height, width = self.size()
        return height * width // self.size_multiple**2 * self._shown

    def activations(self) -> float:
        """See the base class; by count: about 28 bytes a token and width in the transformer (as Wan's), and eight
        times each picture at full size in the autoencoder."""
        cfg, vae, rows = self._cfg, self._vae, self.rows
        height, width = self.size()
        tokens = self.plan.max_text_tokens + self.tokens()
        bytes_a_value = np.dtype(jnp.dtype(vae.dtype)).itemsize
        return max(rows * 28 * tokens * cfg.width, 8 * height * width * vae.width * bytes_a_value * self._decoded)

    _shown: ClassVar[int] = 1  # pictures that the transformer sees in a usual call, those which it makes included
    _decoded: ClassVar[int] = 1  # pictures of an output

    def table(
        self, height: int, width: int, steps: int, *, shift=None, solver=None, strength: float | None = None
    ) -> sampling.Table:
        """The solver's table of a run; with `strength` only its last part."""
        tokens = height // self.size_multiple * (width // self.size_multiple)
        begin = 0 if strength is None else sampling.start_index(steps, strength)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        return self._table(steps, shift=shift, solver=solver, tokens=tokens, begin=begin, sigmas=sigmas)

    def run_size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """The size of a call, whose pictures may say it."""
        return self.size(given.get("height"), given.get("width"))

    def _layers(self, a: Mapping[str, Any]) -> tuple[int, ...]:
        """The axes of latents before rows and columns."""
        return ()

    def _redraws(self, a: Mapping[str, Any]) -> bool:
        """Whether a call begins with a noised picture."""
        return a["image"] is not None

    def _pictured(self, a: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], list[Stage]]:
        """What the pictures of a call become: values, and the stages that make latents of them."""
        if a["image"] is None:
            return {"pictures": ()}, []
        image = media.resize(a["image"][0], height, width)
        return {"pictures": (), "image": jnp.asarray(image)[None]}, [stage.ENCODE_IMAGE]

    def _mask(self, source: Any, height: int, width: int) -> np.ndarray:
        """(1, h, w, 1): the latent pixels to be generated."""
        grey = Image.fromarray(media.resize(media.picture(source), height, width)).convert("L")
        step = self._vae.pixel_factor
        return (np.asarray(grey) > 127)[None, ::step, ::step, None]

    def _generate(self, prompt, **a: Any) -> Output:
        if a["image"] is not None:
            a["image"] = self.pictures(a["image"])
        height, width = self.run_size(a)
        steps, scale = or_(a["steps"], self.plan.steps), or_(a["guidance"], self.plan.guidance)
        mask = None if a.get("mask") is None else self._mask(a["mask"], height, width)
        strength = or_(a.get("strength"), self.strength) if self._redraws(a) else None
        table = self.table(height, width, steps, shift=a["shift"], solver=a["solver"], strength=strength)
        guided, timings, factor = scale > 1, {}, self._vae.pixel_factor
        with self.on_mesh():
            prompt = self._prompt(prompt, a, guided, timings)
            count = prompt.positive.states.shape[0] * a["num_outputs"]
            shape = (count, *self._layers(a), height // factor, width // factor, self._cfg.in_channels)
            values: dict[str, Any] = {
                "positive": prompt.positive, "negative": prompt.negative if guided else None,
                "noise": calls.first_noise(a, shape), "clean": None, "table": table,
                "mask": None if mask is None else jnp.asarray(mask), "guidance": jnp.float32(scale) if guided else None,
                "keys": calls.solver_keys(a["seed"], count, table.stochastic), "output": a["output"],
                "image_keys": calls.posterior_keys(a["seed"], count), "report": a["on_step"] is not None,
                "cfg_normalize": bool(or_(a.get("cfg_normalize"), self.cfg_normalize)),
                "two_passes": bool(a.get("two_passes")), "vae_tiling": bool(a.get("vae_tiling")),
                "vae_slicing": bool(a.get("vae_slicing")), "modulation": None,
            }  # fmt: skip
            pictured, todo = self._pictured(a, height, width)
            solving = stage.solving(tabled=modulation.tabled(*self._modulation(table.steps)))
            todo = [*todo, stage.PREPARE, *solving, *([stage.DECODE] if a["output"] != "latents" else [])]
            with calls.reporting(a["on_step"]):
                values, spent = run(todo, self.weights, values | pictured)
        return calls.result(values, timings | spent)
