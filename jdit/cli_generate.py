"""`jdit generate`: pictures and videos from prompts. What cannot work is refused before any weight is read."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from jdit import distributed
from jdit.cli_mesh import join, make, mesh_options, rules_of
from jdit.cli_segments import write_segments
from jdit.terminal import compilation_cache, err, import_jax, interruptible, parts_of, progress_bar, say

EXAMPLES = """\b
Examples:
  jdit generate "a red apple"
  jdit generate "a red apple" -o apple.png --seed 7 --steps 30
  jdit generate "a cat" "a dog" --grid -o sheet.png
  jdit generate "a cat" --model stabilityai/stable-diffusion-3.5-medium --dtype bfloat16
  jdit generate "a castle" --model DIR --image sketch.png --strength 0.7
  jdit generate "a moon" --model DIR --image night.png --mask sky.png
  jdit generate "the dog of picture 1 on the sofa of picture 2" --model DIR --image dog.png --image sofa.png
  jdit generate "a dog on a sofa" --model DIR --image dog.png --layers 4 -o layers.png
  jdit generate "a cat surfing" --model DIR --frames 81 --size 832x480 -o clip.mp4
  jdit generate "the cat jumps" --model DIR --image first.png --last-image last.png -o clip.mp4
  jdit generate "an oil painting" --model DIR --video clip.mp4 --strength 0.8 -o painted.mp4
  jdit generate "she dances" --model DIR --image her.png --pose pose.mp4 --face face.mp4 -o dance.mp4
  jdit generate "a cat surfing" --model DIR --mesh data=2,sequence=4 --rules fsdp -o clip.mp4"""


OWN = ("process_id", "coordinator", "processes", "output")
"""Options that each of several processes may have of its own."""


class Size(click.ParamType):
    """WIDTHxHEIGHT, as (height, width)."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param, ctx) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        if not (m := re.fullmatch(r"(\d+)[xX×](\d+)", value)):
            self.fail(f"{value!r} is not WIDTHxHEIGHT, as 832x480", param, ctx)
        return int(m[2]), int(m[1])


@click.command(epilog=EXAMPLES)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--model", default="fluent-image", show_default=True, help="Bundled name, folder, file or hub id.")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Where to write: a picture (png, jpg, webp, gif) or a video (mp4, mov, gif, webp) by its suffix.  "
                   "[default: out.png, out.mp4 for videos]")  # fmt: skip
@click.option("--negative", "negative_prompt", help="What to steer away from.")
@click.option("--size", type=Size(), metavar="WxH", help="--width and --height in one, as 832x480.")
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--frames", "num_frames", type=int, help="Frames of a video, as 81.  [default: the model's]")
@click.option("--fps", type=float, help="Frames a second that the video is played at.  [default: the model's]")
@click.option("--steps", type=click.IntRange(1), help="Solver steps.  [default: the model's]")
@click.option("--guidance", type=float,
              help="Scale: classifier-free, where 1 is off, or embedded.  [default: the model's]")  # fmt: skip
@click.option("--guidance-2", "guidance_2", type=float,
              help="That of the second transformer (the last, less noisy steps).  [default: the model's]")  # fmt: skip
@click.option("--true-guidance", type=float,
              help="Classifier-free scale beside the guidance that a distilled model is told (HunyuanVideo).  "
                   "[default: 1, off]")  # fmt: skip
@click.option("--shift", type=float, help="Flow shift.  [default: the checkpoint's]")
@click.option("--solver", type=click.Choice(["euler", "unipc", "dpmpp", "ddim", "dpm"]),
              help="[default: the checkpoint's]")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Output i takes seed + i.")
@click.option("-n", "--num-outputs", type=click.IntRange(1), default=1, show_default=True, help="Results a prompt.")
@click.option("--image", multiple=True, type=click.Path(path_type=Path),
              help="Start from this picture, or edit it (again for a second one); a video's first frame.")  # fmt: skip
@click.option("--last-image", "last_image", type=click.Path(path_type=Path), help="A video's last frame.")
@click.option("--video", type=click.Path(path_type=Path), help="Start from this video.")
@click.option("--pose", "pose_video", type=click.Path(path_type=Path), help="Video of the poses that drive --image.")
@click.option("--face", "face_video", type=click.Path(path_type=Path), help="Video of the face that drives --image.")
@click.option("--background", "background_video", type=click.Path(path_type=Path),
              help="Video in which a figure is replaced by that of --image.")  # fmt: skip
@click.option("--mask", type=click.Path(path_type=Path),
              help="White where something new is to be: picture over --image, video over --background.")  # fmt: skip
@click.option("--segment-frames", type=int, help="Frames of a segment, as 77.  [default: the model's]")
@click.option("--overlap", "overlap_frames", type=int,
              help="Of those, how many repeat the end of the one before: 1 or 5.  [default: 1]")  # fmt: skip
@click.option("--segments", "num_segments", type=click.IntRange(1),
              help="Videos to make of --image, each from the last frame of the one before.  [default: 1]")  # fmt: skip
@click.option("--colour-match", type=click.FloatRange(0, 1),
              help="How far each segment is held to the colours of the one before.  [default: 0]")  # fmt: skip
@click.option("--layers", type=click.IntRange(1),
              help="To take --image apart into, each a png.  [default: 4]")  # fmt: skip
@click.option("--resolution", type=int, help="Of the layers: 640 or 1024, squared, pixels.  [default: 640]")
@click.option("--cfg-normalize", is_flag=True, help="Layers: guidance keeps the norm of the prediction.")
@click.option("--strength", type=float,
              help="With --image or --video: how much is repainted, 0 to 1.  [default: the family's]")  # fmt: skip
@click.option("--dynamic-guidance", is_flag=True, help="Guidance that changes from step to step (CogVideoX).")
@click.option("--skip-layers", help="Skip-layer guidance: layers, as 7,8,9 for SD3.5 medium.")
@click.option("--max-text-tokens", type=int,
              help="T5 tokens, padding included; of language models, what follows the template.")  # fmt: skip
@click.option("--vae-tiling/--no-vae-tiling", default=None,
              help="Encode and decode by tiles: less memory.  [default: the family's]")  # fmt: skip
@click.option("--vae-slicing", is_flag=True, help="Decode a picture at a time: less memory.")
@click.option("--two-passes", is_flag=True, help="Guidance as two runs of the transformer: less memory.")
@click.option("--grid", is_flag=True, help="One contact sheet of the pictures of all prompts.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto",
              show_default=True, help="auto: float32 on a CPU, bfloat16 elsewhere.")  # fmt: skip
@mesh_options
@click.option("--room", type=click.FloatRange(min=0), metavar="GB",
              help="Memory of a device for weights; what does not fit is read when used.  [default: all]")  # fmt: skip
@click.option("--part", "parts", multiple=True, metavar="NAME=PATH", help="Take a component from elsewhere.")
def generate(prompts, model, output, grid, fps, dtype, mesh, rules, exchange, coordinator, processes, process_id, room,
             parts, **options):  # fmt: skip
    """Generate pictures or videos from prompts."""
    from jdit import media

    start = time.perf_counter()
    with err.status("loading") as status:
        join(mesh, rules, exchange, coordinator=coordinator, processes=processes, process_id=process_id)
        distributed.same("options", {n: v for n, v in click.get_current_context().params.items() if n not in OWN})
        if distributed.first():
            media.check_target(output or Path("out.png"), (*media.FORMATS, *media.MOVIES))  # before anything slow
        arguments, texts = _arguments(**options), list(prompts)
        jax = import_jax()
        compilation_cache()
        from jdit.load import open_model

        on = make(mesh)
        opened = open_model(model, parts=parts_of(parts))
        dry = opened.dry()
        if "mask" in arguments and "mask" not in dry.takes:
            arguments["mask_video"] = arguments.pop("mask")
        dry.check(**arguments)
        dry.check_prompt(texts)
        output = _target(output, dry, arguments.get("num_frames"), fps, grid)
        chosen = dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
        on_component = lambda name: status.update(f"loading {name}")
        space = None if room is None else 1e9 * room
        where = {"mesh": on, "rules": rules_of(rules, exchange)}
        pipe = opened.pipeline(**where, dtype=chosen, room=space, on_component=on_component)
    if pipe.segmented(arguments) and output.suffix.lower() in media.MOVIES:
        written, timings = write_segments(pipe, texts, output, fps, **arguments)
        return _report(written, start, timings)
    with _listeners("on_frame" in dry.takes) as listeners:
        out = pipe(texts, **arguments, **listeners)
    if not distributed.first():
        return None
    assert out.pixels is not None  # only output="latents" has none
    if grid:
        captions = [t for t in texts for _ in range(arguments["num_outputs"])]
        media.write(media.contact_sheet(out.pixels, captions), output)
        written = [output]
    else:
        written = out.save(output, fps=fps)
    return _report(written, start, out.timings)


def _report(written: Sequence[Path], start: float, timings: Mapping[str, float]):
    if not distributed.first():
        return
    spent = ", ".join(f"{name} {s:.1f} s" for name, s in timings.items())
    say(f"{', '.join(map(str, written))} in {time.perf_counter() - start:.1f} s ({spent})")


def _arguments(
    *, size: tuple[int, int] | None, skip_layers: str | None, image: Sequence[Path], **options: Any
) -> dict[str, Any]:
    """What the options say, as arguments of the pipeline; pictures are read."""
    from jdit import media

    # 0 is a value, and so is the False of a flag that has a default of its own
    arguments: dict[str, Any] = {
        k: v for k, v in options.items() if v is not None and (v is not False or k == "vae_tiling")
    }
    if size and (twice := [f"--{n}" for n in ("height", "width") if n in arguments]):
        raise click.BadParameter(f"gives both sides; leave {' and '.join(twice)} out", param_hint="--size")
    if size:
        arguments["height"], arguments["width"] = size
    if skip_layers:
        try:
            arguments["skip_layers"] = [int(i) for i in skip_layers.split(",")]
        except ValueError:
            raise click.BadParameter(
                f"{skip_layers!r}: give layer numbers, as 7,8,9", param_hint="--skip-layers"
            ) from None
    if pictures := [media.opened(path) for path in image]:
        arguments["image"] = pictures if len(pictures) > 1 else pictures[0]
    if "last_image" in arguments:
        arguments["last_image"] = media.picture(arguments["last_image"])
    return arguments


def _target(output: Path | None, pipe, num_frames: int | None, fps: float | None, grid: bool) -> Path:
    """Where to write, if the family's results can be written there.

    Raises:
        ValueError, OSError: a suffix or a rate that cannot be; a folder that cannot be written to.
    """
    from jdit import media

    family, frames = pipe.parts.family, pipe.frames(num_frames)
    output = output or Path("out.png" if frames in (None, 1) else "out.mp4")
    if frames is None and fps is not None:
        raise ValueError(f"--fps goes with videos; {family} makes pictures")
    if frames is None and output.suffix.lower() in media.MOVIES:
        raise ValueError(f"{output}: {family} makes pictures, no videos; there are {', '.join(media.FORMATS)}")
    if grid and (frames is not None or pipe.layered):
        raise ValueError(f"--grid lays pictures on a sheet; {family} makes {'layers' if pipe.layered else 'videos'}")
    if distributed.first():
        media.check_target(output, num_frames=frames, layers=pipe.layered)
    if fps is not None:
        from jdit.video import check_rate

        check_rate(output, fps)
    return output


@contextlib.contextmanager
def _listeners(frames: bool) -> Iterator[dict[str, Any]]:
    """Progress and Ctrl-C while a pipeline runs: what it tells of its steps and, where it does, of decoded frames."""
    with progress_bar() as bar, interruptible() as check:
        denoise = bar.add_task("prepare", total=None)
        decode = bar.add_task("decode", total=None, start=False, visible=False)

        def on_step(step: int, steps: int):
            check()
            bar.update(denoise, description="denoise", completed=step, total=steps)
            if step == steps:
                bar.start_task(decode)
                bar.update(decode, visible=True)

        def on_frame(frame: int, frames: int):
            check()
            bar.update(decode, completed=frame, total=frames)

        yield {"on_step": on_step} | ({"on_frame": on_frame} if frames else {})
