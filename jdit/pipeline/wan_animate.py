"""Wan-Animate: a figure in a picture moved by a driving video, a segment at a time (upstream pipeline_wan_animate.py).

B outputs, P prompts, T frames of a segment, S its latent frames, h w latent rows and columns, C latent channels, L text
tokens, N steps. A segment's latents have the reference's frame before their own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdit import colour, driving, media, sampling
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.nn.vae.tiling import Tiles
from jdit.nn.wan import Context, Modulation
from jdit.nn.wan_animate import WanAnimate, WanAnimateConfig
from jdit.pipeline import base, calls, modulation, segmented
from jdit.pipeline.animate_conditions import Segment, Tail, encode_reference, encode_segment
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage
from jdit.pipeline.given import unit
from jdit.pipeline.segmented import SEGMENT, TAKES, planned
from jdit.pipeline.wan_conditions import encode_pictures
from jdit.pipeline.wan_prompts import TEXT, WanPipeline, contexts, texts
from jdit.sampling import guidance as guide
from jdit.sampling import segments
from jdit.sampling.segments import SegmentPlan
from jdit.structs import Output, Text

# ------------------------------------------------------------------------------------------------- stages


def modulate(transformer: WanAnimate, table: sampling.Table) -> Modulation:
    """Modulation of every step, of all segments."""
    return transformer.modulation_table(jnp.asarray(table.timestep, jnp.float32))


def prepare(
    transformer: WanAnimate, positive: Text, negative: Text | None, tokens, outputs: int, length: int
) -> tuple[Context, Any]:
    """What else all segments share: keys and values of the prompts and, under guidance, of the face that the
    unconditional half sees: none, which upstream says with black frames."""
    guided = negative is not None
    context = contexts(transformer, texts(positive, negative), tokens, outputs * (2 if guided else 1))
    side = transformer.cfg.face_size
    blank = transformer.embed_face(jnp.full((1, length, side, side, 3), -1.0)) if guided else None
    return context, blank


def encode_face(transformer: WanAnimate, segment: Segment):
    """Keys and values of the driving face, of every adapter."""
    return transformer.embed_face(unit(segment.face)[None])


def denoise(
    transformer: WanAnimate, segment: Segment, channels, pose, face, blank, context: Context, mods: Modulation | None,
    table: sampling.Table, scale, report: bool, steps: int,
) -> Float[Array, "B 1+S h w C"]:  # fmt: skip
    """One segment from its noise to its latents. `mods` is the modulation of each step; None makes it in the steps."""
    outputs, guided = segment.noise.shape[0], scale is not None
    pose = transformer.embed_pose(jnp.repeat(pose, outputs * (2 if guided else 1), 0))
    spread = lambda a: jnp.repeat(a, outputs, 1)  # the batch comes after the adapters
    face = jax.tree.map(spread, face)
    if guided:
        face = jax.tree.map(lambda a, b: jnp.concatenate([spread(a), b], 1), blank, face)
        channels = jnp.concatenate([channels, channels])

    of_step = modulation.at(mods, transformer.modulation_table)

    def model(x, t, row):
        return transformer.velocity(jnp.concatenate([x, channels], -1), of_step(t, row[0]), context, pose, face)

    told = calls.report_step if report else None
    state = sampling.init(segment.noise, table)
    model = guide.classifier_free(model, scale) if guided else model
    return sampling.run(model, state, table, key=segment.keys, per_step=(mods,), on_step=told, total=steps).x


def decode(vae: AutoencoderKLWan, latents, tail: Tail, hold, kind: str, tiling: bool):
    """Latents to the segment's frames, and what the next one begins with."""
    frames = vae.decode(vae.denormalise(latents[:, 1:]), tiles=Tiles() if tiling else None)
    overlap = tail.frames.shape[1]
    if hold is not None:
        matched = colour.match(frames, frames[:, :overlap], tail.frames, hold)
        frames = jnp.where(tail.empty, frames, matched)
    return latents, Tail(frames[:, -overlap:], jnp.array(False)), calls.to_pixels(frames, kind)


def stages(*, pixels: bool = True, tabled: bool = True) -> list[Stage]:
    """The stages of a call with encoded prompts, with a table of modulation or without."""
    reads = ("positive", "negative", "tokens", "outputs", "length")
    shared = ("face", "blank", "context", "modulation", "table", "guidance", "report", "steps")
    tiling = ("vae_tiling",)
    loop = Stage("denoise", denoise, ("transformer",), (SEGMENT, "channels", "pose", *shared), ("latents",),
                 shared[-2:], SEGMENT, frees=("modulation",))  # fmt: skip
    *first, loop = modulation.stages(loop, modulate, ("table",), tabled=tabled)
    replayed = [
        Stage("encode_segment", encode_segment, ("vae",), ("reference", SEGMENT, "tail", *tiling), ("channels", "pose"),
              tiling, SEGMENT),
        Stage("encode_face", encode_face, loop.weights, (SEGMENT,), ("face",), (), SEGMENT),
        loop,
        Stage("decode", decode, ("vae",), ("latents", "tail", "hold", "output", *tiling),
              ("latents", "tail", "pixels"), ("output", *tiling), SEGMENT),
    ]  # fmt: skip
    return [
        Stage("encode_image", encode_pictures, ("image_encoder",), ("pictures",), ("tokens",)),
        Stage("encode_reference", encode_reference, ("vae",), ("image", *tiling), ("reference",), tiling),
        *first,
        Stage("prepare", prepare, loop.weights, reads, ("context", "blank"), reads[-2:]),
        *planned(replayed, pixels=pixels),
    ]


# ----------------------------------------------------------------------------------------------- pipeline

VIDEOS = ("pose_video", "face_video", "background_video", "mask_video")


class WanAnimation(WanPipeline):
    """Wan-Animate: animate the figure of `image` as `pose_video` and `face_video` move, or with `background_video` and
    `mask_video` (white is to be generated) put it into another video in the place of a figure there.

    The video has as many frames as `pose_video`, and its rate where that is a file. Beside the common arguments:
    `segment_frames` and `overlap_frames` (of a segment, and of those how many are the last of the segment before: 1 or
    5), `colour_match` (0 to 1: how far each segment is held to the colours of the one before it), `vae_tiling`, and
    those of `TAKES`.
    """

    takes = (
        "negative_prompt", "image", *VIDEOS, "height", "width", "steps", "guidance", "shift", "solver", "latents",
        "max_text_tokens", "segment_frames", "overlap_frames", "colour_match", "vae_tiling", *TAKES,
    )  # fmt: skip

    @classmethod
    def misfits(cls, parts: base.Parts) -> list[str]:
        """See the base class."""
        c, out = parts.configs, []
        kinds = {"transformer": WanAnimateConfig, "vae": AutoencoderKLWanConfig}
        if wrong := [n for n, kind in kinds.items() if not isinstance(c[n], kind)]:
            return [f"{n} is a {type(c[n]).__name__}, a {kinds[n].__name__} is needed" for n in wrong]
        cfg, vae = c["transformer"], c["vae"]
        out += [f"vae: {n} (scale_factor_{up}) is None" for n, up in
                (("time_factor", "temporal"), ("space_factor", "spatial")) if getattr(vae, n) is None]  # fmt: skip
        z, need = vae.latent_channels, 2 * vae.latent_channels + (vae.time_factor or 0)
        if (cfg.in_channels, cfg.out_channels, cfg.latent_channels) != (need, z, z):
            out.append(
                f"transformer takes {cfg.in_channels} and gives {cfg.out_channels} channels, its poses have "
                f"{cfg.latent_channels}; with the vae's {z} latent channels they would be {need}, {z} and {z}"
            )
        for part, width in (("text_encoder", cfg.text_dim), ("image_encoder", cfg.image_dim)):
            if part in c and width not in (None, c[part].width):
                out.append(f"transformer reads states of width {width}, but those of the {part} have {c[part].width}")
        return out

    @property
    def needs(self) -> tuple[str, ...]:
        """See the base class."""
        return (*super().needs, "image_encoder")

    # ---- arguments

    def segmented(self, given: Mapping[str, Any]) -> bool:
        """See the base class."""
        return True

    def frames(self, num_frames: int | None = None) -> int:
        """Frames of a segment; the driving video says how many there are in all."""
        return self.segments({}).length

    def segments(self, given: Mapping[str, Any], frames: int | None = None) -> SegmentPlan:
        """The segments of a call that drives `frames` frames.

        Raises:
            ValueError: naming the nearest numbers that work.
        """
        length = or_(given.get("segment_frames"), self.plan.segment_frames or 77)
        overlap = or_(given.get("overlap_frames"), self.plan.overlap_frames)
        return segments.plan(frames or length, length, overlap, factor=self.parts.configs["vae"].time_factor)

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        have = {n for n in ("image", *VIDEOS) if given.get(n) is not None}
        out = [f"this model animates a picture: it needs {n}" for n in ("image", *VIDEOS[:2]) if n not in have]
        if len(both := have & set(VIDEOS[2:])) == 1:
            missing = next(iter(set(VIDEOS[2:]) - both))
            out.append(f"{both.pop()} goes with {missing}: together they say where a figure is replaced")
        strength = given.get("colour_match")
        if strength is not None and not 0 <= strength <= 1:
            out.append(f"colour_match={strength}; it must be between 0 (off) and 1")
        try:
            self.segments(given)
        except ValueError as e:
            out.append(str(e))
        return out

    def check(self, **arguments: Any):
        """See the base class; driving videos that do not go together are refused too (`driving.check`)."""
        super().check(**arguments)
        height, width = self.size(arguments.get("height"), arguments.get("width"))
        side = self.parts.configs["transformer"].face_size
        videos: Any = [arguments.get(n) for n in VIDEOS]
        if found := driving.check(*videos, height=height, width=width, face_size=side).problems:
            raise ValueError("; ".join(found))

    def usual_stages(self) -> list[Stage]:
        """See the base class."""
        return [TEXT, *stages(tabled=modulation.tabled(*self._modulation(self.plan.steps)))]

    def tables(self) -> dict[str, int]:
        """See the base class."""
        return {"modulation": modulation.table_bytes(*self._modulation(self.plan.steps))}

    def _modulation(self, steps: int) -> tuple[Any, ...]:
        """What the size of a table depends on."""
        return WanAnimate, self.parts.configs["transformer"], modulation.spec(steps)

    def _stages(self, a: Mapping[str, Any], steps: int) -> list[Stage]:
        return stages(pixels=a["output"] != "latents", tabled=modulation.tabled(*self._modulation(steps)))

    def table(self, steps: int, *, shift=None, solver=None) -> sampling.Table:
        """The solver's table of a run."""
        return self._table(steps, shift=shift, solver=solver)

    # ---- the call

    def _values(self, prompt, a: Mapping[str, Any], timings: dict[str, float]) -> dict[str, Any]:
        """What the stages read."""
        height, width = self.size(a["height"], a["width"])
        scale = or_(a["guidance"], self.plan.guidance)
        table = self.table(or_(a["steps"], self.plan.steps), shift=a["shift"], solver=a["solver"])
        side, vae = self.parts.configs["transformer"].face_size, self.parts.configs["vae"]
        clips = driving.Streams(*(a[n] for n in VIDEOS), height=height, width=width, face_size=side)
        plan, guided = self.segments(a, clips.length), scale > 1
        prompt = self._prompt(prompt, a, guided, timings)
        count = prompt.positive.states.shape[0] * a["num_outputs"]
        latent = ((plan.length - 1) // vae.time_factor + 2, height // vae.space_factor, width // vae.space_factor)
        noise = segmented.noise(a, plan, (count, *latent, vae.latent_channels))
        keys = segmented.solver_keys(a, count, table.stochastic)

        def make(i: int) -> Segment:
            put: Any = lambda x: None if x is None else jnp.asarray(x)
            pose, face, background, mask = map(put, clips.frames(*plan.span(i)))
            return Segment(pose, face, background, mask, noise(i), keys(i))

        hold = a.get("colour_match")
        tail = jnp.zeros((count, plan.overlap, height, width, 3))
        return {
            "positive": prompt.positive, "negative": prompt.negative if guided else None, "table": table,
            "image": jnp.asarray(driving.reference(a["image"], height, width))[None],
            "pictures": jnp.asarray(self.processor(media.picture(a["image"]))), "outputs": count,
            "length": plan.length, "guidance": jnp.float32(scale) if guided else None, "steps": table.steps,
            "report": a["on_step"] is not None, "output": a["output"], "vae_tiling": bool(a.get("vae_tiling")),
            "hold": jnp.float32(hold) if hold else None, "tail": Tail(tail, jnp.array(True)), "plan": plan,
            "make": make, "modulation": None, "fps": clips.fps or self.plan.fps or 30,
        }  # fmt: skip

    def _generate(self, prompt, **a: Any) -> Output:
        timings: dict[str, float] = {}
        with self.on_mesh():
            values = self._values(prompt, a, timings)
            todo = self._stages(a, values["steps"])
            return segmented.whole(self, todo, values, a, timings, values["fps"])

    def _stream(self, prompt, **a: Any) -> Iterator[Output]:
        timings: dict[str, float] = {}
        with self.on_mesh():
            values = self._values(prompt, a, timings)
        yield from segmented.pieces(self, self._stages(a, values["steps"]), values, a, timings, values["fps"])
