"""Videos that are written while they are made: a file that grows by a segment at a time."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jdit import distributed
from jdit.terminal import interruptible, progress_bar, say


def write_segments(pipe, prompts: Sequence[str], output: Path, fps: float | None, **arguments: Any):
    """Run a pipeline that makes segments, and append each to its file (a numbered one for each of several results).

    After Ctrl-C the files hold the whole segments that were made; the process says so and ends with code 130.

    Returns:
        (paths, seconds a stage); of several processes only the first one writes and has any.
    """
    from jdit.media import numbered
    from jdit.video_writer import VideoWriter

    writers: list[VideoWriter] = []
    timings: dict[str, float] = {}
    made = 0
    with contextlib.ExitStack() as files:
        try:
            with segment_progress() as listeners:
                for out in pipe.stream(prompts, **arguments, **listeners):
                    if not distributed.first():
                        continue
                    for path in numbered(output, len(out.pixels)) if not writers else ():
                        writer = VideoWriter(path, fps or out.fps, *out.pixels.shape[2:4], growing=True)
                        writers.append(files.enter_context(writer))
                    for writer, frames in zip(writers, out.pixels):
                        writer.write(frames)
                    made += 1
                    for name, seconds in out.timings.items():
                        stage = name.split("[")[0]
                        timings[stage] = timings.get(stage, 0.0) + seconds
        except KeyboardInterrupt:
            if not made:
                raise
            files.close()
            names = ", ".join(str(writer.path) for writer in writers)
            whole = f"the {made} whole segments that were" if made > 1 else "the one whole segment that was"
            say(f"interrupted; {names} holds {writers[0].num_frames} frames, {whole} made")
            sys.exit(130)
    return [writer.path for writer in writers], timings


@contextlib.contextmanager
def segment_progress() -> Iterator[dict[str, Callable[[int, int], None]]]:
    """Progress by segment and by step, and Ctrl-C, while a pipeline makes segments."""
    with progress_bar() as bar, interruptible() as check:
        segments = bar.add_task("segments", total=None)
        steps = bar.add_task("prepare", total=None)

        def on_step(done: int, total: int):
            check()
            bar.update(steps, description="denoise", completed=done, total=total)

        def on_segment(done: int, total: int):
            bar.update(segments, completed=done, total=total)
            check()

        yield {"on_step": on_step, "on_segment": on_segment}
