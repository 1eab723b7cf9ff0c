"""CogVideoX 1.0 and 1.5: text, first frame or another video to video (upstream pipelines/cogvideo).

B outputs, P prompts, S latent frames, h w latent rows and columns, C latent channels, N steps.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdit import media, sampling
from jdit.nn.cogvideox import CogVideoX, CogVideoXConfig, Modulation
from jdit.nn.text.t5 import T5Config
from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from jdit.nn.vae.autoencoder_kl_cogvideox_config import AutoencoderKLCogVideoXConfig
from jdit.pipeline import base, calls, modulation
from jdit.pipeline.calls import or_
from jdit.pipeline.cogvideox_conditions import Conditions, encode_picture, encode_text, encode_video
from jdit.pipeline.executor import Stage, run
from jdit.pipeline.given import GivenFrames
from jdit.sampling import guidance as guide
from jdit.structs import Output, Prompt, Text

STRENGTH = 0.8
MOST = 1024
"""Patches a side where positions set no limit."""

# ------------------------------------------------------------------------------------------------- stages


def prepare(positive: Text, negative: Text | None, noise, clean, first, table: sampling.Table):
    """The first x, and what all steps see."""
    x = noise if clean is None else sampling.add_noise(jnp.broadcast_to(clean, noise.shape), noise, table)
    text = positive.states if negative is None else jnp.concatenate([negative.states, positive.states])
    after = ((0, 0), (0, noise.shape[1] - 1), (0, 0), (0, 0), (0, 0))
    return x, Conditions(text, GivenFrames(None if first is None else jnp.pad(first, after)))


def modulate(transformer: CogVideoX, table: sampling.Table) -> Modulation:
    """Modulation of every step."""
    return transformer.modulation_table(jnp.asarray(table.timestep, jnp.float32))


def denoise(
    transformer: CogVideoX, x, given: Conditions, mods: Modulation | None, table: sampling.Table, scales, keys,
    two_passes: bool, report: bool,
) -> Float[Array, "B S h w C"]:  # fmt: skip
    """The sampling loop. Modulation of all steps and the text projection are computed before it.

    Args:
        mods: of each step; None makes it in the steps.
        scales: of guidance, one a step; None is off.
    """
    text = transformer.embed_text(given.text)
    text = jnp.repeat(text, x.shape[0] * (1 if scales is None else 2) // text.shape[0], axis=0)

    of_step = modulation.at(mods, transformer.modulation_table)

    def predict(x, t, row, *, text):
        return transformer.velocity(given.frames.apply(x), of_step(t, row[0]), text)

    model, strength = functools.partial(predict, text=text), lambda row: row[1]
    if scales is not None and two_passes:
        negative, positive = (functools.partial(predict, text=half) for half in jnp.split(text, 2))
        model = guide.two_passes(negative, positive, strength)
    elif scales is not None:
        model = guide.classifier_free(model, strength)
    told = calls.report_step if report else None
    return sampling.solve(model, x, table, key=keys, per_step=(mods, scales), on_step=told)


def decode(vae: AutoencoderKLCogVideoX, latents, kind: str, extra: int, tiling: bool, slicing: bool, report: bool):
    """Latents, but for the `extra` first frames, to pixels, a batch of frames at a time."""
    z = vae.denormalise(latents[:, extra:])
    frames = video_frames(z.shape[1], vae.cfg.frame_factors[1])
    tiles = vae.cfg.tiles if tiling else None
    return calls.decode_video(vae, z, frames, kind=kind, tiles=tiles, slicing=slicing, report=report)


def video_frames(latent: int, factor: int) -> int:
    """Frames that so many latent frames become: of an odd number the first is one frame, all others are `factor`."""
    return latent * factor if latent % 2 == 0 else (latent - 1) * factor + 1


TEXT = Stage("encode_text", encode_text, ("text_encoder",), ("ids",), ("encoded",))


def stages(*, given: str | None, pixels: bool, tabled: bool = True) -> list[Stage]:
    """The stages of a call with encoded prompts.

    Args:
        given: "image" or "video", what the call starts from; None is text alone.
        tabled: whether modulation of all steps is made before them.
    """
    out: list[Stage] = []
    reads, static = ("posterior_keys", "vae_tiling"), ("vae_tiling",)
    if given == "image":
        out.append(Stage("encode_image", encode_picture, ("vae",), ("image", *reads), ("first",), static))
    elif given == "video":
        out.append(Stage("encode_video", encode_video, ("vae",), ("video", *reads), ("clean",), static))
    reads = ("positive", "negative", "noise", "clean", "first", "table")
    out.append(Stage("prepare", prepare, (), reads, ("x", "conditions")))
    reads, static = ("x", "conditions", "modulation", "table", "guidance", "keys"), ("two_passes", "report")
    loop = Stage("denoise", denoise, ("transformer",), (*reads, *static), ("latents",), static, frees=("modulation",))
    out += modulation.stages(loop, modulate, ("table",), tabled=tabled)
    if pixels:
        reads = ("latents", "output", "extra", "vae_tiling", "vae_slicing", "report_frames")
        out.append(Stage("decode", decode, ("vae",), reads, ("pixels",), reads[1:]))
    return out


# ----------------------------------------------------------------------------------------------- pipeline


class CogVideoXVideo(base.Pipeline):
    """CogVideoX 1.0 and 1.5.

    Beside the common arguments: `video` (video to video: an array, a list of pictures or a path; `num_frames` takes the
    first of its frames) with `strength` (the share of the steps that are run, 0.8), `dynamic_guidance` (guidance that
    changes with the step, as upstream's use_dynamic_cfg), `two_passes` (guidance in two calls of the transformer: half
    the activations), `vae_tiling`, `vae_slicing` (decode a video at a time) and `on_frame`, called with (frames, of how
    many) while frames are decoded. Pictures and videos are drawn from the autoencoder's posterior as upstream does;
    `seed=None` takes its mode.
    """

    takes = (
        "negative_prompt", "image", "video", "strength", "height", "width", "num_frames", "steps", "guidance",
        "dynamic_guidance", "solver", "latents", "max_text_tokens", "two_passes", "vae_tiling", "vae_slicing",
        "on_frame",
    )  # fmt: skip

    # ---- what the checkpoint is

    @property
    def _cfg(self) -> CogVideoXConfig:
        return self.parts.configs["transformer"]

    @property
    def _vae(self) -> AutoencoderKLCogVideoXConfig:
        return self.parts.configs["vae"]

    @property
    def pictured(self) -> bool:
        """Whether the transformer takes the latents of a first frame beside the noise."""
        return self._cfg.in_channels != self._vae.latent_channels

    @property
    def needs(self) -> tuple[str, ...]:
        """See the base class."""
        return ("text_encoder", "tokenizer")

    @classmethod
    def misfits(cls, parts: base.Parts) -> list[str]:
        """See the base class."""
        c, out = parts.configs, []
        kinds = {"transformer": CogVideoXConfig, "vae": AutoencoderKLCogVideoXConfig, "text_encoder": T5Config}
        if wrong := [n for n, kind in kinds.items() if n in c and not isinstance(c[n], kind)]:
            return [f"{n} is a {type(c[n]).__name__}, a {kinds[n].__name__} is needed" for n in wrong]
        cfg, vae, z = c["transformer"], c["vae"], c["vae"].latent_channels
        if cfg.out_channels != z or cfg.in_channels not in (z, 2 * z):
            out.append(
                f"transformer takes {cfg.in_channels} and gives {cfg.out_channels} channels, but the vae has {z} "
                f"latent channels: {z} or {2 * z} in and {z} out would fit"
            )
        if vae.time_factor != vae.frame_factors[1]:
            made = vae.frame_factors[1]
            out.append(f"vae: temporal_compression_ratio={vae.time_factor}, but its levels make {made} frames of one")
        if "text_encoder" in c and c["text_encoder"].width != cfg.text_dim:
            width = c["text_encoder"].width
            out.append(f"transformer reads states of width {cfg.text_dim}, but those of the text_encoder have {width}")
        return out

    # ---- arguments

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """The size of a run, checked.

        Raises:
            ValueError: naming the sizes that work.
        """
        cfg, factor = self._cfg, self._vae.space_factor
        own = cfg.sample_height * factor, cfg.sample_width * factor
        size = or_(height, self.plan.height or own[0]), or_(width, self.plan.width or own[1])
        if cfg.learned and size != own:
            tall, wide = own
            raise ValueError(f"{size[0]} x {size[1]} pixels do not work: positions were learned for {tall} x {wide}")
        most = (MOST, MOST) if cfg.patch_frames is None else cfg.base[1:]
        calls.check_size(*size, factor * cfg.patch, most)
        return size

    def frames(self, num_frames: int | None = None) -> int:
        """The number of frames of a run, checked.

        Raises:
            ValueError: naming the nearest numbers that work.
        """
        frames = or_(num_frames, self.plan.num_frames or self._cfg.sample_frames)
        return self._checked_frames("num_frames", frames, 1)

    def _checked_frames(self, what: str, frames: int, patch: int) -> int:
        """`frames`, if a whole number of latent frames, a multiple of `patch`, becomes so many again."""
        factor = self._vae.frame_factors[1]
        latent = -(-frames // factor)
        near = [video_frames(n, factor) for n in range(max(latent - 2 * patch, 0), latent + 2 * patch + 1)
                if n and n % patch == 0]  # fmt: skip
        if frames not in near:
            works = sorted({*[n for n in near if n < frames][-1:], *[n for n in near if n > frames][:1]})
            rule = f"{2 * factor} n" if patch % 2 == 0 else f"{2 * factor} n + 1 or {2 * factor} n"
            raise ValueError(f"{what}={frames} does not work, {' or '.join(map(str, works))} would ({rule})")
        return frames

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        out: list[str] = []
        image, video = given.get("image") is not None, given.get("video") is not None
        if self.pictured and not image:
            out.append("this model makes videos of a picture: it needs image")
        if self.pictured and video:
            out.append("this model takes no video, only a picture as image")
        if not self.pictured and image:
            out.append("this model takes no image: it makes videos of text, or of another video")
        strength = given.get("strength")
        if strength is not None and not video:
            out.append("strength goes with video")
        elif strength is not None:
            try:
                sampling.start_index(or_(given.get("steps"), self.plan.steps), strength, whole=True)
            except ValueError as e:
                out.append(str(e))
        dynamic = given.get("dynamic_guidance")
        if dynamic is not None and not isinstance(dynamic, bool):
            out.append(f"dynamic_guidance={dynamic!r}; it must be True or False")
        if dynamic and not or_(given.get("guidance"), self.plan.guidance) > 1:
            out.append("dynamic_guidance needs guidance above 1")
        return out + self._text_problems(given.get("max_text_tokens"))

    def _text_problems(self, tokens: int | None) -> list[str]:
        own = self._cfg.text_tokens
        fits = tokens in (None, own) or not self._fixed_text
        return [] if fits else [f"max_text_tokens={tokens}; this transformer has positions for {own}"]

    @property
    def _fixed_text(self) -> bool:
        """Whether the transformer adds positions, which it has for one length of prompts."""
        return self._cfg.learned or not self._cfg.rotary

    def check(self, **arguments: Any):
        """See the base class."""
        super().check(**arguments)
        if arguments.get("video") is not None:
            self._video(arguments["video"], arguments.get("num_frames"))

    # ---- prompts

    def _encode(self, prompt, negative, timings, max_text_tokens=None) -> Prompt:
        given = {"max_text_tokens": max_text_tokens}
        if problems := calls.number_problems(given) or self._text_problems(max_text_tokens):
            raise ValueError("; ".join(problems))
        texts, count = calls.both_texts(prompt, negative)
        self.ready()
        own = self._cfg.text_tokens if self._fixed_text else self.plan.max_text_tokens
        ids = self.parts.tokenizers["tokenizer"].encode(texts, max_length=or_(max_text_tokens, own))
        values, spent = run([TEXT], self.weights, {"ids": jnp.asarray(ids)})
        timings |= spent
        return calls.halves(values["encoded"], count, negative)

    # ---- the call

    def usual_stages(self) -> list[Stage]:
        """See the base class."""
        tabled = modulation.tabled(*self._modulation(self.plan.steps))
        return [TEXT, *stages(given="image" if self.pictured else None, pixels=True, tabled=tabled)]

    def tables(self) -> dict[str, int]:
        """See the base class."""
        return {"modulation": modulation.table_bytes(*self._modulation(self.plan.steps))}

    def _modulation(self, steps: int) -> tuple[Any, ...]:
        """What the size of a table depends on."""
        return CogVideoX, self._cfg, modulation.spec(steps)

    def tokens(self) -> int:
        """See the base class."""
        height, width = self.size()
        latent = self._latent(self.frames()) * height * width // self._vae.space_factor**2
        return latent // math.prod(self._cfg.patch_3d)

    def activations(self) -> float:
        """See the base class: about 28 bytes a token and width in the transformer (as Wan's), and sixteen arrays of a
        batch of frames at full size in the autoencoder (benchmarks/cogvideox_h100.md: 2.6 GB where this gives 3.1, and
        12.4 GB where this gives 12.7)."""
        cfg, vae, rows = self._cfg, self._vae, self.rows
        height, width = self.size()
        tokens = cfg.text_tokens + self.tokens()
        batch = (2 * vae.frame_factors[1] + 1) * height * width * vae.channels[0]
        return max(rows * 28 * tokens * cfg.width, 16 * batch * np.dtype(jnp.dtype(vae.dtype)).itemsize)

    def _latent(self, frames: int) -> int:
        """Latent frames of the noise: those of the video, and as many before them as fill the patches of 1.5."""
        own, patch = (frames - 1) // self._vae.frame_factors[1] + 1, self._cfg.patch_frames or 1
        return own + -own % patch

    def _video(self, source: Any, num_frames: int | None) -> np.ndarray:
        """The frames of a video to begin with.

        Raises:
            ValueError: another number of them than works; 1.5 must have whole patches.
        """
        from jdit import video

        frames = video.video(source, stop=num_frames).frames
        if num_frames is not None and len(frames) < num_frames:
            raise ValueError(f"num_frames={num_frames}, but the video has {len(frames)}")
        self._checked_frames("frames of video", len(frames), self._cfg.patch_frames or 1)
        return frames

    def table(self, steps: int, *, solver=None, strength: float | None = None) -> sampling.Table:
        """The solver's table of a run; with `strength` only its last part, as upstream's video to video begins."""
        begin = 0 if strength is None else sampling.start_index(steps, strength, whole=True)
        return self._table(steps, solver=solver, begin=begin)

    def _generate(self, prompt, **a: Any) -> Output:
        height, width = self.size(a["height"], a["width"])
        video = None if a.get("video") is None else self._video(a["video"], a["num_frames"])
        frames = self.frames(a["num_frames"]) if video is None else len(video)
        strength = None if video is None else or_(a.get("strength"), STRENGTH)
        steps, scale = or_(a["steps"], self.plan.steps), or_(a["guidance"], self.plan.guidance)
        table = self.table(steps, solver=a["solver"], strength=strength)
        scales = np.full(table.steps, scale)
        if a.get("dynamic_guidance"):
            scales = guide.dynamic_scale(scale, table.timestep, table.steps)
        guided, timings, vae, latent = scale > 1, {}, self._vae, self._latent(frames)
        with self.on_mesh():
            prompt = self._prompt(prompt, a, guided, timings)
            count = prompt.positive.states.shape[0] * a["num_outputs"]
            shape = (count, latent, height // vae.space_factor, width // vae.space_factor, vae.latent_channels)
            values: dict[str, Any] = {
                "positive": prompt.positive, "negative": prompt.negative if guided else None,
                "noise": calls.first_noise(a, shape), "clean": None, "first": None, "table": table,
                "guidance": jnp.asarray(scales, jnp.float32) if guided else None, "report": a["on_step"] is not None,
                "keys": calls.solver_keys(a["seed"], count, table.stochastic), "output": a["output"],
                "posterior_keys": calls.posterior_keys(a["seed"], count), "two_passes": bool(a.get("two_passes")),
                "vae_tiling": bool(a.get("vae_tiling")), "vae_slicing": bool(a.get("vae_slicing")),
                "extra": latent - (frames - 1) // vae.frame_factors[1] - 1,
                "report_frames": a.get("on_frame") is not None, "modulation": None,
            }  # fmt: skip
            resized = lambda picture: media.resize(picture, height, width)
            if self.pictured:
                values["image"] = jnp.asarray(resized(media.picture(a["image"])))[None]
            elif video is not None:
                values["video"] = jnp.asarray(np.stack([resized(frame) for frame in video]))[None]
            given = "image" if self.pictured else None if video is None else "video"
            tabled = modulation.tabled(*self._modulation(table.steps))
            todo = stages(given=given, pixels=a["output"] != "latents", tabled=tabled)
            with calls.reporting(a["on_step"], a.get("on_frame")):
                values, spent = run(todo, self.weights, values)
        return calls.result(values, timings | spent, self.plan.fps or (8 if self._cfg.patch_frames is None else 16))
