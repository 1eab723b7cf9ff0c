"""The command line: generate, convert, inspect, models, train. Heavy imports wait until a command needs them."""

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

err = Console(stderr=True)
USER, BROKEN = 2, 1  # exit codes: what the user gave, what broke
EXAMPLES = {
    "generate": """\b
Examples:
  jdit generate "a red apple"
  jdit generate "a red apple" -o apple.png --seed 7 --steps 30
  jdit generate "a cat" "a dog" --grid -o sheet.png
  jdit generate "a cat" --model stabilityai/stable-diffusion-3.5-medium --dtype bfloat16
  jdit generate "a castle" --model DIR --image sketch.png --strength 0.7""",
    "convert": """\b
Examples:
  jdit convert ./stable-diffusion-3.5-large ./sd35-large
  jdit convert sd3_medium_incl_clips.safetensors ./sd3 --dtype bfloat16 --check
  jdit convert ./sd35-large ./back --to diffusers""",
    "inspect": """\b
Examples:
  jdit inspect fluent-image
  jdit inspect ./stable-diffusion-3.5-large --json""",
    "train": """\b
Examples:
  jdit train fluent-image/mmdit
  jdit train my.toml --set data.folder=./pictures --steps 2000
  jdit train my.toml --resume""",
}


def _setup(verbose: bool):
    handler = RichHandler(console=err, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("jdit").setLevel(logging.INFO if verbose else logging.WARNING)


def _import_jax():
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


def _interrupt(number: int, frame: FrameType | None):
    """As Python's own handler, but inside of jax's garbage callback, where exceptions are lost, a moment later."""
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _compilation_cache():
    """Compiled programs are kept between runs, so that the second start takes seconds."""
    jax = _import_jax()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        with contextlib.suppress(OSError):
            (base / "jdit").mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(base / "jdit"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class _Group(click.Group):
    """Turns exceptions into one clear message and an exit code."""

    def invoke(self, ctx: click.Context):
        try:
            with _on_ctrl_c(_interrupt):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (click.Abort, KeyboardInterrupt):
            _say("interrupted; nothing half-written is left behind")
            code = 130
        except (ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as e:
            code = _fail(e, USER)
        except (OSError, FloatingPointError, MemoryError, ImportError, RuntimeError) as e:  # jax raises RuntimeErrors
            code = _fail(e, BROKEN)
        sys.exit(code)


def _say(message: str):
    err.print(f"jdit: {message}", markup=False, highlight=False, soft_wrap=True)


def _fail(e: BaseException, code: int) -> int:
    logging.getLogger("jdit").info("what follows was raised here:", exc_info=e)
    _say(str(e) or type(e).__name__)
    return code


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jdit-flax", prog_name="jdit")
@click.option("-v", "--verbose", is_flag=True, help="Say what is chosen and why.")
def main(verbose: bool):
    """Diffusion transformers for images and video in JAX."""
    _setup(verbose)


def _parts(values: tuple[str, ...]) -> dict[str, str]:
    out = {}
    for value in values:
        name, equals, place = value.partition("=")
        if not equals or not name or not place:
            raise click.BadParameter(f"{value!r} is not NAME=PATH", param_hint="--part")
        out[name] = place
    return out


def _mesh(text: str | None):
    if text is None:
        return None
    from jdit.sharding import MESH_AXES, make_mesh

    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = item.partition("=")
        if name not in MESH_AXES or not size.isdigit():
            raise click.BadParameter(f"{item!r}: give axes as {'=N,'.join(MESH_AXES)}=N", param_hint="--mesh")
        sizes[name] = int(size)
    return make_mesh(**sizes)


@main.command(epilog=EXAMPLES["generate"])
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--model", default="fluent-image", show_default=True, help="Bundled name, folder, file or hub id.")
@click.option("-o", "--output", default="out.png", show_default=True, type=click.Path(path_type=Path),
              help="Where to write; the suffix chooses png, jpg, webp or gif.")  # fmt: skip
@click.option("--negative", default=None, help="What to steer away from.")
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--steps", type=click.IntRange(1), help="Solver steps.  [default: the model's]")
@click.option("--guidance", type=float, help="Classifier-free scale, 1 is off.  [default: the model's]")
@click.option("--shift", type=float, help="Flow shift.  [default: the checkpoint's]")
@click.option("--solver", type=click.Choice(["euler", "unipc"]), help="[default: the checkpoint's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Output i takes seed + i.")
@click.option("-n", "--num-outputs", type=click.IntRange(1), default=1, show_default=True, help="Pictures a prompt.")
@click.option("--image", type=click.Path(path_type=Path), help="Start from this picture.")
@click.option("--strength", type=float, help="With --image: how much of it is repainted, 0 to 1.  [default: 0.6]")
@click.option("--skip-layers", help="Skip-layer guidance: layers, as 7,8,9 for SD3.5 medium.")
@click.option("--max-text-tokens", type=int, help="T5 tokens, padding included.")
@click.option("--vae-tiling", is_flag=True, help="Decode by tiles: less memory.")
@click.option("--vae-slicing", is_flag=True, help="Decode a picture at a time: less memory.")
@click.option("--grid", is_flag=True, help="One contact sheet of all prompts.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto",
              show_default=True, help="auto: float32 on a CPU, bfloat16 elsewhere.")  # fmt: skip
@click.option("--mesh", help="Devices, as data=2,sequence=4.")
@click.option("--part", "parts", multiple=True, metavar="NAME=PATH", help="Take a component from elsewhere.")
def generate(prompts, model, output, grid, dtype, mesh, parts, seed, num_outputs, skip_layers, negative, **options):
    """Generate pictures from prompts."""
    from jdit import media

    media.check_target(output)  # before anything slow
    arguments = {k: v for k, v in options.items() if v is not None and v is not False}  # 0 is a value
    if skip_layers:
        try:
            arguments["skip_layers"] = [int(i) for i in skip_layers.split(",")]
        except ValueError:
            raise click.BadParameter(
                f"{skip_layers!r}: give layer numbers, as 7,8,9", param_hint="--skip-layers"
            ) from None
    if negative is not None:
        arguments["negative_prompt"] = negative
    if "image" in arguments:
        arguments["image"] = media.picture(arguments["image"])
    start = time.perf_counter()
    with err.status("loading"):
        jax = _import_jax()
        _compilation_cache()
        from jdit.load import open_model

        opened = open_model(model, parts=_parts(parts))
        dry = opened.dry()
        dry.check(**{**arguments, "num_outputs": num_outputs})
        chosen = dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
        pipe = opened.pipeline(mesh=_mesh(mesh), dtype=chosen)
    texts = list(prompts)
    with _bar() as bar, _interruptible() as check:
        task = bar.add_task("denoise", total=None)

        def on_step(step: int, steps: int):
            check()
            bar.update(task, completed=step, total=steps)

        out = pipe(texts, seed=seed, num_outputs=num_outputs, on_step=on_step, **arguments)
    assert out.pixels is not None  # only output="latents" has none
    if grid:
        captions = [t for t in texts for _ in range(num_outputs)]
        media.write(media.contact_sheet(out.pixels, captions), output)
        written = [output]
    else:
        written = out.save(output)
    spent = ", ".join(f"{name} {s:.1f} s" for name, s in out.timings.items())
    _say(f"{', '.join(map(str, written))} in {time.perf_counter() - start:.1f} s ({spent})")


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Gives a check that raises after Ctrl-C, to be called from callbacks.

    Python acts on a signal when the main thread is back from the device, which may take minutes; a wake-up socket hears
    of it at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno())

        def check():
            with contextlib.suppress(BlockingIOError):
                if signal.SIGINT in ours.recv(64):
                    raise KeyboardInterrupt

        try:
            yield check
        finally:
            signal.set_wakeup_fd(before)


def _bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


@main.command(epilog=EXAMPLES["convert"])
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="[default: as stored]")
@click.option("--only", multiple=True, metavar="COMPONENT", help="Only these components; may be given several times.")
@click.option("--check", is_flag=True, help="Read back what was written and compare every tensor with its source.")
@click.option("--to", type=click.Choice(["jdit", "diffusers", "original"]), default="jdit", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace DST once the new one is whole.")
@click.option("--part", "parts", multiple=True, metavar="NAME=PATH", help="Take a component from elsewhere.")
def convert(src, dst, dtype, only, check, to, overwrite, parts):
    """Convert a PyTorch checkpoint to a jdit checkpoint, or back."""
    _import_jax()
    from convert.convert import convert as run

    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int):
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        report = run(src, dst, dtype=dtype, only=only, check=check, to=to, overwrite=overwrite, parts=_parts(parts),
                     progress=progress)  # fmt: skip
    _say(report)


@main.command(epilog=EXAMPLES["inspect"])
@click.argument("src")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--part", "parts", multiple=True, metavar="NAME=PATH", help="Take a component from elsewhere.")
def inspect(src, as_json, parts):
    """Tell what a checkpoint is: family, variant, components, sizes, dtypes. Exit code 2 if it has problems."""
    _import_jax()
    from convert.inspect import inspect as look

    found = look(src, parts=_parts(parts))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_inspection(found)
    if found["problems"]:
        sys.exit(USER)


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def _print_inspection(found: dict[str, Any]):
    out = Console()
    variant = found["variant"] or "unknown"
    out.print(f"{found['source']}: {found['layout']}, family {found['family']}, variant {variant}",
              markup=False, highlight=False, soft_wrap=True)  # fmt: skip
    table = Table("component", "kind", "parameters", "size", "dtype", box=None, pad_edge=False)
    for name, c in found["components"].items():
        table.add_row(name, c["kind"], f"{c['parameters']:,}", _size(c["bytes"]), ", ".join(c["dtypes"]))
    out.print(table)
    if found["tokenizers"]:
        out.print("tokenizers: " + ", ".join(found["tokenizers"]), markup=False, highlight=False)
    out.print(f"scheduler: {found['scheduler'].get('_class_name', 'none')}", markup=False, highlight=False)
    for problem in found["problems"]:
        out.print(f"problem: {problem}", markup=False, highlight=False, soft_wrap=True)


@main.command()
def models():
    """List the bundled models and the variants that are known by name."""
    from jdit import zoo

    table = Table("name", "what it is", "where it comes from", box=None, pad_edge=False)
    for name in zoo.BUNDLED:
        table.add_row(name, "bundled; 128 x 128 pictures in the style of Fluent emoji", "this package")
    for name, variant in zoo.VARIANTS.items():
        table.add_row(name, variant.about, variant.source)
    Console().print(table)


@main.command(epilog=EXAMPLES["train"])
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value, as optim.rate=1e-4.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps.  [default: the config's]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Length by the clock instead of steps.")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
def train(config, overrides, steps, minutes, resume):
    """Train from a config: a TOML file, or the name of a recipe (fluent-image/vae, /text, /mmdit)."""
    _compilation_cache()
    from jdit.train import run

    run(config, overrides=overrides, steps=steps, minutes=minutes, resume=resume)


if __name__ == "__main__":
    main()
