"""HunyuanVideo: text to video (upstream pipelines/hunyuan_video/pipeline_hunyuan_video.py). The stages are in
`hunyuan_stages`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jdit import sampling
from jdit.nn.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from jdit.nn.text.clip import CLIPTextConfig
from jdit.nn.text.decoder import DecoderConfig
from jdit.nn.vae.autoencoder_kl_hunyuan_video import FRAME_TILES
from jdit.nn.vae.autoencoder_kl_hunyuan_video_config import AutoencoderKLHunyuanVideoConfig
from jdit.nn.vae.tiling import Tiles
from jdit.pipeline import base, calls, modulation
from jdit.pipeline import hunyuan_stages as stage
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage, run
from jdit.pipeline.given import GivenFrames
from jdit.pipeline.hunyuan_prompts import VIDEO
from jdit.pipeline.templates import Template, template_ids
from jdit.structs import Output, Prompt, Text

MOST = 1024
"""Patches along each axis: positions set no limit that matters."""
CLIP_TOKENS = 77
FPS = 24.0
"""As the original release writes its videos (sample_video.py); upstream's example has 15."""


class HunyuanVideoGeneration(base.Pipeline):
    """HunyuanVideo.

    Beside the common arguments: `true_guidance` (classifier-free guidance of a transformer that is told its guidance,
    upstream's true_cfg_scale: 1, which is off, unless given; `guidance` is what it is told), `two_passes` (the former
    in two calls of the transformer: half the activations), `vae_tiling` (decode by tiles of rows and columns, as the
    original release does: on unless it is False), `vae_slicing` (decode a video at a time) and `on_frame`, called with
    (frames, of how many) while frames are decoded. A prompt that is too long loses its own end; upstream's loses the
    end of the template, too.
    """

    takes = (
        "negative_prompt", "height", "width", "num_frames", "steps", "guidance", "true_guidance", "shift", "solver",
        "latents", "max_text_tokens", "two_passes", "vae_tiling", "vae_slicing", "on_frame",
    )  # fmt: skip
    template: ClassVar[Template] = VIDEO
    kinds: ClassVar[dict[str, type]] = {
        "transformer": HunyuanVideoConfig, "vae": AutoencoderKLHunyuanVideoConfig, "text_encoder": DecoderConfig,
        "text_encoder_2": CLIPTextConfig,
    }  # fmt: skip
    conditions: ClassVar[tuple[str | None, ...]] = (None,)  # of the transformers that it runs
    encode_text: ClassVar[Stage] = stage.ENCODE_TEXT
    begin: ClassVar[tuple[Stage, ...]] = (stage.PREPARE,)  # what is done before the sampling loop

    # ---- what the checkpoint is

    @property
    def _cfg(self) -> HunyuanVideoConfig:
        return self.parts.configs["transformer"]

    @property
    def _vae(self) -> AutoencoderKLHunyuanVideoConfig:
        return self.parts.configs["vae"]

    @property
    def needs(self) -> tuple[str, ...]:
        """See the base class."""
        return ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    @classmethod
    def misfits(cls, parts: base.Parts) -> list[str]:
        """See the base class."""
        c = parts.configs
        if wrong := [n for n, kind in cls.kinds.items() if n in c and not isinstance(c[n], kind)]:
            return [f"{n} is a {type(c[n]).__name__}, a {cls.kinds[n].__name__} is needed" for n in wrong]
        cfg, z, out = c["transformer"], c["vae"].latent_channels, []
        if cfg.condition not in cls.conditions:
            out.append(f"transformer: image_condition_type={cfg.condition!r}, this pipeline runs {cls.conditions}")
        elif (cfg.in_channels, cfg.out_channels) != (takes := 2 * z + 1 if cfg.condition == "latent_concat" else z, z):
            out.append(
                f"transformer takes {cfg.in_channels} and gives {cfg.out_channels} channels, but the vae has {z}: "
                f"{takes} in and {z} out would fit"
            )
        for name, reads in (("text_encoder", cfg.text_dim), ("text_encoder_2", cfg.pooled_dim)):
            if name in c and c[name].width != reads:
                out.append(f"transformer reads states of width {reads}, but those of {name} have {c[name].width}")
        return out

    # ---- arguments

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """The size of a run, checked.

        Raises:
            ValueError: naming the nearest sizes that work.
        """
        size = or_(height, self.plan.height or 720), or_(width, self.plan.width or 1280)
        calls.check_size(*size, self._vae.space_factor * self._cfg.patch, MOST)
        return size

    def frames(self, num_frames: int | None = None) -> int:
        """The number of frames of a run, checked.

        Raises:
            ValueError: naming the nearest numbers that work.
        """
        vae, patch = self._vae, self._cfg.patch_frames
        latent = vae.latent_frames(self.plan.num_frames or 129)
        frames = or_(num_frames, vae.frames(max(latent - latent % patch, patch)))  # the usual number, in whole patches
        calls.check_frames(frames, vae.time_factor, patch, MOST)
        return frames

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        if given.get("true_guidance") is not None and not self._cfg.guidance:
            return ["this transformer is told no guidance: its classifier-free scale is guidance, not true_guidance"]
        return []

    def _guidance(self, given: Mapping[str, Any]) -> tuple[float | None, float]:
        """What the transformer is told, and the classifier-free scale."""
        scale = or_(given.get("guidance"), self.plan.guidance)
        return (scale, or_(given.get("true_guidance"), 1.0)) if self._cfg.guidance else (None, scale)

    # ---- prompts

    def _encode(self, prompt, negative, timings, max_text_tokens=None) -> Prompt:
        if problems := calls.number_problems({"max_text_tokens": max_text_tokens}):
            raise ValueError("; ".join(problems))
        texts, count = calls.both_texts(prompt, negative)
        self.ready()
        most = or_(max_text_tokens, self.plan.max_text_tokens)
        # one length for all prompts, so that none compiles anew
        ids = template_ids(self.parts.tokenizers["tokenizer"], texts, self.template, max_tokens=most, multiple=most)
        values: dict[str, Any] = {
            "tokens": jnp.asarray(ids.tokens), "lengths": jnp.asarray(ids.lengths), "drop": self.template.drop,
            "clip_ids": self._clip_ids(texts),
        }  # fmt: skip
        values, spent = run([self.encode_text], self.weights, values)
        timings |= spent
        return calls.halves(values["encoded"], count, negative)

    def _clip_ids(self, texts: Sequence[str]) -> Array:
        most = min(CLIP_TOKENS, self.parts.configs["text_encoder_2"].max_positions)
        return jnp.asarray(self.parts.tokenizers["tokenizer_2"].encode(texts, most))

    # ---- the call

    def usual_stages(self) -> list[Stage]:
        """See the base class."""
        return [self.encode_text, *self.begin, *stage.solving(tabled=self._tabled()), self.decode]

    @property
    def decode(self) -> Stage:
        """What makes pixels of the last x."""
        return stage.DECODE

    def tables(self) -> dict[str, int]:
        """See the base class."""
        return {"modulation": modulation.table_bytes(*self._modulation(), make=stage.step_tables)}

    def _tabled(self, *given: int) -> bool:
        return modulation.tabled(*self._modulation(*given), make=stage.step_tables)

    def _modulation(self, steps: int | None = None, prompts: int | None = None) -> tuple[Any, ...]:
        """What the size of the tables depends on; `prompts` counts the negative ones."""
        cfg, tokens, rows = self._cfg, self._text_tokens, or_(prompts, self.rows)
        spec: Any = modulation.spec
        text = Text(spec(rows, tokens, cfg.text_dim), spec(rows, cfg.pooled_dim))
        return HunyuanVideo, cfg, spec(or_(steps, self.plan.steps)), text, spec() if cfg.guidance else None

    @property
    def rows(self) -> int:
        """Prompts of a usual call of one, the negative one included."""
        return 2 if self._guidance({})[1] > 1 else 1

    def tokens(self) -> int:
        """See the base class."""
        height, width = self.size()
        latent = self._vae.latent_frames(self.frames()) * height * width // self._vae.space_factor**2
        return latent // math.prod(self._cfg.patch_3d)

    @property
    def _text_tokens(self) -> int:
        """Tokens of a prompt that the transformer sees in a usual call, padding included."""
        return self.plan.max_text_tokens

    def activations(self) -> float:
        """See the base class; as measured (benchmarks/hunyuan_video_h100.md): 30 bytes a token and width in the
        transformer, and twelve arrays of a tile at full size in the autoencoder."""
        cfg, vae = self._cfg, self._vae
        (height, width), frames = self.size(), self.frames()
        tokens = self._text_tokens + self.tokens()
        tile = (FRAME_TILES.size + 1) * math.prod(map(min, (height, width), Tiles().size)) * vae.channels[0]
        pixels = 12 * tile * np.dtype(jnp.dtype(vae.dtype)).itemsize + 3 * frames * height * width
        return max(self.rows * 30 * tokens * cfg.width, pixels)

    def table(self, steps: int, *, shift=None, solver=None) -> sampling.Table:
        """The solver's table of a run."""
        return self._table(steps, shift=shift, solver=solver, sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])

    def _picture(self, a: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
        """The values that the stages read of a call's picture."""
        return {"picture": GivenFrames()}

    def _generate(self, prompt, **a: Any) -> Output:
        (height, width), frames, vae = self.size(a["height"], a["width"]), self.frames(a["num_frames"]), self._vae
        table = self.table(or_(a["steps"], self.plan.steps), shift=a["shift"], solver=a["solver"])
        embedded, scale = self._guidance(a)
        guided, timings = scale > 1, {}
        with self.on_mesh():
            prompt = self._prompt(prompt, a, guided, timings)
            prompts = prompt.positive.states.shape[0]
            count, f = prompts * a["num_outputs"], vae.space_factor
            shape = count, vae.latent_frames(frames), height // f, width // f, vae.latent_channels
            values: dict[str, Any] = {
                "positive": prompt.positive, "negative": prompt.negative if guided else None, "table": table,
                "noise": calls.first_noise(a, shape), "guidance": jnp.float32(scale) if guided else None,
                "embedded": None if embedded is None else jnp.float32(embedded), "modulation": None,
                "keys": calls.solver_keys(a["seed"], count, table.stochastic), "two_passes": bool(a.get("two_passes")),
                "vae_tiling": bool(or_(a.get("vae_tiling"), True)), "vae_slicing": bool(a.get("vae_slicing")),
                "output": a["output"], "report": a["on_step"] is not None,
                "report_frames": a.get("on_frame") is not None,
            }  # fmt: skip
            values |= self._picture(a, height, width)
            todo = [*self.begin, *stage.solving(tabled=self._tabled(table.steps, prompts * (1 + guided)))]
            todo += [self.decode] if a["output"] != "latents" else []
            with calls.reporting(a["on_step"], a.get("on_frame")):
                values, spent = run(todo, self.weights, values)
        return calls.result(values, timings | spent, self.plan.fps or FPS)
