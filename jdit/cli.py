"""The command line: generate, pose, check, convert, inspect, models, train. Heavy imports wait for who needs them."""

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from jdit.cli_driving import check, pose
from jdit.cli_generate import Size, generate
from jdit.cli_mesh import AUTO, Mesh, planned, rules_option
from jdit.terminal import USER, Group, compilation_cache, import_jax, parts_of, progress_bar, say, setup

EXAMPLES = {
    "convert": """\b
Examples:
  jdit convert ./stable-diffusion-3.5-large ./sd35-large
  jdit convert sd3_medium_incl_clips.safetensors ./sd3 --dtype bfloat16 --check
  jdit convert ./sd35-large ./back --to diffusers""",
    "inspect": """\b
Examples:
  jdit inspect fluent-image
  jdit inspect ./stable-diffusion-3.5-large --json
  jdit inspect wan2.1-t2v-14b --mesh auto --devices 8 --memory 80""",
    "train": """\b
Examples:
  jdit train fluent-image/mmdit
  jdit train my.toml --set data.folder=./pictures --steps 2000
  jdit train my.toml --resume""",
}


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jdit-flax", prog_name="jdit")
@click.option("-v", "--verbose", is_flag=True, help="Say what is chosen and why.")
def main(verbose: bool):
    """Diffusion transformers for images and video in JAX."""
    setup(verbose)


main.add_command(generate)
main.add_command(pose)
main.add_command(check)


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
    import_jax()
    from convert.convert import convert as run

    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int):
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        report = run(src, dst, dtype=dtype, only=only, check=check, to=to, overwrite=overwrite, parts=parts_of(parts),
                     progress=progress)  # fmt: skip
    say(report)


@main.command(epilog=EXAMPLES["inspect"])
@click.argument("src")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--part", "parts", multiple=True, metavar="NAME=PATH", help="Take a component from elsewhere.")
@click.option("--mesh", type=Mesh(AUTO), help="Plan for a mesh, as data=2,sequence=4; auto proposes one and says why.")
@rules_option
@click.option("--devices", type=click.IntRange(1), help="Propose for so many.  [default: those of this machine]")
@click.option("--memory", type=click.FloatRange(min=0), metavar="GB",
              help="Plan for devices of so much memory.  [default: what this one has]")  # fmt: skip
@click.option("--room", type=click.FloatRange(min=0), metavar="GB",
              help="Plan for so much of it for weights.  [default: what activations leave]")  # fmt: skip
@click.option("--size", type=Size(), metavar="WxH", help="Plan for this size, as 1280x720.  [default: the model's]")
@click.option("--frames", type=int, help="Plan for a video of so many.  [default: the model's]")
def inspect(src, as_json, parts, mesh, rules, devices, memory, room, size, frames):
    """Tell what a checkpoint or a variant is: family, components, sizes, dtypes, and what is on a device when it runs.
    Exit code 2 if it has problems."""
    import_jax()
    from convert.inspect import inspect as look
    from jdit.load import open_model

    found = look(src, parts=parts_of(parts))
    if not found["problems"] and {"transformer", "vae"} <= found["components"].keys():
        space, limit = (None if n is None else 1e9 * n for n in (room, memory))
        height, width = size or (None, None)
        try:
            opened = open_model(src, parts=parts_of(parts), planned=True)
            opened = opened.of_size(height=height, width=width, num_frames=frames)
            found |= planned(opened, mesh, rules, devices, space, limit)
        except ValueError as e:  # components that do not go together, options that cannot be
            found["problems"].append(str(e))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_inspection(found)
    if found["problems"]:
        sys.exit(USER)


def _stdout() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)  # what is piped is not folded to 80 columns


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def _print_inspection(found: dict[str, Any]):
    out = _stdout()
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
    if "proposal" in found:
        asked = found["proposal"]
        out.print(f"mesh: {asked['mesh']}, rules {asked['rules']}", markup=False, highlight=False)
        for reason in asked["reasons"]:
            out.print(f"  {reason['text']}", markup=False, highlight=False, soft_wrap=True)
    if "memory" in found:
        _print_memory(out, found["memory"])
    for problem in found["problems"]:
        out.print(f"problem: {problem}", markup=False, highlight=False, soft_wrap=True)


def _print_memory(out: Console, plan: dict[str, Any]):
    table = Table("stage", "on each device (bfloat16 weights, float32 tables)", "size", box=None, pad_edge=False)
    for stage in plan["stages"]:
        table.add_row(stage["stage"], ", ".join(stage["resident"]), _size(stage["bytes"]))
    out.print(table)
    room = "unknown on this device" if plan["room"] is None else _size(plan["room"])
    room += f", activations about {_size(plan['activations'])}" if plan["activations"] else ""
    waiting = f"; read for their stages: {', '.join(plan['waiting'])}" if plan["waiting"] else ""
    most, least = _size(plan["peak"]), _size(plan["least"])
    out.print(f"memory: {most} of weights and tables at most, {least} if each waits for its stage, "
              f"room {room}{waiting}", markup=False, highlight=False, soft_wrap=True)  # fmt: skip
    for name, size in plan["in_step"].items():
        out.print(f"memory: no table of {name}: of all steps it would be {_size(size)}, more than the weights that "
                  "make it; they stay", markup=False, highlight=False, soft_wrap=True)  # fmt: skip


@main.command()
def models():
    """List the bundled models and the variants that are known by name."""
    from jdit import zoo

    table = Table(box=None, pad_edge=False)
    for title in ("name", "what it is", "makes", "where it comes from"):
        table.add_column(title, no_wrap=title == "name", overflow="fold")
    for name, plan in zoo.BUNDLED.items():
        table.add_row(name, "bundled; in the style of Fluent emoji", _makes(plan), "this package")
    for name, variant in zoo.VARIANTS.items():
        table.add_row(name, variant.about, _makes(variant.plan), variant.source)
    _stdout().print(table)


def _makes(plan: Any) -> str:
    size = f"{plan.width} x {plan.height}"
    if plan.segment_frames is not None:
        return f"segments of {plan.segment_frames} frames, {size}, {plan.fps:g} fps"
    if plan.num_frames is not None:
        return f"{plan.num_frames} frames, {size}, {plan.fps:g} fps"
    return "pictures" if plan.width is None else f"{size} pictures"


@main.command(epilog=EXAMPLES["train"])
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value, as optim.rate=1e-4.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps.  [default: the config's]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Length by the clock instead of steps.")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
def train(config, overrides, steps, minutes, resume):
    """Train from a config: a TOML file, or the name of a recipe (fluent-image/vae, /text, /mmdit)."""
    compilation_cache()
    from jdit.train import run

    run(config, overrides=overrides, steps=steps, minutes=minutes, resume=resume)


if __name__ == "__main__":
    main()
