"""What every family's pipeline shares: the one call, its arguments, prompts and solver tables."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from jdit import media, sampling
from jdit.media import Picture
from jdit.nn.text.tokenizer import Tokenizer
from jdit.pipeline.calls import Listener, number_problems, or_
from jdit.pipeline.executor import Stage, Weights
from jdit.structs import Output, Plan, Prompt

OUTPUTS = ("uint8", "float", "latents")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a source gives to a pipeline, whatever its layout.

    Attributes:
        configs: architecture configs by upstream's component name. tokenizers: by upstream's name.
        scheduler: the scheduler's config, as upstream writes it. variant: a name of the zoo, or None.
        settings: what the family reads beside the components, by upstream's names (`boundary_ratio`,
            `image_processor`).
    """

    family: str
    variant: str | None
    configs: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]
    scheduler: Mapping[str, Any]
    plan: Plan
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Pipeline:
    """A loaded model: `pipe(prompt, ...)` runs it. Subclasses give the stages of one family.

    Attributes:
        components: upstream's component names -> modules.
        plan: what is run unless the call says otherwise.
    """

    takes: ClassVar[tuple[str, ...]]  # the arguments of this family, beside the prompt
    of_text: ClassVar[tuple[str, ...]] = ("max_text_tokens",)  # those of them that encoding a prompt takes
    layered: ClassVar[bool] = False  # whether a picture is given, and results are layers, with transparency

    def __init__(self, parts: Parts, weights: Weights, *, mesh: Mesh | None = None):
        self.parts, self.weights, self.mesh = parts, weights, mesh
        self.plan = parts.plan

    def __call__(
        self,
        prompt: str | Sequence[str] | Prompt,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
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
        on_step: Listener | None = None,
        **family: Any,
    ) -> Output:
        """Generate.

        Args:
            prompt: a string, a list, or what `encode` returned.
            negative_prompt: what to steer away from; used when guidance is above 1.
            image: the picture to start from, or to edit (a list in families that take several).
            height, width: pixels; None is the variant's own size.
            guidance: the classifier-free scale, 1 is off; or the scale that a distilled model is told.
            shift: the flow shift; None is the checkpoint's.
            solver: a name that `sampling.with_solver` knows, or a scheduler config; None is the checkpoint's.
            seed: of the noise: one number (output i takes seed + i), or one an output.
            latents: the initial noise, float32, channels last, instead of the seed's.
            last_image: the picture to end with. num_frames: of a video; None is the variant's own number.
            num_outputs: results a prompt. max_text_tokens: the T5 length, padding included; of language models,
                what follows the template's head.
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
        self.frames(arguments.get("num_frames"))
        for name in ("image", "last_image"):
            if arguments.get(name) is not None:
                self.pictures(arguments[name])
        self.ready()

    def check_prompt(self, prompt: Any):
        """Refuse a prompt that the family cannot take before anything is loaded or run; raises what the call would.

        Raises:
            ValueError: as the call.
        """

    def pictures(self, given: Any) -> list[np.ndarray]:
        """The pictures that an argument holds, read: one, but in families that take several.

        Raises:
            ValueError: more than one, or what `media.picture` refuses.
        """
        if isinstance(given, list | tuple):
            raise ValueError(f"{self.parts.family} takes one picture in its place, not a list of {len(given)}")
        return [media.picture(given, alpha=self.layered)]

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """What is wrong with a family's own arguments, beyond single numbers: a line each."""
        return []

    @classmethod
    def misfits(cls, parts: Parts) -> list[str]:
        """What keeps the components of a source from working together: a line each."""
        return []

    @classmethod
    def reduced(cls, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the components of which a part is never run, as configs without it."""
        return {}

    @property
    def needs(self) -> tuple[str, ...]:
        """The parts that a call's words and pictures go through."""
        return ()

    def ready(self):
        """Check that the parts which words and pictures go through are there.

        Raises:
            ValueError: naming those that the model came without.
        """
        if lacks := [n for n in self.needs if n not in self.parts.configs and n not in self.parts.tokenizers]:
            raise ValueError(f"this model came without {', '.join(lacks)}: load it with parts={{name: path}}")

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Pixels of a run: what is asked for, or the variant's own, checked."""
        raise TypeError(f"{type(self).__name__} is abstract: use a family's pipeline")

    def frames(self, num_frames: int | None = None) -> int | None:
        """Frames of a run: what is asked for, or the variant's own number, checked; None for pictures."""
        return None

    def usual_stages(self) -> list[Stage]:
        """The stages of a call with the variant's usual arguments, for the memory plan."""
        raise TypeError(f"{type(self).__name__} is abstract: use a family's pipeline")

    def tables(self) -> dict[str, int]:
        """Bytes of the modulation tables of a usual call, by the names that its stages give them (of those, too, that
        are too large to be made: see `jdit.pipeline.modulation`)."""
        return {}

    @property
    def rows(self) -> int:
        """Samples that the transformer sees in a step of a usual call for each prompt: 2 under guidance."""
        return 2 if self.plan.guidance > 1 else 1

    def tokens(self) -> int:
        """Tokens of the picture or video of a usual call, which a mesh's sequence axis divides."""
        raise TypeError(f"{type(self).__name__} is abstract: use a family's pipeline")

    def activations(self) -> float:
        """Bytes that a usual call needs beside the weights, about; 0 where nobody has measured."""
        return 0.0

    def stream(self, prompt: str | Sequence[str] | Prompt, **arguments: Any) -> Iterator[Output]:
        """Yield results a segment at a time, each as soon as it is there; a family without segments yields its one.

        Takes what a call takes, and refuses what it refuses before the first result.
        """
        call = inspect.signature(self.__call__).bind(prompt, **arguments)
        call.apply_defaults()
        given = {k: v for k, v in call.arguments.items() if k not in ("prompt", "family")}
        return self._stream(prompt, **self._check(given | call.arguments["family"]))

    def segmented(self, given: Mapping[str, Any]) -> bool:
        """Whether `stream` with these arguments yields more than one result."""
        return False

    def _stream(self, prompt, **arguments: Any) -> Iterator[Output]:
        yield self._generate(prompt, **arguments)

    @property
    def components(self) -> dict[str, Any]:
        return {name: self.weights[name] for name in self.parts.configs}

    def on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _generate(self, prompt, **arguments: Any) -> Output:
        raise TypeError(f"{type(self).__name__} is abstract: use a family's pipeline")

    def encode(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = "",
        max_text_tokens: int | None = None,
        image: Picture | Sequence[Picture] | None = None,
    ) -> Prompt:
        """Encode prompts once, to be given to calls in their place; negative_prompt None leaves out the negatives.

        Args:
            image: in families whose prompts have pictures in them; calls are given the same.

        Raises:
            ValueError: an image for prompts that have none.
        """
        of_text = {"max_text_tokens": max_text_tokens} | ({} if image is None else {"image": image})
        if late := sorted(of_text.keys() - set(self.of_text)):
            raise ValueError(f"{self.parts.family} takes no {', '.join(late)} with its prompts, only in calls")
        with self.on_mesh():
            return self._encode(prompt, negative_prompt, {}, **of_text)

    # ---- what the families' _generate and encode are made of

    def _encode(self, prompt, negative, timings: dict[str, float], **of_text: Any) -> Prompt:
        raise TypeError(f"{type(self).__name__} is abstract: use a family's pipeline")

    def _prompt(self, prompt, given: Mapping[str, Any], guided: bool, timings: dict[str, float]) -> Prompt:
        """The encoded prompt of a call; without guidance the negative one is not encoded.

        Raises:
            ValueError: text arguments for a prompt that is encoded already, or one without negatives under guidance.
        """
        if not isinstance(prompt, Prompt):
            negative = or_(given["negative_prompt"], "") if guided else None
            return self._encode(prompt, negative, timings, **{n: given.get(n) for n in self.of_text})
        of_text = [n for n in ("negative_prompt", *self.of_text) if n != "image"]  # that calls need for more than text
        if late := [n for n in of_text if given.get(n) is not None]:
            raise ValueError(f"{', '.join(late)}: the prompt is encoded already; give it to encode")
        if guided and prompt.negative is None:
            raise ValueError("guidance above 1 needs a prompt encoded with a negative_prompt")
        return prompt

    def _table(
        self, steps: int, *, shift=None, solver=None, tokens: int | None = None, begin: int = 0, sigmas=None
    ) -> sampling.Table:
        """The solver's table; `tokens` is what resolution-dependent shifts are computed from, `sigmas` what they are
        applied to, None is the scheduler's own.

        Raises:
            ValueError: such a shift where the family has none (tokens is None); what `sampling.from_config` refuses.
        """
        config = sampling.with_solver(self.parts.scheduler, solver) if isinstance(solver, str) else solver
        config = self.parts.scheduler if config is None else config
        dynamic = config.get("use_dynamic_shifting")
        if dynamic and tokens is None:
            raise ValueError(f"use_dynamic_shifting={dynamic}: {self.parts.family} has no shift by size")
        mu = self._mu(config, tokens or 0) if dynamic else None
        shift = or_(shift, self.plan.shift)
        return sampling.from_config(config, steps, mu=mu, shift=shift, begin=begin, sigmas=sigmas)

    def _mu(self, config: Mapping[str, Any], tokens: int) -> float:
        """The shift of schedulers that shift by size."""
        return sampling.dynamic_mu(config, tokens)
