"""Training Wan-Animate's transformer by flow matching, a CLIP vision tower with it, on clips that share a motion.

A step draws a clip, another of its group that drives it, a frame of the clip as reference, where in the loop the
segment begins, and how many frames of the segment before it are given: none, or one of `OVERLAPS`. All latents of all
beginnings are made once and stay on the devices. N clips, P frames of a loop, T frames of a segment of which S are
latent, h w latent rows and columns, C channels, r frames a latent frame stands for, F pixels of a side of a face.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from convert import tokenizers as tokenizer_files
from jdit import sampling
from jdit.atomic import write_file
from jdit.media import contact_sheet, write
from jdit.nn.vision.clip import CLIPVisionConfig
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.pipeline.given import unit
from jdit.pipeline.wan_conditions import encode_video, flags
from jdit.preprocess import ImageProcessor
from jdit.sharding import Rules, shard
from jdit.train import clips
from jdit.train.config import Config
from jdit.train.drive import drawing, heads
from jdit.train.flow import LOSS, component, noise_levels
from jdit.train.nets import Net, Weights, everywhere, open_net
from jdit.train.sheet import SCHEDULER, film_strips
from jdit.train.video_flow import CONTEXT, part, start
from jdit.train.video_vae import BATCH, batches

log = logging.getLogger("jdit")

ENCODER = {"width": 64, "mlp": 128, "layers": 2, "heads": 2, "patch": 16}
"""[encoder] and its defaults: the image encoder. Upstream takes the states before its last layer."""
NETS = {"transformer": "WanAnimateTransformer3DModel", "image_encoder": "CLIPVisionModel"}
OVERLAPS = (1, 5)
"""Frames that a segment may take over from the one before: those that upstream's pipeline allows."""
SEGMENTS = 3
"""Segments of a held-out clip that are made one after another to measure the model."""


class Pairs(NamedTuple):
    """Who is driven by whom: rows into the clips of one split or of both."""

    target: Int[np.ndarray, "N"]
    driver: Int[np.ndarray, "N"]


class AnimateTask:
    """See `jdit.train.loop.Task`. Parameters: transformer.*, image_encoder.*."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        for section, known in (("loss", LOSS), ("encoder", ENCODER)):
            if unknown := sorted(set(getattr(cfg, section)) - set(known)):
                raise ValueError(f"[{section}]: unknown {unknown}; there are {', '.join(known)}")
        if not cfg.vae or not cfg.text:
            raise ValueError(
                "animation training needs `vae` and `text`: folders of vae, and of text_encoder and tokenizer"
            )
        self.levels = LOSS | dict(cfg.loss)
        self.vae, self.vae_weights = open_net(component(cfg.vae, "vae"), "AutoencoderKLWan", cfg.run.dtype)
        self.text, self.text_weights = open_net(Path(cfg.text) / "text_encoder", "UMT5EncoderModel", cfg.run.dtype)
        self.tokenizer = tokenizer_files.load(Path(cfg.text) / "tokenizer")
        data, time = cfg.data, self.vae.cfg.time_factor or 1
        if not max(OVERLAPS) < data.segment <= data.frames or (data.segment - 1) % time:
            raise ValueError(f"data.segment = {data.segment}: 1 + {time} n frames, more than {max(OVERLAPS)} and at "
                             f"most the {data.frames} of data.frames are wanted")  # fmt: skip
        self.train, self.val = clips.read(data.folder, data.frames, data.size)
        self.texts = clips.texts(self.train.items)
        self.nets = {name: Net(NETS[name], c, cfg.run.dtype) for name, c in self._configs().items()}
        self.face = self.nets["transformer"].cfg.face_size
        self.examples = data.batch
        self.table = sampling.from_config(SCHEDULER, cfg.run.sheet_steps)
        self._segment = jax.jit(self._make_segment)
        self._encode = jax.jit(self._windows)
        self.data: Any = everywhere(self._data())

    def _configs(self) -> dict[str, Any]:
        """Architectures: those of the config, with what follows from the other components."""
        latent = self.vae.cfg.latent_channels
        tower: dict[str, Any] = ENCODER | dict(self.cfg.encoder)
        try:
            vision = CLIPVisionConfig(**tower, image_size=self.cfg.data.size)
            model = WanAnimateConfig(**{
                "in_channels": 2 * latent + 4, "out_channels": latent, "text_dim": self.text.cfg.width,
                "image_dim": vision.width, "image_keys": True, **self.cfg.model,
            })  # fmt: skip
        except TypeError as e:
            raise ValueError(f"[model], [encoder]: {e}") from None
        return {"transformer": model, "image_encoder": vision}

    # ---- data

    def _windows(self, weights: Weights, video: UInt8[Array, "B T H W 3"], keep: Array) -> Float[Array, "B S h w C"]:
        """Latents of videos of which the first `keep` frames are given and the others grey."""
        given = (jnp.arange(video.shape[1]) < keep)[:, None, None, None]
        return encode_video(self.vae.build(weights), unit(video) * given, False).astype(jnp.bfloat16)

    def _latents(self, frames: UInt8[np.ndarray, "N P H W 3"], keep: int, length: int) -> Float[Array, "N P S h w C"]:
        """`_windows` of `length` frames from each frame of each loop on."""
        n, loop = frames.shape[:2]
        clip, start = (a.ravel() for a in np.indices((n, loop)))
        rows = (start[:, None] + np.arange(length)) % loop
        size = 8 * BATCH
        parts = [self._encode(self.vae_weights, frames[clip[i, None], rows[i]], jnp.int32(keep))
                 for i in batches(n * loop, size)]  # fmt: skip
        latents = jnp.concatenate(parts)[: n * loop]
        return latents.reshape(n, loop, *latents.shape[1:])

    def _data(self) -> dict[str, Any]:
        frames, length = self.train.frames, self.cfg.data.segment
        target = self._latents(frames, length, length)
        sample = target[:, 0].astype(jnp.float32)
        log.info(
            "%d clips, latents %s, mean %.3f, deviation %.3f", len(frames), target.shape, sample.mean(), sample.std()
        )
        grey = np.zeros((1, 1, *frames.shape[2:]), np.uint8)
        others = _others([i.group or str(i.file) for i in self.train.items])
        return {
            "target": target, "pose": self._latents(drawing(frames), length, length),
            "tails": jnp.stack([self._latents(frames, o, length) for o in OVERLAPS]),
            "blank": self._latents(grey, 0, length)[0, 0], "still": self._latents(frames, 1, 1)[:, :, 0],
            "frames": frames, "faces": np.stack([heads(f, self.face) for f in frames]),
            "states": self.states(self.texts.texts), "of": self.texts.of, "others": others[0], "counts": others[1],
            "shares": clips.shares(self.train.items, self.cfg.data.balance),
        }  # fmt: skip

    def states(self, texts: list[str]) -> Float[Array, "U L J"]:
        """Text states of captions, and one zero that stands for all padding."""
        tokens, lengths = self.tokenizer.encode_with_lengths(texts, min(24, CONTEXT))
        run = jax.jit(lambda w, t, n: self.text.build(w).padded(t, n))
        return jnp.pad(run(self.text_weights, jnp.asarray(tokens), jnp.asarray(lengths)), ((0, 0), (0, 1), (0, 0)))

    # ---- the step

    def init(self) -> Weights:
        """As in `video_flow`; kernels that the motion encoder divides by the root of their fan-in have variance 1."""
        weights = start(self.nets, self.cfg)
        if not self.cfg.init:
            motion = {k: a for k, a in weights.items() if k.startswith("transformer.motion.") and k.endswith(".kernel")}
            fan_in = lambda k, a: math.prod(a.shape[1 if ".linears." in k else 0 : -1])  # those are a stack of layers
            weights |= {k: a * fan_in(k, a) ** 0.5 for k, a in motion.items()}
        return weights

    def _predict(self, weights: Weights, x, t, channels, pose, face, pictures, states) -> Float[Array, "B 1+S h w C"]:
        """The velocity at latents x and timesteps t, given what `_given` and the texts say."""
        wan, encoder = (self.nets[n].build(part(weights, n)) for n in NETS)
        tokens = encoder(unit(pictures), skip=0).states
        counts = jnp.ones(states.shape[1]).at[-1].set(CONTEXT - states.shape[1] + 1)
        context = wan.embed_context(states, tokens, counts=counts)
        beside = jnp.concatenate([x, channels.astype(x.dtype)], -1)
        return wan.velocity(beside, wan.modulation(t), context, wan.embed_pose(pose), wan.embed_face(face))

    def _channels(self, still, tail, overlap: Int[Array, "B"]) -> Float[Array, "B 1+S h w r+C"]:
        """What stands beside the noise: flags of what is given, and its latents; the reference first."""
        r, (b, s, h, w, _) = self.vae.cfg.time_factor or 1, tail.shape
        given = jnp.broadcast_to(jnp.arange((s - 1) * r + 1) < overlap[:, None], (b, (s - 1) * r + 1))
        marks = jnp.broadcast_to(flags(given[..., None, None].astype(tail.dtype), r), (b, s, h, w, r))
        first = jnp.concatenate([jnp.ones((b, 1, h, w, r), tail.dtype), still[:, None].astype(tail.dtype)], -1)
        return jnp.concatenate([first, jnp.concatenate([marks, tail], -1)], 1)

    def loss(self, params: Weights, data, key):
        n, rules = self.examples, Rules()
        keys = jax.random.split(key, 9)
        spread = lambda a: shard(a, "batch", *[None] * (a.ndim - 1), rules=rules)
        loop, length = data["frames"].shape[1], self.cfg.data.segment
        clip = spread(clips.draw(keys[0], n, len(data["of"]), data["shares"]))
        place, still = jax.random.randint(keys[1], (2, n), 0, loop)
        driver = data["others"][clip, jax.random.randint(keys[2], (n,), 0, data["counts"][clip])]
        kind = jax.random.randint(keys[3], (n,), 0, len(OVERLAPS) + 1)  # the last is no segment before
        tail = data["tails"][jnp.minimum(kind, len(OVERLAPS) - 1), clip, place]
        tail = jnp.where((kind == len(OVERLAPS))[:, None, None, None, None], data["blank"], tail)
        overlap = jnp.asarray([*OVERLAPS, 0])[kind]
        blind = jax.random.bernoulli(
            keys[4], self.cfg.data.empty, (n,)
        )  # as upstream's negative rows: no caption, no face
        caption = data["of"][clip, jax.random.randint(keys[5], (n,), 0, data["of"].shape[1])]
        face = unit(data["faces"][driver[:, None], (place[:, None] + jnp.arange(length)) % loop])
        face = jnp.where(blind[:, None, None, None, None], -1, face)
        reference = data["still"][clip, still]
        x0 = jnp.concatenate([reference[:, None], data["target"][clip, place]], 1).astype(jnp.float32)
        x0, noise = spread(x0), spread(jax.random.normal(keys[6], x0.shape))
        s = noise_levels(keys[7], n, self.levels["mean"], self.levels["deviation"])
        at = s[:, None, None, None, None]
        run = self._predict
        if self.cfg.run.remat == "dots":
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.dots_saveable)
        given = (self._channels(reference, tail, overlap), data["pose"][driver, place], face,
                 data["frames"][clip, still], data["states"][jnp.where(blind, 0, caption)])  # fmt: skip
        velocity = run(params, (1 - at) * x0 + at * noise, 1000 * s, *map(spread, given)).astype(jnp.float32)
        return jnp.square(velocity - (noise - x0)).mean(), {}

    # ---- figures

    def _make_segment(self, weights, vae_weights, still, tail, overlap, pose, face, pictures, states, noise, table):
        """Frames of one segment, in [-1, 1], neither rounded nor clipped, from pixels; tail: of T frames, grey after
        `overlap`."""
        vae, b = self.vae.build(vae_weights), len(noise)
        encode = lambda video: encode_video(vae, video, False)
        reference = encode(still[:, None])[:, 0]
        given = (self._channels(reference, encode(tail), jnp.full(b, overlap)), encode(pose), face, pictures, states)
        call = lambda x, t: self._predict(weights, x, jnp.full(b, t), *given).astype(jnp.float32)
        latents = sampling.solve(call, noise, table)
        return vae.decode(vae.denormalise(latents[:, 1:]))

    def generate(
        self, ema: Weights, stills: UInt8[np.ndarray, "B H W 3"], pose: UInt8[np.ndarray, "B T H W 3"],
        face: UInt8[np.ndarray, "B T F F 3"], texts: list[str], *, segments: int, overlap: int = 1, seed: int = 0,
    ) -> UInt8[np.ndarray, "B T H W 3"]:  # fmt: skip
        """Some segments, each from the tail of the one before it; T is that of all."""
        length, (b, _, height, width, _) = self.cfg.data.segment, pose.shape
        vae, states = self.vae.cfg, self.states(texts)
        space, time = vae.space_factor or 1, vae.time_factor or 1
        shape = (b, (length - 1) // time + 2, height // space, width // space, vae.latent_channels)
        tail, given, out = np.zeros((b, length, height, width, 3), np.float32), 0, []
        for n in range(segments):
            rows = slice(n * (length - overlap), n * (length - overlap) + length)
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), n), shape)
            still, *driving = (unit(jnp.asarray(a)) for a in (stills, pose[:, rows], face[:, rows]))
            args = (still, tail, jnp.int32(given), *driving, stills, states, noise, self.table)
            made = np.asarray(self._segment(ema, self.vae_weights, *args), np.float32)
            out.append(made[:, given:])
            tail, given = np.zeros_like(made), overlap
            tail[:, :overlap] = made[:, -overlap:]
        return np.round(np.clip(np.concatenate(out, 1) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)

    def sheet(self, ema: Weights, folder: Path, step: int) -> dict[str, float]:
        """Held-out clips, made from their first frame and another's motion: their distance to the truth, and those of
        the still picture and of the driving clip; the first eight on a sheet (truth, made, driver)."""
        items, frames = [*self.train.items, *self.val.items], np.concatenate([self.train.frames, self.val.frames])
        pairs = held_out_pairs([i.group for i in items], len(self.train.items), self.cfg.run.evaluate)
        if not len(pairs.target):
            return {}
        length = self.cfg.data.segment
        rows = np.arange(SEGMENTS * (length - 1) + 1) % frames.shape[1]
        truth, other = frames[pairs.target][:, rows], frames[pairs.driver]
        face = np.stack([heads(f, self.face) for f in other])[:, rows]
        other = other[:, rows]
        texts = [items[t].text for t in pairs.target]
        made = self.generate(ema, truth[:, 0], drawing(other), face, texts, segments=SEGMENTS)
        shown = np.stack([film_strips(a[:8], 7) for a in (truth, made, other)], 1)
        write(contact_sheet(shown.reshape(-1, *shown.shape[2:]), columns=3), folder / f"animate_{step:07d}.png")
        known = {items[i].group for i in range(len(self.train.items))}
        new = np.asarray([items[t].group not in known for t in pairs.target])
        figures = {"pairs": float(len(new))}
        for kind, chosen in (("", ~new), ("_new_motion", new)):
            if chosen.any():
                found = distances(made[chosen], truth[chosen], other[chosen], truth[chosen][:, :1])
                figures |= {f"{k}{kind}": v for k, v in found.items()}
        return figures

    def finish(self, ema: Weights, folder: Path) -> dict[str, float]:
        for name, net in self.nets.items():
            net.write(folder / name, part(ema, name))
        size = self.cfg.data.size
        seen = ImageProcessor(size=(("height", size), ("width", size)), crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)
        (folder / "image_processor").mkdir(exist_ok=True)
        text = json.dumps(seen.to_config(), indent=2) + "\n"
        write_file(folder / "image_processor" / "preprocessor_config.json", text)
        return {}


def _others(groups: list[str]) -> tuple[Int[np.ndarray, "N M"], Int[np.ndarray, "N"]]:
    """The other clips of each clip's group, filled up with the first, and how many; alone, a clip drives itself."""
    found = [[m for m, other in enumerate(groups) if other == own and m != n] or [n] for n, own in enumerate(groups)]
    widest = max(map(len, found))
    filled = [others + others[:1] * (widest - len(others)) for others in found]
    return np.asarray(filled, np.int32), np.asarray([len(others) for others in found], np.int32)


def held_out_pairs(groups: list[str], trained: int, most: int) -> Pairs:
    """Clips from number `trained` on, each with one that drives it: a trained one of its group, or the group's next
    where the whole motion is held out. Every so manieth where there are more than `most`."""
    out = []
    for n in range(trained, len(groups)):
        same = [m for m in range(len(groups)) if groups[m] == groups[n] and m != n]
        if same:
            out.append((n, same[0] if same[0] < trained else same[n % len(same)]))
    rows = np.asarray(out, np.int32).reshape(-1, 2)
    chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)] if len(rows) else rows
    return Pairs(chosen[:, 0], chosen[:, 1])


def distances(made: np.ndarray, truth: np.ndarray, other: np.ndarray, still: np.ndarray) -> dict[str, float]:
    """Root of the mean squared difference to the truth, in levels of 8 bits: of what was `made`, of the `still` picture
    repeated, of the `other` clip, which drove it."""
    to = lambda a: float(np.sqrt(np.square(a.astype(np.float32) - truth.astype(np.float32)).mean()))
    return {"made": to(made), "still": to(still), "other": to(other)}
