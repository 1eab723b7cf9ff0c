"""What drives Wan-Animate, checked and read: pose, face, background and mask videos, and the reference picture, as
diffusers prepares them (pipelines/wan/pipeline_wan_animate.py and image_processor.py, video_processor.py).

T frames, H W pixel rows and columns of the result, S pixels of a side of a face; uint8, a frame at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from jdit import media
from jdit.sampling.segments import reflected
from jdit.video import Source, as_rgb, luma, video

GREY, GREY_SHARE = (32, 223), 0.1
"""Luma between these is neither black nor white; a mask may have this share of it (rims, and what a codec leaves)."""
STRETCH = 0.02
"""By how much the ratios of width to height of videos that lie over each other may differ: a codec's even sizes do."""


class Clips(NamedTuple):
    """The driving videos at the run's size. fps: their rate, None where none says so. notes: what was done to them."""

    pose: UInt8[np.ndarray, "T H W 3"]
    face: UInt8[np.ndarray, "T S S 3"]
    background: UInt8[np.ndarray, "T H W 3"] | None = None
    mask: UInt8[np.ndarray, "T H W"] | None = None
    fps: float | None = None
    notes: tuple[str, ...] = ()

    def frames(
        self, which: Int[np.ndarray, "t"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Frames by number of pose, face, background and mask."""
        pose, face, background, mask = (None if x is None else x[which] for x in self[:4])
        assert pose is not None and face is not None
        return pose, face, background, mask


class Report(NamedTuple):
    """problems: why a run would be refused. notes: what would be done to the videos, and what looks odd."""

    problems: list[str]
    notes: list[str]


class _Clip(NamedTuple):
    """frames: at the run's size, or a pixel of each. size: of the source. told: what `_TELL` says of each frame."""

    frames: np.ndarray
    size: tuple[int, int]
    fps: float | None
    told: np.ndarray


_TELL = {
    "pose": lambda frame: (frame > 48).any(-1).mean(),
    "mask": lambda frame: np.bincount(luma(frame[None]).ravel(), minlength=256),
}
"""What problems and notes need to know of a frame: the share of a pose that is not black, the luma of a mask."""


def read(
    pose: Source,
    face: Source,
    background: Source | None = None,
    mask: Source | None = None,
    *,
    height: int,
    width: int,
    face_size: int = 512,
    fps: float | None = None,
    stop: int | None = None,
) -> Clips:
    """Read each video once and bring it to size (Lanczos, aspect not kept; masks then become luma).

    Args:
        pose, face, background, mask: what `jdit.video.video` takes, the mask also what `mask_video` takes: white (255)
            is to be generated, black kept.
        height, width: of the result. face_size: rows and columns of a face.
        fps: the rate that the videos should have, where they say; None: any that they share.
        stop: read so many frames at most.

    Raises:
        ValueError: all that `check` calls problems.
    """
    report, clips = _examine(pose, face, background, mask, height, width, face_size, fps, stop, keep=True)
    if clips is None:
        raise ValueError("; ".join(report.problems))
    return clips


def check(
    pose: Source,
    face: Source,
    background: Source | None = None,
    mask: Source | None = None,
    *,
    height: int,
    width: int,
    face_size: int = 512,
    fps: float | None = None,
    stop: int | None = None,
) -> Report:
    """What `read` with the same arguments would refuse, all findings at once, and how it would resize what it takes.

    Problems: a video that cannot be read; background without mask or the reverse; other lengths or rates than the pose
    video's; another shape (width to height) of background or mask than the pose video's; a mask with much grey, or with
    nothing to be generated. Notes: sizes and how they change, empty or unlikely pose videos. No video of a file lies in
    memory as a whole.
    """
    return _examine(pose, face, background, mask, height, width, face_size, fps, stop, keep=False)[0]


def _examine(pose, face, background, mask, height, width, face_size, fps, stop, *, keep) -> tuple[Report, Clips | None]:
    problems, clips, size = [], {}, (height, width)
    given = {"pose": (pose, size), "face": (face, (face_size, face_size)), "background": (background, size),
             "mask": (None if mask is None else as_rgb(mask), size)}  # fmt: skip
    for name, (source, to) in given.items():
        if source is not None:
            try:
                clips[name] = _read(source, to, stop, _TELL.get(name, np.size), keep)
            except (ValueError, OSError) as e:
                problems.append(f"{name}: {e}")
    if (background is None) != (mask is None):
        have, need = ("background", "mask") if mask is None else ("mask", "background")
        problems.append(f"{have} needs {need}: together they say where a figure is replaced")
    if "mask" in clips:
        clips["mask"] = clips["mask"]._replace(frames=luma(clips["mask"].frames))
        problems += _mask_problems(clips["mask"].told)
    problems += _mismatches(clips, fps)
    notes = [_resizing(name, clip, given[name][1]) for name, clip in clips.items()]
    if "pose" in clips:
        notes += _pose_notes(clips["pose"].told)
    if problems:
        return Report(problems, notes), None
    rate = next((c.fps for c in clips.values() if c.fps is not None), None)
    frames = (clips[n].frames if n in clips else None for n in given)
    return Report(problems, notes), Clips(*frames, fps=rate, notes=tuple(notes))  # type: ignore[arg-type]


def _read(source: Source, to: tuple[int, int], stop: int | None, tell: Callable, keep: bool) -> _Clip:
    sizes: set[tuple[int, int]] = set()
    told = []

    def each(frame: np.ndarray) -> np.ndarray:
        sizes.add(frame.shape[:2])
        frame = media.resize(frame, *to)
        told.append(tell(frame))
        return frame if keep else _pixel(frame)

    frames, fps = video(source, stop=stop, each=each)
    if len(sizes) > 1:
        raise ValueError(f"its frames have one size, not {', '.join(f'{w} x {h}' for h, w in sorted(sizes))}")
    return _Clip(frames, sizes.pop(), fps, np.stack(told))


def _pixel(frame: np.ndarray) -> np.ndarray:
    return frame[:1, :1].copy()  # a view would keep the frame


def _mismatches(clips: dict[str, _Clip], fps: float | None) -> list[str]:
    """Lengths, rates and shapes that differ from the pose video's, or from the first that could be read."""
    if not clips:
        return []
    out, first = [], next(iter(clips))
    lead = clips[first]
    rated = next((n for n, c in clips.items() if c.fps is not None), None)
    if fps is not None and rated is not None and _apart(fps, clips[rated].fps):
        out.append(f"{rated} has {clips[rated].fps:.6g} frames a second, fps={fps:.6g}: give its rate, or resample it")
    for name, clip in clips.items():
        if len(clip.frames) != len(lead.frames):
            out.append(f"{name} has {len(clip.frames)} frames, {first} has {len(lead.frames)}: as many are needed")
        if rated is not None and clip.fps is not None and _apart(clip.fps, clips[rated].fps):
            rates = f"{clip.fps:.6g} frames a second, {rated} has {clips[rated].fps:.6g}"
            out.append(f"{name} has {rates}: one rate is needed (jdit.video.resample)")
        ratios = [c.size[1] / c.size[0] for c in (clip, lead)]
        if "face" not in (name, first) and abs(ratios[0] / ratios[1] - 1) > STRETCH:
            out.append(
                f"{name} is {_size(clip)}, {first} is {_size(lead)}: they lie over each other, so one shape is needed"
            )
    return out


def _apart(a: float, b: float | None) -> bool:
    return b is not None and abs(a / b - 1) > 0.005  # 29.97 and 30 are the same to viewers, 24 and 25 are not


def _mask_problems(luma_counts: Int[np.ndarray, "T 256"]) -> list[str]:
    counts = luma_counts.sum(0) / luma_counts.sum()
    grey = counts[GREY[0] : GREY[1] + 1].sum()
    if grey > GREY_SHARE:
        return [f"mask is grey in {grey:.0%} of its pixels: white is to be generated, black is kept"]
    if not counts[GREY[1] + 1 :].any():
        return ["mask is black throughout: nothing is to be generated; white says where"]
    return []


def _pose_notes(lit: Float[np.ndarray, "T"]) -> list[str]:
    notes = []
    if empty := int((lit == 0).sum()):
        notes.append(f"pose: {empty} of {len(lit)} frames are black, without a figure")
    if np.median(lit) > 0.5:
        notes.append(f"pose: {np.median(lit):.0%} of a frame is not black; skeletons on black are needed (jdit pose)")
    return notes


def _resizing(name: str, clip: _Clip, to: tuple[int, int]) -> str:
    what = f"{name}: {len(clip.frames)} frames of {_size(clip)}"
    if clip.size == to:
        return what
    stretch = (to[1] / to[0]) / (clip.size[1] / clip.size[0])
    wider = f", {abs(stretch - 1):.0%} {'wider' if stretch > 1 else 'narrower'}" if abs(stretch - 1) > STRETCH else ""
    return f"{what}, resized to {to[1]} x {to[0]}{wider}"


def _size(clip: _Clip) -> str:
    return f"{clip.size[1]} x {clip.size[0]}"


class Streams:
    """Driving videos that are read a piece at a time, so that a file never lies in memory as a whole.

    As upstream has it, nothing about them need agree: each is brought to size, and goes back and forth where it is
    shorter than what is asked of it. `check` is stricter.

    Attributes:
        length: frames of the pose video. fps: its rate, None where it does not say.
    """

    def __init__(
        self, pose: Source, face: Source, background: Source | None = None, mask: Source | None = None, *, height: int,
        width: int, face_size: int,
    ):  # fmt: skip
        """Args: as those of `read`. Raises: ValueError, OSError: a video that cannot be read; all are decoded once."""
        size = (height, width)
        sizes = (size, (face_size, face_size), size, size)
        sources = (pose, face, background, None if mask is None else as_rgb(mask))
        self.length, self.fps = _length(pose)
        lengths = (self.length, *(None if s is None else _length(s)[0] for s in sources[1:]))
        self._clips = [None if s is None or n is None else (s, to, n) for s, to, n in zip(sources, sizes, lengths)]

    def frames(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Frames start to stop of pose (T, H, W, 3), face (T, S, S, 3), background and mask (T, H, W); None for those
        that were not given."""
        pose, face, background, mask = (c and _part(*c, start, stop) for c in self._clips)
        assert pose is not None and face is not None
        return pose, face, background, None if mask is None else luma(mask)


def _length(source: Source) -> tuple[int, float | None]:
    """Frames and rate."""
    frames, fps = video(source, each=_pixel)
    return len(frames), fps


def _part(source: Source, to: tuple[int, int], length: int, start: int, stop: int) -> np.ndarray:
    which = reflected(length, start, stop)
    first = int(which.min())
    part = video(source, start=first, stop=int(which.max()) + 1, each=lambda frame: media.resize(frame, *to)).frames
    return part[which - first]


def reference(
    picture: media.Picture, height: int, width: int, *, fill_color: int | str | tuple[int, int, int] = 0
) -> UInt8[np.ndarray, "H W 3"]:
    """The reference picture as large as it fits with its aspect kept, in the middle of `fill_color`. Lanczos: upstream
    asks for bilinear, but the parent class of its processor then registers its own default over that.

    Raises:
        ValueError: what `media.picture` refuses, or a picture so long that a side of it would vanish.
    """
    image = Image.fromarray(media.picture(picture))
    wide = width / height < image.width / image.height
    columns = width if wide else image.width * height // image.height
    rows = image.height * width // image.width if wide else height
    if not rows or not columns:
        raise ValueError(f"a picture of {image.width} x {image.height} leaves nothing in {width} x {height}")
    canvas = Image.new("RGB", (width, height), fill_color)
    scaled = image.resize((columns, rows), Image.Resampling.LANCZOS)
    canvas.paste(scaled, (width // 2 - columns // 2, height // 2 - rows // 2))
    return np.asarray(canvas)
