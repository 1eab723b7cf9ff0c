"""The terminal: one line for what goes wrong and an exit code, progress, Ctrl-C, and jax when it is first needed."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from jdit import distributed

err = Console(stderr=True)
USER, BROKEN = 2, 1  # exit codes: what the user gave, what broke
CALLBACKS = ("jax._src.callback", "jax._src.debugging")  # modules through which the device calls Python


def setup(verbose: bool):
    handler = RichHandler(console=err, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("jdit").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:  # the compiler's own warnings, lines of its operations, help nobody who did not ask
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def import_jax():
    """The first import of jax; Ctrl-C waits for its end, since jaxlib crashes when it is cut short."""
    held: list[int] = []
    with _on_ctrl_c(lambda number, frame: held.append(number)):
        jax = importlib.import_module("jax")
    if held:
        raise KeyboardInterrupt
    return jax


@contextlib.contextmanager
def _on_ctrl_c(handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _not_swallowed() -> Iterator[None]:
    """A Ctrl-C that a finaliser or a weak reference's callback swallowed (imports run many) comes a moment later."""
    before = sys.unraisablehook

    def hook(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _later(signal.SIGINT)
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _later(number: int):
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def _interrupt(number: int, frame: FrameType | None):
    """As Python's own handler, but inside of jax's callbacks, where exceptions are lost, a moment later."""
    if _inside_callback(frame):
        _later(number)
    else:
        raise KeyboardInterrupt


def _inside_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback" or frame.f_globals.get("__name__") in CALLBACKS:
            return True
        frame = frame.f_back
    return False


def compilation_cache():
    """Compiled programs are kept between runs, so that the second start takes seconds."""
    jax = import_jax()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        with contextlib.suppress(OSError):
            (base / "jdit").mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(base / "jdit"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Group(click.Group):
    """Turns exceptions into one clear message and an exit code."""

    def invoke(self, ctx: click.Context):
        try:
            with _on_ctrl_c(_interrupt), _not_swallowed():
                return super().invoke(ctx)
        except click.ClickException as e:
            distributed.fail(e.format_message(), e.exit_code)
            raise
        except click.exceptions.Exit:
            raise
        except (click.Abort, KeyboardInterrupt):
            distributed.fail("interrupted; nothing half-written is left behind", 130)
            say("interrupted; nothing half-written is left behind")
            code = 130
        except (ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as e:
            code = _fail(e, USER)
        except (OSError, FloatingPointError, MemoryError, ImportError, RuntimeError) as e:  # jax raises RuntimeErrors
            code = _fail(e, BROKEN)
        sys.exit(code)


def say(message: str):
    err.print(f"jdit: {message}", markup=False, highlight=False, soft_wrap=True)


def _fail(e: BaseException, code: int) -> int:
    logging.getLogger("jdit").info("what follows was raised here:", exc_info=e)
    text = str(e) or type(e).__name__
    if type(e).__name__ == "JaxRuntimeError":  # then follows what is allocated, or where in the compiler it was
        text = text.splitlines()[0]
    distributed.fail(text, code)  # of several processes: ends them all
    say(text)
    return code


def parts_of(values: tuple[str, ...]) -> dict[str, str]:
    out = {}
    for value in values:
        name, equals, place = value.partition("=")
        if not equals or not name or not place:
            raise click.BadParameter(f"{value!r} is not NAME=PATH", param_hint="--part")
        out[name] = place
    return out


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a check that raises after Ctrl-C, to be called from callbacks.

    Python acts on a signal when the main thread is back from the device, which may take minutes; a wake-up socket hears
    of it at once. What is heard inside of a callback is left to its check, or to the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handler(number: int, frame: FrameType | None):
        if not _inside_callback(frame):
            raise KeyboardInterrupt

    ours, theirs = socket.socketpair()
    with ours, theirs, _on_ctrl_c(handler):
        ours.setblocking(False)
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno())

        def check():
            with contextlib.suppress(BlockingIOError):
                if signal.SIGINT in ours.recv(64):
                    raise KeyboardInterrupt

        try:
            yield check
            check()
        finally:
            signal.set_wakeup_fd(before)


class _Count(MofNCompleteColumn):
    """How much is done, once it is known of how much."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


def progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), _Count(), TimeElapsedColumn()
    hidden = not err.is_terminal or not distributed.first()
    return Progress(*columns, console=err, transient=True, disable=hidden)
