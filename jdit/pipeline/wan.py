"""Wan 2.1 and 2.2: text, first frame, or first and last frame to video (upstream pipeline_wan.py, pipeline_wan_i2v.py).

B outputs, P prompts, S latent frames, h w latent rows and columns, C latent channels, L text tokens, N steps.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdit import media, sampling
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.nn.vae.tiling import Tiles
from jdit.nn.wan import Modulation, Wan, WanConfig
from jdit.pipeline import base, calls, modulation, segmented
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage, run
from jdit.pipeline.given import GivenFrames, unit
from jdit.pipeline.segmented import SEGMENT, TAKES, planned
from jdit.pipeline.wan_conditions import Conditions, encode_first, encode_frames, encode_pictures, times
from jdit.pipeline.wan_prompts import TEXT, WanPipeline, change_rows, contexts, texts
from jdit.sampling import guidance as guide
from jdit.sampling.segments import SegmentPlan
from jdit.structs import Output, Text

# ------------------------------------------------------------------------------------------------- stages


def prepare(positive: Text, negative: Text | None, noise, table: sampling.Table, tokens, channels, first):
    """The solver's first state, and what all steps see."""
    return sampling.init(noise, table), Conditions(texts(positive, negative), tokens, GivenFrames(channels, first))


def modulate(transformer: Wan, table: sampling.Table, held: int | None) -> Modulation:
    """Modulation of this transformer's steps; `held` is the number of latent frames where the first one is given."""
    return transformer.modulation_table(times(table.timestep, held))


def denoise(
    transformer: Wan, state: sampling.State, given: Conditions, mods: Modulation | None, table: sampling.Table, scale,
    keys, held: int | None, total: int, two_passes: bool, report: bool,
) -> sampling.State:  # fmt: skip
    """The rows of a table that are this transformer's. Modulation of its steps, and the keys and values of each prompt,
    are computed before them.

    Args:
        mods: of each step; None makes it in the steps. held: see `modulate`.
    """
    context = contexts(transformer, given.text, given.tokens, state.x.shape[0] * (1 if scale is None else 2))
    of_step = modulation.at(mods, lambda t: transformer.modulation_table(times(t, held)))

    def predict(x, t, row, *, context):
        return transformer.velocity(given.frames.apply(x), of_step(t, row[0]), context)

    model = functools.partial(predict, context=context)
    if scale is not None and two_passes:
        half = lambda n: functools.partial(predict, context=change_rows(context, lambda a: jnp.split(a, 2, axis=1)[n]))
        model = guide.two_passes(half(0), half(1), scale)
    elif scale is not None:
        model = guide.classifier_free(model, scale)
    told = calls.report_step if report else None
    return sampling.run(model, state, table, key=keys, per_step=(mods,), on_step=told, total=total)


def finish(state: sampling.State, given: Conditions) -> Float[Array, "B S h w C"]:
    """The last x; a first frame that was given is put back as it was."""
    return given.frames.keep_first(state.x)


def decode(vae: AutoencoderKLWan, latents, kind: str, tiling: bool, slicing: bool, report: bool):
    """Latents to frames, a chunk at a time: no video of floats is there where `kind` is uint8."""
    frames, tiles = (latents.shape[1] - 1) * vae.cfg.frame_factors[1] + 1, Tiles() if tiling else None
    z = vae.denormalise(latents)
    return calls.decode_video(vae, z, frames, kind=kind, tiles=tiles, slicing=slicing, report=report)


class Piece(NamedTuple):
    """What one segment of a longer video is made from: the first x, and keys of a stochastic solver."""

    noise: Float[Array, "B S h w C"]
    keys: Array | None = None


def begin(piece: Piece) -> tuple[Array, Array | None]:
    """A segment's own values."""
    return piece.noise, piece.keys


def decode_on(vae: AutoencoderKLWan, latents, kind: str, tiling: bool, report: bool):
    """A segment's frames, and the last of them, neither rounded nor clipped, with which the next one begins."""
    frames = vae.decode(vae.denormalise(latents), tiles=Tiles() if tiling else None)
    if report:
        calls.report_frames(frames, frames.shape[1])
    return latents, calls.to_pixels(frames, kind), frames[:, -1]


ALONE, HIGH, LOW = ("denoise", "transformer"), ("denoise_high", "transformer"), ("denoise_low", "transformer_2")


def stages(
    *, tokens: bool, picture: str | None, experts: Sequence[tuple[str, str]] = (ALONE,), pixels: bool,
    segments: bool = False, tabled: bool = True,
) -> list[Stage]:  # fmt: skip
    """The stages of a call with encoded prompts.

    Args:
        tokens: whether the transformer sees the pictures' tokens.
        picture: "channels", "first" or None: what becomes of the given frames.
        experts: (stage, transformer) of each part of the table.
        segments: whether all but the pictures' tokens is made a segment, each going on from the last frame of the one
            before it; modulation is made once.
        tabled: whether modulation of all steps is made before them.
    """
    once = [Stage("encode_image", encode_pictures, ("image_encoder",), ("pictures",), ("tokens",))] if tokens else []
    out: list[Stage] = []
    if picture == "channels":
        reads = ("image", "last_image", "num_frames", "vae_tiling")
        out.append(Stage("encode_frames", encode_frames, ("vae",), reads, ("channels",), reads[2:]))
    elif picture == "first":
        out.append(Stage("encode_frames", encode_first, ("vae",), ("image", "vae_tiling"), ("first",), ("vae_tiling",)))
    reads = ("positive", "negative", "noise", "table", "tokens", "channels", "first")
    out.append(Stage("prepare", prepare, (), reads, ("state", "conditions")))
    static = ("held", "steps", "two_passes", "report")
    for name, transformer in experts:
        mods, table = (f"{what}:{name}" for what in ("modulation", "table"))
        reads = ("state", "conditions", mods, table, f"guidance:{name}", "keys", *static)
        loop = Stage(name, denoise, (transformer,), reads, ("state",), static, frees=(mods,))
        *first, loop = modulation.stages(
            loop, modulate, (table, "held"), static=("held",), name=name.replace("denoise", "modulate"), tabled=tabled
        )
        (once if segments else out).extend(first)
        out.append(loop)
    out.append(Stage("finish", finish, (), ("state", "conditions"), ("latents",)))
    if segments:
        reads = ("latents", "output", "vae_tiling", "report_frames")
        out.append(Stage("decode", decode_on, ("vae",), reads, ("latents", "pixels", "image"), reads[1:]))
        out.insert(0, Stage("begin", begin, (), (SEGMENT,), ("noise", "keys")))
        return once + planned([dataclasses.replace(s, repeats=SEGMENT) for s in out], pixels=pixels)
    if pixels:
        reads = ("latents", "output", "vae_tiling", "vae_slicing", "report_frames")
        out.append(Stage("decode", decode, ("vae",), reads, ("pixels",), reads[1:]))
    return once + out


# ----------------------------------------------------------------------------------------------- pipeline


class WanVideo(WanPipeline):
    """Wan 2.1 and 2.2, of one transformer or two experts.

    Beside the common arguments: `guidance_2` (of the second expert; None is the plan's, else `guidance`), `two_passes`
    (guidance in two calls of the transformer: half the activations), `vae_tiling`, `vae_slicing` (decode a video at a
    time), `on_frame`, called with (frames, of how many) while frames are decoded, and `num_segments`: a model that goes
    on from a picture makes as many videos, each from the last frame of the one before, and joins them; also `TAKES`.
    """

    takes = (
        "negative_prompt", "image", "last_image", "height", "width", "num_frames", "steps", "guidance", "guidance_2",
        "shift", "solver", "latents", "max_text_tokens", "two_passes", "vae_tiling", "vae_slicing", "on_frame",
        "num_segments", *TAKES,
    )  # fmt: skip

    # ---- what the checkpoint is

    @property
    def picture(self) -> str | None:
        """What a picture becomes: "channels" beside the noise (needed), the "first" frame (free), or None."""
        extra = self.parts.configs["transformer"].in_channels - self.parts.configs["vae"].latent_channels
        return "channels" if extra else "first" if self.parts.settings.get("expand_timesteps") else None

    @property
    def _tokens(self) -> bool:
        """Whether the transformer sees a picture's tokens."""
        return self.picture is not None and self.parts.configs["transformer"].image_dim is not None

    @property
    def boundary(self) -> float | None:
        """The timestep from which on the first expert is in charge; None where there is one transformer."""
        ratio = self.parts.settings.get("boundary_ratio")
        return None if ratio is None else ratio * self.parts.scheduler.get("num_train_timesteps", 1000)

    @classmethod
    def misfits(cls, parts: base.Parts) -> list[str]:
        """See the base class."""
        c, settings, out = parts.configs, parts.settings, []
        kinds = {"transformer": WanConfig, "transformer_2": WanConfig, "vae": AutoencoderKLWanConfig}
        if wrong := [n for n, kind in kinds.items() if n in c and not isinstance(c[n], kind)]:
            return [f"{n} is a {type(c[n]).__name__}, a {kinds[n].__name__} is needed" for n in wrong]
        vae, z = c["vae"], c["vae"].latent_channels
        out += [f"vae: {n} (scale_factor_{up}) is None" for n, up in
                (("time_factor", "temporal"), ("space_factor", "spatial")) if getattr(vae, n) is None]  # fmt: skip
        allowed = (z, 2 * z + (vae.time_factor or 0))
        for name in (n for n in ("transformer", "transformer_2") if n in c):
            cfg = c[name]
            if cfg.out_channels != z or cfg.in_channels not in allowed:
                out.append(
                    f"{name} takes {cfg.in_channels} and gives {cfg.out_channels} channels, but the vae has {z} latent "
                    f"channels: {allowed[0]} or {allowed[1]} in and {z} out would fit"
                )
            for part, width in (("text_encoder", cfg.text_dim), ("image_encoder", cfg.image_dim)):
                if part in c and width not in (None, c[part].width):
                    out.append(f"{name} reads states of width {width}, but those of the {part} have {c[part].width}")
            if cfg.image_positions and "image_encoder" in c and 2 * c["image_encoder"].tokens != cfg.image_positions:
                have = f"those of two pictures are 2 x {c['image_encoder'].tokens}"
                out.append(f"{name} has positions for {cfg.image_positions} tokens of pictures, but {have}")
        if settings.get("boundary_ratio") is not None and "transformer_2" not in c:
            out.append(f"boundary_ratio is {settings['boundary_ratio']}, but there is no transformer_2")
        elif "transformer_2" in c and c["transformer_2"].in_channels != c["transformer"].in_channels:
            out.append("transformer and transformer_2 take different numbers of channels")
        if settings.get("expand_timesteps") and c["transformer"].patch[0] != 1:
            out.append(f"expand_timesteps with patches of {c['transformer'].patch[0]} frames is not supported, 1 is")
        return out

    @property
    def needs(self) -> tuple[str, ...]:
        """See the base class."""
        return (*super().needs, *(["image_encoder"] if self._tokens else []))

    # ---- arguments

    def frames(self, num_frames: int | None = None) -> int:
        """The number of frames of a run, checked.

        Raises:
            ValueError: naming the nearest numbers that work.
        """
        cfg, frames = self.parts.configs["transformer"], or_(num_frames, self.plan.num_frames or 81)
        calls.check_frames(frames, self.parts.configs["vae"].time_factor, cfg.patch[0], cfg.max_positions)
        return frames

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        first, last = given.get("image") is not None, given.get("last_image") is not None
        cfg, out = self.parts.configs["transformer"], []
        if self.picture is None and (first or last):
            out.append("this model takes no image: it makes videos of text alone")
        elif self.picture == "first" and last:
            out.append("this model takes no last_image, only the first frame as image")
        elif self.picture == "channels" and not first:
            out.append("this model makes videos of a picture: it needs image")
        elif cfg.image_dim is not None and cfg.image_positions is None and last:
            out.append("this model takes no last_image: its transformer sees one picture")
        elif cfg.image_positions is not None and first and not last:
            out.append("this model goes from a first to a last frame: it needs last_image")
        if self.segmented(given):
            if self.picture is None or not first:
                out.append("num_segments goes on from a picture: it needs a model that takes image, and one")
            if last or given.get("num_frames") == 1 or given.get("vae_slicing"):
                out.append("num_segments goes without last_image and vae_slicing, and with two num_frames at least")
        if last and given.get("num_frames") == 1:
            out.append("num_frames=1; a first and a last frame are two at least")
        if given.get("guidance_2") is not None:
            if self.boundary is None:
                out.append("guidance_2 is the second expert's, and this model has one transformer")
            elif not or_(given.get("guidance"), self.plan.guidance) > 1:
                out.append("guidance_2 needs guidance above 1")
        return out

    # ---- the call

    def usual_stages(self) -> list[Stage]:
        """See the base class."""
        experts = (ALONE,) if self.boundary is None else (HIGH, LOW)
        tabled = modulation.tabled(*self._modulation(self.plan.steps))
        return [TEXT, *stages(tokens=self._tokens, picture=self.picture, experts=experts, pixels=True, tabled=tabled)]

    def tables(self) -> dict[str, int]:
        """See the base class."""
        parts = self.experts(self.table(self.plan.steps))
        sizes = {e: modulation.table_bytes(*self._modulation(part.steps)) for e, part in parts.items()}
        return {f"modulation:{name}": size for (name, _), size in sizes.items()}

    def _modulation(self, steps: int, held: int | None = None) -> tuple[Any, ...]:
        """What the size of a table depends on; `held` as for `modulate`."""
        times = modulation.spec(*([steps] if held is None else [steps, 1, held]))
        return Wan, self.parts.configs["transformer"], times

    def table(self, steps: int, *, shift=None, solver=None) -> sampling.Table:
        """The solver's table of a run."""
        return self._table(steps, shift=shift, solver=solver)

    def experts(self, table: sampling.Table) -> dict[tuple[str, str], sampling.Table]:
        """(stage, transformer) -> its rows of the table; an expert whose turn does not come is left out."""
        if self.boundary is None:
            return {ALONE: table}
        parts = zip((HIGH, LOW), sampling.split(table, self.boundary))
        return {expert: part for expert, part in parts if part.steps}

    def _pictures(self, a: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
        """The given frames as the encoders want them."""
        if a["image"] is None:
            return {}
        given = [media.picture(a[n]) for n in ("image", "last_image") if a[n] is not None]
        resized = [jnp.asarray(media.resize(picture, height, width))[None] for picture in given]
        out: dict[str, Any] = {"image": resized[0], "last_image": resized[1] if len(given) > 1 else None}
        if self._tokens:
            out["pictures"] = jnp.asarray(self.processor(given))
        return out

    def _values(self, prompt, a: Mapping[str, Any], timings: dict[str, float]) -> tuple[dict[str, Any], list[Stage]]:
        """What the stages read, and the stages."""
        height, width = self.size(a["height"], a["width"])
        frames = self.frames(a["num_frames"])
        steps, scale = or_(a["steps"], self.plan.steps), or_(a["guidance"], self.plan.guidance)
        scale_2 = or_(a.get("guidance_2"), scale if a["guidance"] is not None else or_(self.plan.guidance_2, scale))
        table = self.table(steps, shift=a["shift"], solver=a["solver"])
        experts = self.experts(table)
        pictures = self._pictures(a, height, width)
        guided, vae, long = scale > 1, self.parts.configs["vae"], self.segmented(a)
        held = (frames - 1) // vae.time_factor + 1 if pictures and self.picture == "first" else None
        tabled = all(modulation.tabled(*self._modulation(part.steps, held)) for part in experts.values())
        prompt = self._prompt(prompt, a, guided, timings)
        count = prompt.positive.states.shape[0] * a["num_outputs"]
        shape = ((frames - 1) // vae.time_factor + 1, height // vae.space_factor, width // vae.space_factor)
        shape = (count, *shape, vae.latent_channels)
        values: dict[str, Any] = pictures | {
            "positive": prompt.positive, "negative": prompt.negative if guided else None, "table": table,
            "tokens": None, "channels": None, "first": None, "num_frames": frames, "steps": table.steps,
            "two_passes": bool(a.get("two_passes")), "report": a["on_step"] is not None, "output": a["output"],
            "vae_tiling": bool(a.get("vae_tiling")), "vae_slicing": bool(a.get("vae_slicing")),
            "report_frames": a.get("on_frame") is not None, "held": held,
        }  # fmt: skip
        if long:
            plan = SegmentPlan(1 + a["num_segments"] * (frames - 1), frames, 1)
            noise, keys = segmented.noise(a, plan, shape), segmented.solver_keys(a, count, table.stochastic)
            first = unit(pictures["image"])
            values |= {"plan": plan, "make": lambda i: Piece(noise(i), keys(i)),
                       "image": jnp.broadcast_to(first, (count, *first.shape[1:]))}  # fmt: skip
        else:
            keys = calls.solver_keys(a["seed"], count, table.stochastic)
            values |= {"noise": calls.first_noise(a, shape), "keys": keys}
        for expert, part in experts.items():
            values |= {f"table:{expert[0]}": part, f"modulation:{expert[0]}": None}
            own = scale_2 if expert == LOW else scale
            values[f"guidance:{expert[0]}"] = jnp.float32(own) if guided else None
        return values, stages(
            tokens="pictures" in pictures, picture=self.picture if pictures else None, experts=tuple(experts),
            pixels=a["output"] != "latents", segments=long, tabled=tabled,
        )  # fmt: skip

    def segmented(self, given: Mapping[str, Any]) -> bool:
        """See the base class."""
        return or_(given.get("num_segments"), 1) > 1

    def _generate(self, prompt, **a: Any) -> Output:
        timings: dict[str, float] = {}
        with self.on_mesh():
            values, todo = self._values(prompt, a, timings)
            if self.segmented(a):
                return segmented.whole(self, todo, values, a, timings, self._fps)
            with calls.reporting(a["on_step"], a.get("on_frame")):
                values, spent = run(todo, self.weights, values)
        return calls.result(values, timings | spent, self._fps)

    def _stream(self, prompt, **a: Any) -> Iterator[Output]:
        if not self.segmented(a):
            yield self._generate(prompt, **a)
            return
        timings: dict[str, float] = {}
        with self.on_mesh():
            values, todo = self._values(prompt, a, timings)
        yield from segmented.pieces(self, todo, values, a, timings, self._fps)

    @property
    def _fps(self) -> float:
        return self.plan.fps or (24 if self.parts.settings.get("expand_timesteps") else 16)
