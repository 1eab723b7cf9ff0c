"""The training loop: state, step, schedule, checkpoints with exact resume, signals and the log."""

import dataclasses
import json
import logging
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jdit.atomic import write_file
from jdit.sharding import make_mesh
from jdit.train import portable
from jdit.train.config import Config, Optim
from jdit.train.nets import Weights, preferring

try:
    import optax
except ImportError as e:  # an extra, so that generating pictures does not need it
    raise ImportError("training needs optax: pip install 'jdit-flax[train]'") from e

log = logging.getLogger("jdit")

KEEP = 2
"""Checkpoints that stay."""
RESULT = "result.json"
"""Written at the end of a run: its figures."""
OPEN = 2**30
"""Length of a schedule that has not been measured yet."""
FIT_UNTIL = 0.5
"""Share of the time during which the length of the schedule follows the measured speed."""


class State(NamedTuple):
    """All that a checkpoint holds. step: done so far. total: length of the schedule. seconds: trained so far."""

    params: Weights
    ema: Weights
    opt: Any
    step: Array
    total: Array
    seconds: Array


class Task(Protocol):
    """What a stage gives to the loop.

    Attributes:
        data: pytree that stays on the devices. examples: pictures a step.
    """

    data: Any
    examples: int

    def init(self) -> Weights: ...

    def loss(self, params: Weights, data: Any, key: PRNGKeyArray) -> tuple[Array, dict[str, Array]]:
        """Loss of one step, and figures for the log."""
        ...

    def sheet(self, ema: Weights, folder: Path, step: int) -> dict[str, float]:
        """Write a sample sheet; figures for the log."""
        ...

    def finish(self, ema: Weights, folder: Path) -> dict[str, float]:
        """Write the result."""
        ...


class Result(NamedTuple):
    """folder: where the result is. finished: False if the run was stopped before its end."""

    folder: Path
    step: int
    finished: bool
    figures: dict[str, float]


def learning_rate(step: Array, total: Array, o: Optim) -> Float[Array, ""]:
    """Linear warm-up, then half a cosine from `rate` to `floor * rate` at `total` (arXiv 1608.03983, no restarts)."""
    step, total = step.astype(jnp.float32), total.astype(jnp.float32)
    rise = jnp.minimum((step + 1) / max(o.warmup, 1), 1)
    progress = jnp.clip((step - o.warmup) / jnp.maximum(total - o.warmup, 1), 0, 1)
    return o.rate * rise * (o.floor + (1 - o.floor) * 0.5 * (1 + jnp.cos(math.pi * progress)))


def optimiser(o: Optim) -> optax.GradientTransformation:
    """AdamW without its rate, which depends on the state's `total`. Only matrices and embeddings decay."""
    matrices = lambda params: {k: k.endswith((".kernel", ".embedding")) for k in params}
    return optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.scale_by_adam(b1=o.b1, b2=o.b2),
        optax.add_decayed_weights(o.decay, mask=matrices),
    )


def make_chunk(task: Task, o: Optim, seed: int) -> Callable[[State, Any, Array], tuple[State, dict[str, Array]]]:
    """(state, data, n) -> (state after n steps, mean figures). n is dynamic: chunks of any length share one program."""
    tx = optimiser(o)

    def step(state: State, data: Any) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, figures), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, data, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        rate = learning_rate(state.step, state.total, o)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        done = state.step.astype(jnp.float32)
        decay = jnp.minimum(o.ema, (1 + done) / (10 + done))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        figures = {"loss": loss, "gradient": optax.global_norm(grads), **figures}
        return state._replace(params=params, ema=ema, opt=opt, step=state.step + 1), figures

    def chunk(state: State, data: Any, n: Array):
        shapes = jax.eval_shape(step, state, data)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros((), jnp.float32), shapes)

        def body(_, carry):
            state, sums = carry
            state, figures = step(state, data)
            return state, jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, figures)

        state, sums = jax.lax.fori_loop(0, n, body, (state, zeros))
        return state, jax.tree.map(lambda s: s / n, sums)

    return chunk


def init_state(params: Weights, o: Optim, total: int) -> State:
    """The state before the first step."""
    copy = jax.tree.map(jnp.array, params)
    return State(params, copy, optimiser(o).init(params), jnp.int32(0), jnp.int32(total), jnp.float32(0.0))


# --------------------------------------------------------------------------------------------- checkpoints


def _flat(state: State) -> dict[str, Array]:
    with_paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {f"{i:04d}" + re.sub(r"\W+", "_", jax.tree_util.keystr(p)): leaf for i, (p, leaf) in enumerate(with_paths)}


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first. Orbax gives a checkpoint its name only when it is complete."""
    found = (folder / "checkpoints").glob("step_*")
    return sorted(p for p in found if re.fullmatch(r"step_\d{9}", p.name))


def save(folder: Path, state: State) -> Path:
    """Write a checkpoint and drop older ones."""
    path = (folder / "checkpoints" / f"step_{int(state.step):09d}").absolute()
    with ocp.StandardCheckpointer() as writer:
        writer.save(path, _flat(state), force=True)
        writer.wait_until_finished()
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return path


def restore(path: Path, like: State) -> State:
    """The state of a checkpoint, placed as `like` is.

    Raises:
        ValueError: it is of another model or optimiser.
    """
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _flat(like))
    try:
        with ocp.StandardCheckpointer() as reader:
            found = reader.restore(path.absolute(), target)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} does not fit this config, it is of another model or optimiser: {e}") from e
    return jax.tree.unflatten(jax.tree.structure(like), list(found.values()))


def unpacked(folder: Path, like: State) -> State:
    """The state of a portable checkpoint, placed as `like` is."""
    return jax.tree.unflatten(jax.tree.structure(like), list(portable.read(folder, _flat(like)).values()))


# --------------------------------------------------------------------------------------------- the loop


class _Stop:
    """Ctrl-C and SIGTERM ask for a stop between two chunks; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.asked = False
        self._old: dict = {}

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.info("stopping after this chunk")

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class _Clock:
    """Measured speed, from the second chunk on (the first compiles). seconds: trained before this call."""

    before: float
    start: float = dataclasses.field(default_factory=time.monotonic)
    _from: tuple[float, int] | None = None

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def rate(self, step: int) -> float | None:
        """Steps a second."""
        if self._from is None:
            self._from = (time.monotonic(), step)
            return None
        at, first = self._from
        return (step - first) / max(time.monotonic() - at, 1e-9)


def train(make: Callable[[Config], Task], cfg: Config, *, resume: bool = False) -> Result:
    """Run a task to its end, or until it is stopped.

    Args:
        make: builds the task; it is called with the mesh set.

    Raises:
        ValueError: no length given, a checkpoint that does not fit, or nothing to resume.
        FloatingPointError: the loss is no longer finite. The last checkpoint is from before.
    """
    run, folder, begun = cfg.run, Path(cfg.run.folder), time.monotonic()
    if not run.steps and not run.minutes:
        raise ValueError("the length of the run is not known: set run.steps or run.minutes (--steps, --minutes)")
    found = checkpoints(folder)
    if found and not resume:
        raise ValueError(f"{folder} has checkpoints already: resume (--resume), or choose another run.folder")
    devices = run.devices or jax.device_count()
    if cfg.data.batch % devices:
        raise ValueError(f"data.batch = {cfg.data.batch} does not divide over {devices} devices")
    mesh = make_mesh(data=devices)
    with jax.set_mesh(mesh), preferring(run.attention), _Stop() as stop:
        everywhere = NamedSharding(mesh, P())
        task = make(cfg)
        total = run.steps or OPEN
        state = jax.device_put(init_state(task.init(), cfg.optim, total), everywhere)
        data = jax.device_put(task.data, everywhere)
        task.data = data
        source = found[-1] if found else folder / portable.FILE
        if found or (resume and source.is_file()):
            state = restore(source, state) if found else unpacked(folder, state)
            log.info("resumed at step %d from %s", int(state.step), source)
            if run.steps:
                state = state._replace(total=jax.device_put(jnp.int32(run.steps), everywhere))
        chunk = jax.jit(make_chunk(task, cfg.optim, run.seed), donate_argnums=0, out_shardings=everywhere)
        return _loop(task, cfg, folder, state, data, chunk, stop, everywhere, begun)


def _loop(task, cfg: Config, folder: Path, state: State, data, chunk, stop: _Stop, everywhere, begun) -> Result:
    run = cfg.run
    step, total = int(state.step), int(state.total)
    clock = _Clock(float(state.seconds))
    last = dict.fromkeys(("log", "save", "sheet"), time.monotonic())
    figures: dict[str, float] = {}
    due = lambda what: time.monotonic() - last[what] >= getattr(run, what)

    def keep():
        now = state._replace(seconds=jax.device_put(jnp.float32(clock.seconds), everywhere))
        path = save(folder, now)
        if run.portable:
            portable.write(folder, _flat(now))
        last["save"] = time.monotonic()
        return path

    while step < total:
        n = min(run.chunk, total - step)
        state, means = chunk(state, data, jnp.int32(n))
        figures = {k: float(v) for k, v in means.items()}
        step += n
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(f"the loss is {figures['loss']} at step {step}: lower optim.rate and resume from "
                                     f"the last checkpoint in {folder / 'checkpoints'}")  # fmt: skip
        rate = clock.rate(step)
        if rate and not run.steps and (total == OPEN or clock.seconds < FIT_UNTIL * 60 * run.minutes):
            total = step + max(int(rate * (60 * run.minutes - clock.seconds)), 1)
            state = state._replace(total=jax.device_put(jnp.int32(total), everywhere))
        if due("log") or step >= total:
            speed = "" if not rate else f" {rate:.2f} steps/s {rate * task.examples:.0f} pictures/s"
            log.info("step %d/%s %s%s", step, total if total < OPEN else "?", _line(figures), speed)
            last["log"] = time.monotonic()
        over = run.stop_after and time.monotonic() - begun >= 60 * run.stop_after
        if step < total and (stop.asked or over):
            path = keep()
            log.info("stopped at step %d of %d; saved %s; go on with --resume", step, total, path)
            figures |= task.finish(state.ema, folder)
            return Result(folder, step, False, figures)
        if due("save"):
            keep()
        if due("sheet") and step < total:
            _sheet(task, state.ema, folder, step)
            last["sheet"] = time.monotonic()
    keep()
    figures |= _sheet(task, state.ema, folder, step)
    figures |= task.finish(state.ema, folder)
    (folder / portable.FILE).unlink(missing_ok=True)
    record = {"steps": step, "minutes": clock.seconds / 60, "devices": jax.device_count(), **figures}
    write_file(folder / RESULT, json.dumps(record, indent=2) + "\n")
    log.info("done: %d steps in %.1f minutes; %s; result in %s", step, clock.seconds / 60, _line(figures), folder)
    return Result(folder, step, True, figures)


def _sheet(task: Task, ema: Weights, folder: Path, step: int) -> dict[str, float]:
    sheets = folder / "sheets"
    sheets.mkdir(parents=True, exist_ok=True)
    figures = task.sheet(ema, sheets, step)
    if figures:
        log.info("step %d %s", step, _line(figures))
    return figures


def _line(figures: dict[str, float]) -> str:
    return " ".join(f"{k} {v:.4g}" for k, v in figures.items())
