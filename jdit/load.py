"""load(source) -> Pipeline: a bundled name, a jdit checkpoint, a PyTorch checkpoint in any layout, or a hub id."""

import dataclasses
import logging
import sys
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from convert import registry, stream, tokenizers
from convert.hub import resolve
from convert.layout import detect
from convert.source import Source, open_source
from convert.table import ConversionError, summary
from jdit import checkpoint, sharding, zoo
from jdit.nn import parts as split
from jdit.pipeline import memory
from jdit.pipeline.base import Parts, Pipeline
from jdit.pipeline.executor import Weights
from jdit.pipeline.families import PIPELINES
from jdit.pipeline.memory import MemoryPlan
from jdit.pipeline.planner import Proposal, Work, propose
from jdit.sharding import AnyMesh, Rules
from jdit.structs import Plan

log = logging.getLogger("jdit")

ASSETS = Path(__file__).parent / "assets"
DTYPES = ("bfloat16", "float16", "float32")
OnComponent = Callable[[str], None]


@dataclasses.dataclass
class Opened:
    """A source whose configs are known and whose weights are not read yet.

    Attributes:
        leaves: (component, targets, those of them that are wanted) -> these leaves.
        problems: (component, targets) -> what keeps them from being read.
    """

    parts: Parts
    leaves: Callable[[str, dict, Collection], dict]
    problems: Callable[[str, dict], list[str]]

    def pipeline(
        self, *, mesh: Mesh | None = None, rules: Rules | str | None = None, dtype: str = "bfloat16",
        room: float | None = None, on_component: OnComponent | None = None,
    ) -> Pipeline:  # fmt: skip
        """Read the weights. See `load`."""
        check_dtype(dtype)
        rules = named(rules)
        if rules is not None and mesh is None:
            raise ValueError("rules says where axes go on a mesh: give mesh as well (jdit.make_mesh)")
        parts, makes, targets = self._placed(mesh, rules, dtype)
        if problems := [line for n in targets for line in self.problems(n, targets[n])]:
            raise ConversionError(summary(problems))

        def read(name: str) -> nnx.Module:
            if on_component:
                on_component(name)
            component, part = split.parse(name)
            wanted = _paths(parts.configs[component], part, targets[component])
            return sharding.assemble(makes[component], self.leaves(component, targets[component], wanted), wanted)

        plan = self._memory(parts, targets, mesh, room)
        waiting = plan.waiting
        if waiting:
            log.info(
                "the device is short of memory: %s are read for their stage and freed after it", ", ".join(waiting)
            )
        if not plan.fits:
            log.warning("%.1f GB of weights at once, and room for %.1f GB", plan.peak / 1e9, (plan.room or 0) / 1e9)
        weights = Weights({n: read(n) for n in plan.resident}, {n: (lambda n=n: read(n)) for n in waiting})
        return PIPELINES[parts.family](parts, weights, mesh=mesh)

    def _placed(self, mesh: AnyMesh | None, rules: Rules | None, dtype: str):
        """Parts with dtype and rules in their configs, and each component's constructor and targets."""
        placed = {n: registry.placed(c, dtype, rules or Rules()) for n, c in self.parts.configs.items()}
        makes = {n: registry.of_config(c).make(c) for n, c in placed.items()}
        plain = {n: registry.placed(c, dtype, Rules()) for n, c in self.parts.configs.items()}  # one for all rules
        shapes = {n: sharding.described(registry.of_config(c).make(c)) for n, c in plain.items()}
        targets = {n: sharding.placed(module, mesh, rules) for n, module in shapes.items()}
        return dataclasses.replace(self.parts, configs=placed), makes, targets

    def memory(
        self, *, mesh: AnyMesh | None = None, rules: Rules | str | None = None, dtype: str = "bfloat16",
        room: float | None = None, memory: float | None = None,
    ) -> MemoryPlan:  # fmt: skip
        """What is on a device in each stage of a usual call.

        Args:
            mesh: may be one of devices that are not there (`sharding.planned_mesh`).
            room: bytes for weights; None is what the device has beside activations.
            memory: bytes a device has; None asks it.
        """
        check_dtype(dtype)
        parts, _, targets = self._placed(mesh, named(rules), dtype)
        return self._memory(parts, targets, mesh, room, memory)

    def propose(
        self, devices: int, *, dtype: str = "bfloat16", room: float | None = None, memory: float | None = None
    ) -> Proposal:
        """A mesh of so many devices, and rules, for a usual call; arguments as those of `memory`."""
        dry = self.dry()
        work = Work(dry.tokens(), self.parts.configs["transformer"].heads, dry.rows > 1)
        under = lambda sizes, rules: self.memory(
            mesh=sharding.planned_mesh(**sizes), rules=rules, dtype=dtype, room=room, memory=memory
        )
        return propose(work, devices, under)

    def of_size(self, **sizes: int | None) -> "Opened":
        """The same source, of which a usual call has another height, width or num_frames.

        Raises:
            ValueError: sizes that do not work.
        """
        dry, given = self.dry(), {name: n for name, n in sizes.items() if n is not None}
        if unknown := sorted(given.keys() - set(dry.takes)):
            raise ValueError(f"{self.parts.family} does not take {', '.join(unknown)}")
        if not given:
            return self
        dry.size(given.get("height"), given.get("width"))
        dry.frames(given.get("num_frames"))
        plan = dataclasses.replace(self.parts.plan, **given)
        return dataclasses.replace(self, parts=dataclasses.replace(self.parts, plan=plan))

    def _memory(
        self, parts: Parts, targets: Mapping[str, dict], mesh: AnyMesh | None, room: float | None,
        limit: float | None = None,
    ) -> MemoryPlan:  # fmt: skip
        dry = PIPELINES[parts.family](parts, Weights({}))
        stages, sizes = dry.usual_stages(), {}
        for name in (entry for component in targets for entry in memory.entries(stages, component)):
            component, part = split.parse(name)
            leaves = targets[component]
            sizes[name] = sum(
                sharding.bytes_a_device(leaves[p]) for p in _paths(parts.configs[component], part, leaves)
            )
        activations = _activations(dry) / (mesh.size if mesh is not None else 1)
        plan = memory.plan(stages, sizes, memory.room(activations, limit) if room is None else room, dry.tables())
        return plan._replace(activations=int(activations))

    def dry(self) -> Pipeline:
        """The pipeline without weights: it checks sizes and arguments."""
        return PIPELINES[self.parts.family](self.parts, Weights({}))


def _activations(dry: Pipeline) -> float:
    """Bytes of a usual call; 0 where its size is none that this model takes (it has other patches than its family)."""
    try:
        dry.size()
        dry.frames()
    except ValueError as e:
        log.info("what activations take is not known: in a usual call %s", e)
        return 0
    return dry.activations()


def _paths(cfg: Any, part: str | None, targets: Mapping[sharding.Path, Any]) -> list[sharding.Path]:
    """The parameters of a part of the component with this config, or of all of it."""
    return [path for path in targets if split.holds(zoo.MODULES[type(cfg)], part, path)]


def named(rules: Rules | str | None) -> Rules | None:
    """Rules given as such or by a preset's name.

    Raises:
        ValueError: no such preset.
    """
    return Rules.named(rules) if isinstance(rules, str) else rules


def check_dtype(dtype: str):
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; there are {', '.join(DTYPES)}")


def load(
    source: str | Path = zoo.DEFAULT,
    *,
    mesh: Mesh | None = None,
    rules: Rules | str | None = None,
    dtype: str = "bfloat16",
    parts: Mapping[str, str | Path] | None = None,
    room: float | None = None,
) -> Pipeline:
    """Load a model.

    Args:
        source: a bundled name (`jdit models` lists them), a jdit checkpoint, a diffusers folder, an original single
            file or release folder, or a hub id ("org/name[@revision]": the local cache first).
        mesh: devices to spread over (`jdit.make_mesh`); None is one device, whatever there are. rules: which logical
            axis goes where, or the name of a preset: "replicated", "fsdp", "tensor" (the default; see `jdit.Rules`).
        dtype: of weights and computation; statistics stay float32.
        parts: component or tokenizer name -> file or folder to take it from instead, as
            {"text_encoder_3": "t5xxl.safetensors"}.
        room: bytes of a device's memory that weights may take; None is what the device has beside activations. Where
            they need more, some are read for their stages and freed after them: encoders before the sampling loop, and
            the weights that its modulation was made from (`jdit inspect` prints the plan).

    Raises:
        ValueError: a source that is not there, is incomplete or broken; the message names file and tensor.
    """
    check_dtype(dtype)
    return open_model(source, parts=parts).pipeline(mesh=mesh, rules=rules, dtype=dtype, room=room)


def open_model(source: str | Path, *, parts: Mapping[str, str | Path] | None = None, planned: bool = False) -> Opened:
    """Find out what a source is, without reading weights. See `load`.

    Args:
        planned: the name of a variant will do, as nothing is to be read.
    """
    if planned and str(source) in zoo.VARIANTS and not Path(source).exists():
        return open_variant(str(source))
    if str(source) in zoo.BUNDLED and not Path(source).exists():
        plan = zoo.BUNDLED[str(source)]
        return _opened(open_source(ASSETS / str(source), parts=parts, plan=plan), str(source))
    path = resolve(source)
    if detect(path).kind == "jdit":
        if parts:
            raise ValueError("parts goes with PyTorch checkpoints; a jdit checkpoint has all of its own")
        return _opened_jdit(path)
    return _opened(open_source(source, parts=parts), None)


def open_variant(name: str) -> Opened:
    """A variant of the zoo (`jdit models` lists them) without its weights, to plan with."""
    known = zoo.VARIANTS[name]
    parts = Parts(known.family, name, known.components, {}, known.scheduler, known.plan, known.settings or {})

    def none(*_: Any) -> Any:
        raise ValueError(f"{name} is the name of a variant, without weights: they are at {known.source}")

    return Opened(parts, none, none)


def _opened(source: Source, name: str | None) -> Opened:
    configs = {n: p.cfg for n, p in source.parts.items()}
    _check_components(source.path, configs, "; give parts={name: path}")
    reduced = PIPELINES[source.family].reduced(configs)
    rules = {n: registry.rules_of(reduced[n]) if n in reduced else p.rules for n, p in source.parts.items()}
    configs |= reduced

    def leaves(component: str, targets: dict, only: Collection) -> dict:
        return stream.load_leaves(source.parts[component].reader, rules[component], targets, only=only)

    def problems(component: str, targets: dict) -> list[str]:
        return stream.problems(source.parts[component].reader, rules[component], targets)

    parts = Parts(
        source.family, name or source.variant, configs, source.tokenizers, source.scheduler, source.plan,
        source.settings,
    )  # fmt: skip
    _check_fit(source.path, parts)
    return Opened(parts, leaves, problems)


def _check_fit(path: Path, parts: Parts):
    if misfits := PIPELINES[parts.family].misfits(parts):
        raise ValueError(f"{path}: {'; '.join(misfits)}")


def _check_components(path: Path, configs: Mapping[str, Any], hint: str = ""):
    if lacks := sorted({"transformer", "vae"} - configs.keys()):
        raise ValueError(
            f"{path}: {' and '.join(lacks)} not found, only {', '.join(sorted(configs)) or 'nothing'}{hint}"
        )


def _opened_jdit(path: Path) -> Opened:
    meta = checkpoint.read_meta(path)
    family = meta.get("family")
    if family not in PIPELINES:
        raise checkpoint.CheckpointError(f"{path}: family {family!r} is not known; there are {sorted(PIPELINES)}")
    try:
        configs = {n: registry.from_description(c) for n, c in meta["configs"].items()}
        parts = Parts(
            family, meta["variant"], configs,
            {n: tokenizers.load(path / n) for n in meta.get("tokenizers", ())}, meta["scheduler"], Plan(**meta["plan"]),
            meta.get("settings", {}),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as e:
        raise checkpoint.CheckpointError(f"{path / checkpoint.META}: {type(e).__name__}: {e}") from None
    _check_components(path, configs)
    _check_fit(path, parts)
    reduced = PIPELINES[family].reduced(configs)
    parts = dataclasses.replace(parts, configs=configs | reduced)

    def problems(component: str, targets: dict) -> list[str]:
        try:
            return checkpoint.misfits(
                path, component, checkpoint.stored(path, component), targets, partly=component in reduced
            )
        except checkpoint.CheckpointError as e:
            return [str(e)]

    restore = lambda name, targets, only: checkpoint.restore(path, name, targets, only, partly=name in reduced)
    return Opened(parts, restore, problems)


class _Callable(types.ModuleType):
    """`import jdit.load` anywhere makes the attribute `jdit.load` this module, not the function: so it is both."""

    __call__ = staticmethod(load)


sys.modules[__name__].__class__ = _Callable
