"""`jdit pose`, `jdit check`: the videos that drive Wan-Animate, made from keypoints, and whether they go together."""

import sys
from pathlib import Path

import click

from jdit.cli_generate import Size
from jdit.terminal import USER, say

EXAMPLES = {
    "pose": """\b
Examples:
  jdit pose keypoints.npy -o pose.mp4 --size 1280x720 --fps 30
  jdit pose keypoints.npy -o pose.mp4 --size 832x480 --source 1920x1080 --fps 30
  jdit pose keypoints.npy -o pose.mp4 --fps 30 --video dance.mp4 --face face.mp4""",
    "check": """\b
Examples:
  jdit check --pose pose.mp4 --face face.mp4
  jdit check --pose pose.mp4 --face face.mp4 --background street.mp4 --mask mask.mp4 --size 1280x720""",
}
PATH = click.Path(path_type=Path)


@click.command(epilog=EXAMPLES["pose"])
@click.argument("keypoints", type=PATH)
@click.option("-o", "--output", type=PATH, default=Path("pose.mp4"), show_default=True, help="mp4, mov, gif or webp.")
@click.option("--size", type=Size(), metavar="WxH", help="Of the pose video.  [default: the source's]")
@click.option("--source", type=Size(), metavar="WxH", help="Of the pictures that the keypoints were found in.")
@click.option("--video", type=PATH, help="Those pictures: instead of --source, and to cut the face from.")
@click.option("--face", type=PATH, help="With --video: where to write the face video, 512 x 512.")
@click.option("--fps", type=float, help="Frames a second.  [default: the video's]")
@click.option("--normalized", is_flag=True, help="x and y are shares of the width and height.")
@click.option("--threshold", type=float, default=0.5, show_default=True, help="Confidence below it is not drawn.")
def pose(keypoints, output, size, source, video, face, fps, normalized, threshold):
    """Draw a pose video from keypoints: a .npy array (T, K, 3) of x, y and confidence (see docs/driving.md)."""
    import numpy as np

    from jdit import media, pose
    from jdit.video import video as read
    from jdit.video import write_video

    for path in (output, face):
        if path is not None:
            media.check_target(path, media.ANIMATIONS)
    if face is not None and video is None:
        raise click.UsageError("--face needs --video: the face is cut from it")
    try:
        points = np.load(keypoints, allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise ValueError(f"{keypoints} is not a .npy array: {e}") from None
    if video is not None:
        frames, rate = read(video)
        source, fps = source or frames.shape[1:3], fps or rate
        if len(frames) != len(points):
            raise ValueError(f"{video} has {len(frames)} frames, {keypoints} has {len(points)}")
        if face is not None:
            write_video(pose.crop_faces(frames, points, normalized=normalized), face, fps)
    target = size or source
    if target is None:
        raise click.UsageError("give --size, --source or --video: how large the picture is")
    drawn = pose.draw(points, *target, source=source, normalized=normalized, threshold=threshold)
    write_video(drawn, output, fps)
    names = ", ".join(str(path) for path in (output, face) if path is not None)
    say(f"{names}: {len(drawn)} frames")


@click.command(epilog=EXAMPLES["check"])
@click.option("--pose", type=PATH, required=True, help="Skeletons on black.")
@click.option("--face", type=PATH, required=True, help="The face, cut out.")
@click.option("--background", type=PATH, help="With --mask: the video in which a figure is replaced.")
@click.option("--mask", type=PATH, help="With --background: white where it is.")
@click.option("--size", type=Size(), metavar="WxH", default="832x480", show_default=True, help="Of the result.")
@click.option("--face-size", type=click.IntRange(1), default=512, show_default=True, help="Pixels of a side.")
@click.option("--fps", type=click.FloatRange(0, min_open=True), help="The rate that they should have.  [default: any]")
def check(pose, face, background, mask, size, face_size, fps):
    """Tell whether driving videos go together, and how they would be resized. Exit code 2 if they do not."""
    from jdit import driving

    report = driving.check(pose, face, background, mask, height=size[0], width=size[1], face_size=face_size, fps=fps)
    for note in report.notes:
        click.echo(note)
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    if report.problems:
        sys.exit(USER)
