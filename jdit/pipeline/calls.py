"""What calls of every family are made of: checks of arguments, texts, seeds and noise, step reports, results."""

import contextlib
import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdit import sharding
from jdit.nn.vae.tiling import one_at_a_time
from jdit.structs import Output, Prompt, Text

Listener = Callable[[int, int], None]  # (done, of how many)


def or_(value: Any, default: Any) -> Any:
    return default if value is None else value


def both_texts(prompt, negative) -> tuple[list[str], int]:
    """The negative texts, if there are any, then the prompts; and how many prompts there are."""
    texts = as_list(prompt, "prompt")
    count = len(texts)
    return (texts if negative is None else as_list(negative, "negative_prompt", count) + texts), count


def halves(encoded: Text, count: int, negative: Any) -> Prompt:
    """A Prompt of encoded `both_texts`; their counts are of all prompts alike."""
    cut = lambda part: Text(*(jax.tree.map(lambda a: a[part], f) for f in encoded))._replace(counts=encoded.counts)
    return Prompt(cut(slice(-count, None)), None if negative is None else cut(slice(0, count)))


def first_noise(given: Mapping[str, Any], shape: tuple[int, ...]) -> jax.Array:
    """The caller's latents, or the seed's noise."""
    return noise(shape, given["seed"]) if given["latents"] is None else given_latents(given["latents"], shape)


def result(values: Mapping[str, Any], timings: dict[str, float], fps: float | None = None) -> Output:
    """What a call returns, whole in every process.

    Raises:
        FloatingPointError: the latents hold NaN or infinity.
    """
    values = sharding.whole({name: values[name] for name in ("latents", "pixels") if name in values})
    check_finite(values["latents"], "denoise")
    pixels = np.asarray(values["pixels"]) if "pixels" in values else None
    return Output(pixels, values["latents"], timings, fps)


WHOLE = (
    "height", "width", "num_frames", "steps", "num_outputs", "max_text_tokens", "segment_frames", "overlap_frames",
    "num_segments", "layers",
)  # fmt: skip
FINITE = (
    "guidance", "guidance_2", "true_guidance", "shift", "strength", "skip_layer_scale", "skip_layer_start",
    "skip_layer_stop",
)  # fmt: skip


def number_problems(given: Mapping[str, Any]) -> list[str]:
    """Arguments that should be whole numbers of at least 1, or finite numbers, and are not: a line each."""
    out = []
    for name in (n for n in (*WHOLE, *FINITE) if given.get(n) is not None):
        value = given[name]
        kinds = (int, np.integer) if name in WHOLE else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds):
            out.append(f"{name}={value!r}; it must be a {'whole ' * (name in WHOLE)}number")
        elif name in WHOLE and value < 1 and name not in ("height", "width"):  # their check knows what would work
            out.append(f"{name}={value}; it must be at least 1")
        elif not math.isfinite(value):
            out.append(f"{name}={value}; it must be finite")
    return out


class _Listeners:
    """Tells a call's listeners how far it is; what one of them raises stops the run there."""

    def __init__(self, on_step: Listener | None, on_frame: Listener | None, segment: int, segments: int):
        self.on_step, self.on_frame, self.frames, self.raised = on_step, on_frame, 0, None
        self.segment, self.segments, self.last = segment, segments, -1

    def step(self, index: int, steps: int):
        self.segment += index <= self.last  # the next segment's first
        self.last = index
        self._tell(self.on_step, self.segment * steps + index + 1, self.segments * steps)

    def chunk(self, frames: int, total: int):
        self.frames += frames
        self._tell(self.on_frame, self.frames, total)

    def _tell(self, listener: Listener | None, done: int, total: int):
        try:
            if listener is not None:
                listener(done, total)
        except BaseException as e:
            self.raised = e
            raise


_listeners: _Listeners | None = None


def report_step(index: int, steps: int):
    """The one step callback that stages compile in: it tells the call's listener, so another one never recompiles."""
    if _listeners is not None:
        _listeners.step(index, steps)


def report_frames(pixels: Array, total: int):
    """Compiled into a decoder's loop (the `finish` of its chunks): tells the call's listener that the frames (B, T, H,
    W, 3) of a video of `total` are there."""
    count, pixel = pixels.shape[1], pixels[(0,) * pixels.ndim]  # after the chunk, not before
    jax.debug.callback(lambda _: None if _listeners is None else _listeners.chunk(count, total), pixel)


@contextlib.contextmanager
def reporting(on_step: Listener | None, on_frame: Listener | None = None, *, segment: int = 0, segments: int = 1):
    """While inside, `report_step` tells `on_step` (step, steps) and `report_frames` tells `on_frame` (frames decoded,
    frames); on leaving, everything has been told.

    Args:
        segment: the segment that is next, of how many `segments`: steps are counted over all of them.

    Raises:
        Exception: what a listener raised, in the place of the error that the device makes of it.
    """
    global _listeners
    if on_step is None and on_frame is None:
        yield
        return
    _listeners = told = _Listeners(on_step, on_frame, segment, segments)
    trace = logging.getLogger("jax._src.debugging")  # it logs what a callback raises, which is raised again here
    muted, trace.disabled = trace.disabled, True
    try:
        yield
        jax.effects_barrier()
    except jax.errors.JaxRuntimeError:
        if told.raised is None:
            raise
        raise told.raised from None
    finally:
        _listeners, trace.disabled = None, muted


def as_list(texts: str | Sequence[str], what: str, count: int | None = None) -> list[str]:
    """A string as a list of `count` equal ones, a list as it is.

    Raises:
        ValueError: not strings, none, or another number of them than `count`.
    """
    out = [texts] * (count or 1) if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else []
    if not out or not all(isinstance(t, str) for t in out):
        raise ValueError(f"{what} must be a string or a list of strings, not {texts!r}")
    if count is not None and len(out) != count:
        raise ValueError(f"{len(out)} texts in {what} for {count} prompts")
    return out


def keys(seed: int | Sequence[int], count: int) -> list[jax.Array]:
    """A random key an output: of seed + i, or of each of a list of seeds.

    Raises:
        ValueError: seeds that are no 64-bit integers, or another number of them than outputs.
    """
    try:
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(count)]
        else:
            seeds = [operator.index(s) for s in seed]
    except TypeError:
        raise ValueError(f"seed={seed!r}; it must be a whole number, or a list of one an output") from None
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} outputs")
    if wide := [s for s in seeds if not -(2**63) <= s < 2**63]:
        raise ValueError(f"seed={wide[0]} has more than 64 bits")
    return [jax.random.key(s) for s in seeds]


def noise(shape: Sequence[int], seed: int | Sequence[int] | None) -> jax.Array:
    """Standard normal float32, each row from its own seed, so that a row does not depend on the batch around it.

    Raises:
        ValueError: as `keys`.
    """
    rows = keys(0 if seed is None else seed, shape[0])
    return jnp.stack([jax.random.normal(key, tuple(shape[1:]), jnp.float32) for key in rows])


def solver_keys(seed: int | Sequence[int] | None, count: int, stochastic: bool) -> jax.Array | None:
    """A key an output for the noise of stochastic solvers, apart from that of the first noise; None adds none."""
    if seed is None or not stochastic:
        return None
    return jnp.stack([jax.random.fold_in(key, 2) for key in keys(seed, count)])


def posterior_keys(seed: int | Sequence[int] | None, count: int) -> jax.Array | None:
    """A key an output for draws from an autoencoder's posterior, apart from that of the first noise, which is laid on
    them; None takes the mode."""
    return None if seed is None else jnp.stack([jax.random.fold_in(key, 1) for key in keys(seed, count)])


def given_latents(latents: np.ndarray | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The caller's noise, float32.

    Raises:
        ValueError: another shape.
    """
    if np.shape(latents) != shape:
        raise ValueError(f"latents are {np.shape(latents)}; this call needs {shape} (channels last, unpatched)")
    return jnp.asarray(latents, jnp.float32)


def check_size(height: int, width: int, multiple: int | tuple[int, int], most: int | tuple[int, ...]):
    """Refuse a size that the patch or the autoencoder cannot take.

    Args:
        multiple: of height and width, or of each. most: how many times that a side may be, or each.

    Raises:
        ValueError: naming the nearest sizes that work.
    """
    sides = (multiple, multiple) if isinstance(multiple, int) else multiple
    limits = (most, most) if isinstance(most, int) else most
    problems = []
    for name, n, side, most in zip(("height", "width"), (height, width), sides, limits):
        if n < 1 or n % side or n > side * most:
            near = [min(max(k, 1), most) * side for k in (n // side, n // side + 1)]
            problems.append(f"{name}={n} does not work, {' or '.join(map(str, sorted(set(near))))} would")
    if problems:
        of = dict.fromkeys(f"multiples of {side} up to {side * most}" for side, most in zip(sides, limits))
        raise ValueError(f"{'; '.join(problems)} ({' and '.join(of)})")


def check_frames(frames: int, factor: int, patch: int, most: int):
    """Refuse a number of frames that does not become a whole number of latent frames and patches.

    Args:
        factor: frames of all latent frames but the first, which is one. patch: latent frames of a patch.
        most: patches that there may be.

    Raises:
        ValueError: naming the nearest numbers that work.
    """
    length = lambda patches: (min(max(patches, 1), most) * patch - 1) * factor + 1
    below = ((frames - 1) // factor + 1) // patch
    if frames != length(below):
        near = " or ".join(map(str, sorted({length(below), length(below + 1)})))
        raise ValueError(
            f"num_frames={frames} does not work, {near} would ({length(1)} + {factor * patch} n, up to {length(most)})"
        )


def check_finite(x: jax.Array, stage: str):
    if not bool(jnp.isfinite(x).all()):
        raise FloatingPointError(
            f"the latents hold NaN or infinity after {stage}: try dtype float32 or a lower guidance"
        )


def decode_video(vae: Any, z: jax.Array, frames: int, *, kind: str, tiles: Any, slicing: bool, report: bool):
    """Raw latents (B, S, h, w, C) to `frames` frames of pixels, a chunk at a time: no video of floats is there where
    `kind` is uint8. `slicing` decodes a video at a time; `report` tells `report_frames`."""
    total = frames * (z.shape[0] if slicing else 1)

    def done(pixels):
        if report:
            report_frames(pixels, total)
        return to_pixels(pixels, kind)

    whole = lambda z: vae.decode(z, tiles=tiles, finish=done)
    return one_at_a_time(whole, z) if slicing else whole(z)


def to_pixels(decoded: jax.Array, kind: str) -> jax.Array:
    """Decoded values in [-1, 1] to float32 in [0, 1] or uint8, rounded as upstream does."""
    unit = jnp.clip(decoded.astype(jnp.float32) / 2 + 0.5, 0, 1)
    return unit if kind == "float" else jnp.round(unit * 255).astype(jnp.uint8)
