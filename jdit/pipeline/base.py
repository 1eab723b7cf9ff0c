"""What every family's pipeline shares: the one call, its checks, prompts, seeds and the result."""

import contextlib
import dataclasses
import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdit.media import Picture
from jdit.nn.text.tokenizer import Tokenizer
from jdit.pipeline.executor import Weights
from jdit.structs import Output, Plan, Prompt

OUTPUTS = ("uint8", "float", "latents")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a source gives to a pipeline, whatever its layout.

    Attributes:
        configs: architecture configs by upstream's component name. tokenizers: by upstream's name.
        scheduler: the scheduler's config, as upstream writes it. variant: a name of the zoo, or None.
    """

    family: str
    variant: str | None
    configs: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]
    scheduler: Mapping[str, Any]
    plan: Plan


class Pipeline:
    """A loaded model: `pipe(prompt, ...)` runs it. Subclasses give the stages of one family.

    Attributes:
        components: upstream's component names -> modules.
        plan: what is run unless the call says otherwise.
    """

    takes: ClassVar[tuple[str, ...]]  # the arguments of this family, beside the prompt

    def __init__(self, parts: Parts, weights: Weights, *, mesh: Mesh | None = None):
        self.parts, self.weights, self.mesh = parts, weights, mesh
        self.plan = parts.plan

    def __call__(
        self,
        prompt: str | Sequence[str] | Prompt,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Picture | None = None,
        last_image: Picture | None = None,
        pose_video: Any = None,
        face_video: Any = None,
        background_video: Any = None,
        mask_video: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        solver: str | Mapping[str, Any] | None = None,
        seed: int | Sequence[int] | None = 0,
        latents: np.ndarray | jax.Array | None = None,
        num_outputs: int = 1,
        max_text_tokens: int | None = None,
        output: str = "uint8",
        on_step: Callable[[int, int], None] | None = None,
        **family: Any,
    ) -> Output:
        """Generate.

        Args:
            prompt: a string, a list, or what `encode` returned.
            negative_prompt: what to steer away from; used when guidance is above 1.
            image: the picture to start from. height, width: pixels; None is the variant's own size.
            guidance: the classifier-free scale, 1 is off. shift: the flow shift; None is the checkpoint's.
            solver: "euler", "unipc" or a scheduler config; None is the checkpoint's.
            seed: of the noise: one number (output i takes seed + i), or one an output.
            latents: the initial noise, float32, channels last, instead of the seed's.
            num_outputs: results a prompt. max_text_tokens: the T5 length, padding included.
            output: "uint8", "float" (float32 in [0, 1]) or "latents".
            on_step: called with (step, steps) after each step.
            family: further arguments of this family; `takes` lists them all.

        Raises:
            ValueError: an argument that the family does not take, or a value out of range; the message says what is.
            FloatingPointError: the latents became NaN or infinite. What `on_step` raises stops the run and is raised.
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "prompt", "family", "__class__")} | family
        return self._generate(prompt, **self._check(given))

    def _check(self, given: dict[str, Any]) -> dict[str, Any]:
        always = {"seed", "num_outputs", "output", "on_step"}
        unknown = sorted(k for k, v in given.items() if v is not None and k not in self.takes and k not in always)
        if unknown:
            takes = ", ".join(sorted({*self.takes, *always}))
            raise ValueError(f"{self.parts.family} does not take {', '.join(unknown)}; it takes {takes}")
        if given["output"] not in OUTPUTS:
            raise ValueError(f"output={given['output']!r}; there are {', '.join(OUTPUTS)}")
        if problems := number_problems(given) or self.problems(given):
            raise ValueError("; ".join(problems))
        return {k: v for k, v in given.items() if k in self.takes or k in always}

    def check(self, **arguments: Any):
        """Refuse bad arguments before anything is loaded or run; raises what the call would.

        Raises:
            ValueError: as the call.
        """
        self._check({"output": "uint8"} | arguments)
        self.size(arguments.get("height"), arguments.get("width"))
        self.ready()

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """What is wrong with a family's own arguments, beyond single numbers: a line each."""
        return []

    def ready(self):
        """Check that the parts which text goes through are there.

        Raises:
            ValueError: naming those that the model came without.
        """

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Pixels of a run: what is asked for, or the variant's own, checked."""
        raise TypeError(f"{type(self).__name__} is abstract: use a family's pipeline")

    def stream(self, prompt: str | Sequence[str] | Prompt, **arguments: Any):
        """Yield results a segment at a time; a family without segments yields its one result."""
        yield self(prompt, **arguments)

    @property
    def components(self) -> dict[str, Any]:
        return {name: self.weights[name] for name in self.parts.configs}

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _generate(self, prompt, **arguments: Any) -> Output:
        raise TypeError(f"{type(self).__name__} is abstract: use a family's pipeline")


WHOLE = ("height", "width", "num_frames", "steps", "num_outputs", "max_text_tokens")
FINITE = ("guidance", "shift", "strength", "skip_layer_scale", "skip_layer_start", "skip_layer_stop")


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


class _Steps:
    """Tells a call's listener of its steps; what the listener raises stops the run at that step."""

    def __init__(self, listener: Callable[[int, int], None]):
        self.listener, self.raised = listener, None

    def __call__(self, index: int, steps: int):
        try:
            self.listener(index + 1, steps)
        except BaseException as e:
            self.raised = e
            raise


_steps: _Steps | None = None


def report_step(index: int, steps: int):
    """The one step callback that stages compile in: it tells the call's listener, so another one never recompiles."""
    if _steps is not None:
        _steps(index, steps)


@contextlib.contextmanager
def reporting(listener: Callable[[int, int], None] | None):
    """While inside, `report_step` tells `listener`; on leaving, all steps have been told.

    Raises:
        Exception: what the listener raised, in the place of the error that the device makes of it.
    """
    global _steps
    if listener is None:
        yield
        return
    _steps = told = _Steps(listener)
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
        _steps, trace.disabled = None, muted


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


def given_latents(latents: np.ndarray | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The caller's noise, float32.

    Raises:
        ValueError: another shape.
    """
    if np.shape(latents) != shape:
        raise ValueError(f"latents are {np.shape(latents)}; this call needs {shape} (channels last, unpatched)")
    return jnp.asarray(latents, jnp.float32)


def check_size(height: int, width: int, multiple: int, largest: int):
    """Refuse a size that the patch or the autoencoder cannot take.

    Raises:
        ValueError: naming the nearest sizes that work.
    """
    problems = []
    for name, n in (("height", height), ("width", width)):
        if n < 1 or n % multiple or n > largest:
            below = min(max(n // multiple, 1) * multiple, largest)
            near = sorted({below, min(max(n // multiple + 1, 1) * multiple, largest)})
            problems.append(f"{name}={n} does not work, {' or '.join(map(str, near))} would")
    if problems:
        raise ValueError(f"{'; '.join(problems)} (multiples of {multiple} up to {largest})")


def check_finite(x: jax.Array, stage: str):
    if not bool(jnp.isfinite(x).all()):
        raise FloatingPointError(
            f"the latents hold NaN or infinity after {stage}: try dtype float32 or a lower guidance"
        )


def to_pixels(decoded: jax.Array, kind: str) -> jax.Array:
    """Decoded values in [-1, 1] to float32 in [0, 1] or uint8, rounded as upstream does."""
    unit = jnp.clip(decoded.astype(jnp.float32) / 2 + 0.5, 0, 1)
    return unit if kind == "float" else jnp.round(unit * 255).astype(jnp.uint8)
