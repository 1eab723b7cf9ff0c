"""Stable Diffusion 3 and 3.5: text to image, and image to image (upstream pipeline_stable_diffusion_3[_img2img].py).

B outputs, h w latent rows and columns, C latent channels, L tokens, S steps.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jdit import media, sampling
from jdit.nn.mmdit import MMDiT, Modulation
from jdit.nn.text.clip import CLIPText
from jdit.nn.text.t5 import T5
from jdit.nn.vae.autoencoder_kl import AutoencoderKL
from jdit.nn.vae.tiling import decode_tiled, encode_tiled, one_at_a_time
from jdit.pipeline import base, calls, modulation
from jdit.pipeline.calls import or_
from jdit.pipeline.executor import Stage, run
from jdit.sampling import guidance as guide
from jdit.structs import Output, Prompt, Text

ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))
MAX_T5_TOKENS = 512
SKIP_SETTINGS = ("skip_layer_scale", "skip_layer_start", "skip_layer_stop")


class LayerSkip(NamedTuple):
    """Skip-layer guidance: which layers to pass over, how strongly to steer away from that, and at which steps."""

    layers: Bool[Array, "layers"]
    scale: Float[Array, ""]
    active: Bool[Array, "S"]


# ------------------------------------------------------------------------------------------------- stages


def encode_clip(clip_l: CLIPText, clip_g: CLIPText, ids_l, ids_g, joint_dim: int, absent: int, skip: int) -> Text:
    """Both CLIP encoders side by side, zero-padded to the joint width, then `absent` zero tokens where T5 would be.

    The zero tokens are equal and stay equal through the network, so one is sent, counted `absent` times.
    """
    states, pooled = _clip(clip_l, clip_g, ids_l, ids_g, joint_dim, skip)
    zero = jnp.zeros((states.shape[0], 1, joint_dim), states.dtype)
    counts = jnp.ones(states.shape[1] + 1).at[-1].set(absent)
    return Text(jnp.concatenate([states, zero], 1), pooled, counts)


def encode_clip_t5(clip_l: CLIPText, clip_g: CLIPText, t5: T5, ids_l, ids_g, ids_t5, joint_dim: int, skip: int) -> Text:
    """The CLIP tokens, then the T5 tokens (padding included and attended to, as upstream)."""
    states, pooled = _clip(clip_l, clip_g, ids_l, ids_g, joint_dim, skip)
    return Text(jnp.concatenate([states, t5(ids_t5).astype(states.dtype)], 1), pooled)


def _clip(clip_l: CLIPText, clip_g: CLIPText, ids_l, ids_g, joint_dim: int, skip: int):
    one, two = clip_l(ids_l, skip=skip), clip_g(ids_g, skip=skip)
    states = jnp.concatenate([one.states, two.states], -1)
    states = jnp.pad(states, ((0, 0), (0, 0), (0, joint_dim - states.shape[-1])))
    return states, jnp.concatenate([one.projected, two.projected], -1)


def encode_image(vae: AutoencoderKL, pixels, keys, tiling: bool):
    """uint8 (1, H, W, 3) to normalised latents: a draw from the posterior for each key, its mode without keys."""
    unit = pixels.astype(jnp.float32) / 127.5 - 1
    posterior = encode_tiled(vae, unit) if tiling else vae.encode(unit)
    z = posterior.mode() if keys is None else jax.vmap(posterior.sample)(keys)[:, 0]
    return vae.normalise(z.astype(jnp.float32))


def prepare(positive: Text, negative: Text | None, noise, clean, table: sampling.Table):
    """The first x, and the text of [negative; positive]: states of each output, pooled text of each prompt."""
    x = noise if clean is None else sampling.add_noise(jnp.broadcast_to(clean, noise.shape), noise, table)
    rows = lambda a: jnp.repeat(a, noise.shape[0] // positive.states.shape[0], axis=0)
    both = (positive,) if negative is None else (negative, positive)
    states = jnp.concatenate([rows(t.states) for t in both])
    pooled: Any = [t.pooled for t in both]
    return x, Text(states, jnp.concatenate(pooled), positive.counts)


def modulate(transformer: MMDiT, text: Text, table: sampling.Table) -> Modulation:
    """Modulation of all steps, of each prompt."""
    assert text.pooled is not None  # CLIP's
    return transformer.modulation_table(jnp.asarray(table.timestep, jnp.float32), text.pooled)


def denoise(
    transformer: MMDiT, x, text: Text, mods: Modulation | None, table: sampling.Table, scale, skip: LayerSkip | None,
    keys, report: bool,
) -> Float[Array, "B h w C"]:  # fmt: skip
    """The sampling loop. Modulation of all steps and the text projection are computed before it.

    Args:
        mods: of each step and prompt; None makes it in the steps.
    """
    pooled: Any = text.pooled
    rows = (mods, None if skip is None else skip.active)
    context, outputs = transformer.embed_context(text.states), len(text.states) // len(pooled)
    of_step = modulation.at(mods, lambda t: transformer.modulation_table(t, pooled))
    spread = lambda m: m if outputs == 1 else jnp.repeat(m, outputs, -3)

    def model(x, t, row):
        mod = jax.tree.map(spread, of_step(t, row[0]))
        return transformer.velocity(x, mod, context, context_counts=text.counts)

    def without_layers(x, t, row, *, layers):
        half = jax.tree.map(lambda m: spread(m)[..., -x.shape[0] :, :, :], of_step(t, row[0]))
        tokens = context[-x.shape[0] :]
        return transformer.velocity(x, half, tokens, context_counts=text.counts, skip=layers)

    if scale is not None and skip is not None:
        model = guide.skip_layer(
            model, functools.partial(without_layers, layers=skip.layers), scale, skip.scale, active=lambda row: row[1]
        )
    elif scale is not None:
        model = guide.classifier_free(model, scale)
    told = calls.report_step if report else None
    return sampling.solve(model, x, table, key=keys, per_step=rows, on_step=told)


def decode(vae: AutoencoderKL, latents, kind: str, tiling: bool, slicing: bool):
    """Latents to pixels, whole, by tiles, or a picture at a time."""
    whole = (lambda z: decode_tiled(vae, z)) if tiling else vae.decode
    z = vae.denormalise(latents)
    return calls.to_pixels(one_at_a_time(whole, z) if slicing else whole(z), kind)


# ----------------------------------------------------------------------------------------------- pipeline


def stages(
    *, t5: bool, image: bool, pixels: bool, encode: bool = True, generate: bool = True, tabled: bool = True
) -> list[Stage]:
    """The stage list of a call: with T5 or without, from a picture or from noise, to pixels or to latents, with a table
    of modulation or without."""
    clip = ("text_encoder", "text_encoder_2")
    out: list[Stage] = []
    if encode and t5:
        reads = ("ids", "ids_2", "ids_3", "joint_dim", "clip_skip")
        static = ("joint_dim", "clip_skip")
        out.append(Stage("encode_text", encode_clip_t5, (*clip, "text_encoder_3"), reads, ("encoded",), static))
    elif encode:
        reads, static = ("ids", "ids_2", "joint_dim", "absent", "clip_skip"), ("joint_dim", "absent", "clip_skip")
        out.append(Stage("encode_text", encode_clip, clip, reads, ("encoded",), static))
    if not generate:
        return out
    if image:
        reads = ("image", "image_keys", "vae_tiling")
        out.append(Stage("encode_image", encode_image, ("vae",), reads, ("clean",), ("vae_tiling",)))
    reads = ("x", "text", "modulation", "table", "guidance", "skip", "keys", "report")
    loop = Stage("denoise", denoise, ("transformer",), reads, ("latents",), reads[-1:], frees=("modulation",))
    out.append(Stage("prepare", prepare, (), ("positive", "negative", "noise", "clean", "table"), ("x", "text")))
    out += modulation.stages(loop, modulate, ("text", "table"), tabled=tabled)
    if pixels:
        reads = ("latents", "output", "vae_tiling", "vae_slicing")
        out.append(Stage("decode", decode, ("vae",), reads, ("pixels",), reads[1:]))
    return out


class StableDiffusion3(base.Pipeline):
    """SD3 and SD3.5 with or without T5.

    Beside the common arguments: `strength` (image to image: the share of the noise that is laid on the picture, 0.6),
    `skip_layers` with `skip_layer_scale` (2.8), `skip_layer_start` (0.01) and `skip_layer_stop` (0.2) for skip-layer
    guidance, `clip_skip`, `vae_tiling` and `vae_slicing`.
    """

    takes = (
        "negative_prompt", "image", "height", "width", "steps", "guidance", "shift", "solver", "latents",
        "max_text_tokens", "strength", "skip_layers", "skip_layer_scale", "skip_layer_start", "skip_layer_stop",
        "clip_skip", "vae_tiling", "vae_slicing",
    )  # fmt: skip
    of_text = ("max_text_tokens", "clip_skip")

    @property
    def size_multiple(self) -> int:
        return self.parts.configs["vae"].factor * self.parts.configs["transformer"].patch

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """The size of a run, checked.

        Raises:
            ValueError: naming the nearest sizes that work.
        """
        cfg = self.parts.configs["transformer"]
        own = cfg.sample_size * self.parts.configs["vae"].factor
        size = or_(or_(height, self.plan.height), own), or_(or_(width, self.plan.width), own)
        calls.check_size(*size, self.size_multiple, cfg.pos_size)
        return size

    def _encoders(self) -> tuple[tuple[str, str], ...]:
        return ENCODERS if "text_encoder_3" in self.parts.configs else ENCODERS[:2]

    def ready(self):
        """See the base class."""
        needed = [n for pair in self._encoders() for n in pair]
        if lacks := sorted(n for n in needed if n not in self.parts.configs and n not in self.parts.tokenizers):
            raise ValueError(f"this model came without {', '.join(lacks)}: load it with parts={{name: path}}")

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """See the base class."""
        out = self._text_problems(given)
        if given.get("image") is None and given.get("strength") is not None:
            out.append("strength goes with image")
        layers, skipped = self.parts.configs["transformer"].layers, given.get("skip_layers")
        if not skipped:
            return out + [f"{n} goes with skip_layers" for n in SKIP_SETTINGS if given.get(n) is not None]
        if isinstance(skipped, str | int):
            out.append(f"skip_layers={skipped!r}; it must be a list of layer numbers")
        elif bad := [i for i in skipped if i not in range(layers)]:
            out.append(f"skip_layers {bad} do not exist; the transformer has layers 0 to {layers - 1}")
        if not or_(given.get("guidance"), self.plan.guidance) > 1:
            out.append("skip_layers needs guidance above 1")
        return out

    def _text_problems(self, given: Mapping[str, Any]) -> list[str]:
        tokens, skip, out = given.get("max_text_tokens"), given.get("clip_skip"), []
        if tokens is not None and tokens > MAX_T5_TOKENS:
            out.append(f"max_text_tokens={tokens}; it may be 1 to {MAX_T5_TOKENS}")
        encoders = [self.parts.configs[n] for n, _ in ENCODERS[:2] if n in self.parts.configs]
        most = min((cfg.layers for cfg in encoders), default=1) - 1
        if skip is not None and skip not in range(most + 1):
            out.append(f"clip_skip={skip}; it may be 0 to {most}")
        return out

    def encode(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = "",
        max_text_tokens: int | None = None,
        clip_skip: int | None = None,
    ) -> Prompt:
        """Encode prompts once, to be given to calls in their place; negative_prompt None leaves out the negatives."""
        with self.on_mesh():
            return self._encode(prompt, negative_prompt, {}, max_text_tokens=max_text_tokens, clip_skip=clip_skip)

    def _encode(self, prompt, negative, timings, max_text_tokens=None, clip_skip=None) -> Prompt:
        texts, count = calls.both_texts(prompt, negative)
        tokens = or_(max_text_tokens, self.plan.max_text_tokens)
        if problems := self._text_problems({"max_text_tokens": tokens, "clip_skip": clip_skip}):
            raise ValueError("; ".join(problems))
        self.ready()
        t5 = "text_encoder_3" in self.parts.configs
        # upstream pads both to the first one's limit; files that say none mean the positions that there are
        clip_tokens = self.parts.tokenizers["tokenizer"].max_length or self.parts.configs["text_encoder"].max_positions
        values: dict[str, Any] = {
            "joint_dim": self.parts.configs["transformer"].joint_dim, "absent": tokens, "clip_skip": clip_skip or 0,
        }  # fmt: skip
        for (_, name), key in zip(self._encoders(), ("ids", "ids_2", "ids_3")):
            length = tokens if key == "ids_3" else clip_tokens
            values[key] = jnp.asarray(self.parts.tokenizers[name].encode(texts, max_length=length))
        values, spent = run(stages(t5=t5, image=False, pixels=False, generate=False), self.weights, values)
        timings |= spent
        return calls.halves(values["encoded"], count, negative)

    def usual_stages(self) -> list[Stage]:
        """See the base class."""
        tabled = modulation.tabled(*self._modulation())
        return stages(t5="text_encoder_3" in self.parts.configs, image=False, pixels=True, tabled=tabled)

    def tables(self) -> dict[str, int]:
        """See the base class."""
        return {"modulation": modulation.table_bytes(*self._modulation())}

    def tokens(self) -> int:
        """See the base class."""
        height, width = self.size()
        return (height // self.size_multiple) * (width // self.size_multiple)

    def _modulation(self, steps: int | None = None, prompts: int | None = None) -> tuple[Any, ...]:
        """What the size of a table depends on; `prompts` counts the negative ones."""
        cfg = self.parts.configs["transformer"]
        pooled = modulation.spec(or_(prompts, self.rows), cfg.pooled_dim, dtype=cfg.dtype)
        return MMDiT, cfg, modulation.spec(or_(steps, self.plan.steps)), pooled

    def table(self, height: int, width: int, steps: int, *, shift=None, solver=None, strength: float | None = None):
        """The solver's table of a run; with `strength` only its last part, as upstream's image to image begins."""
        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        begin = 0 if strength is None else sampling.start_index(steps, strength)
        return self._table(steps, shift=shift, solver=solver, tokens=tokens, begin=begin)

    def _skip(self, a: Mapping[str, Any], steps: int) -> LayerSkip | None:
        if not a.get("skip_layers"):
            return None
        layers = self.parts.configs["transformer"].layers
        start, stop = or_(a.get("skip_layer_start"), 0.01), or_(a.get("skip_layer_stop"), 0.2)
        active = guide.active_steps(steps, start, stop)
        scale = jnp.float32(or_(a.get("skip_layer_scale"), 2.8))
        return LayerSkip(jnp.asarray(np.isin(np.arange(layers), a["skip_layers"])), scale, jnp.asarray(active))

    def _generate(self, prompt, **a: Any) -> Output:
        height, width = self.size(a["height"], a["width"])
        steps, scale = or_(a["steps"], self.plan.steps), or_(a["guidance"], self.plan.guidance)
        strength = None if a["image"] is None else or_(a.get("strength"), 0.6)
        table = self.table(height, width, steps, shift=a["shift"], solver=a["solver"], strength=strength)
        guided, timings = scale > 1, {}
        factor, cfg = self.parts.configs["vae"].factor, self.parts.configs["transformer"]
        with self.on_mesh():
            prompt = self._prompt(prompt, a, guided, timings)
            count = prompt.positive.states.shape[0] * a["num_outputs"]
            noise = calls.first_noise(a, (count, height // factor, width // factor, cfg.in_channels))
            values: dict[str, Any] = {
                "positive": prompt.positive, "negative": prompt.negative if guided else None, "noise": noise,
                "clean": None, "table": table, "guidance": jnp.float32(scale) if guided else None,
                "skip": self._skip(a, table.steps) if guided else None, "report": a["on_step"] is not None,
                "output": a["output"], "keys": calls.solver_keys(a["seed"], count, table.stochastic),
                "vae_tiling": bool(a.get("vae_tiling")), "vae_slicing": bool(a.get("vae_slicing")), "modulation": None,
            }  # fmt: skip
            if a["image"] is not None:
                values["image"] = jnp.asarray(media.resize(media.picture(a["image"]), height, width))[None]
                values["image_keys"] = calls.posterior_keys(a["seed"], count)
            prompts = len(prompt.positive.states) * (2 if guided else 1)
            todo = stages(
                t5=False, image=a["image"] is not None, pixels=a["output"] != "latents", encode=False,
                tabled=modulation.tabled(*self._modulation(table.steps, prompts)),
            )  # fmt: skip
            with calls.reporting(a["on_step"]):
                values, spent = run(todo, self.weights, values)
        return calls.result(values, timings | spent)
