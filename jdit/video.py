"""Videos in and out of arrays (PyAV; Pillow for gif and webp). T frames, H W pixel rows and columns; RGB, uint8."""

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageSequence

from jdit.media import FORMATS, Picture, as_uint8, check_target, numbered, picture, write
from jdit.video_writer import EXACT, VideoWriter, as_fps

Source = np.ndarray | Sequence[Picture] | str | Path
Each = Callable[[np.ndarray], np.ndarray]
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,ivf"
"""What is read: containers that hold their own data (a playlist may name any other file)."""


class Video(NamedTuple):
    """uint8 frames (T, H, W, 3) and their rate, None where the source has none (arrays, lists of pictures)."""

    frames: np.ndarray
    fps: float | None = None


# ---- reading ----


def video(source: Source, *, start: int = 0, stop: int | None = None, each: Each | None = None) -> Video:
    """Frames `start` to `stop` (to the end) of an array, a list of pictures or paths, an animation, or a video file.

    Gif, webp and png are read by Pillow (a frame shown n times as long as the others counts n times), everything else
    by PyAV. What the file says of its colours is honoured; where it is silent they are BT.709 in pictures larger than
    1280 x 576 and BT.601 in others, limited range, as players have it. Rotation is applied, a pixel's aspect is not.
    Decoding ends at `stop`. `each` is called with every frame (H, W, 3) as soon as it is read, and what it returns is
    kept instead: a long video that is made smaller never lies in memory at its own size.

    Raises:
        ValueError: an array of another shape or dtype, pictures of several sizes, no frame in the range, or a file
            that is empty, truncated, has no video or is none; the message names it. FileNotFoundError: no such file.
    """
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"start={start}, stop={stop}: no frame lies between")
    if isinstance(source, str | Path):
        return _read(Path(source), start, stop, each or _same)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[-1] != 3 or 0 in source.shape:
            raise ValueError(f"a video is a uint8 array (T, H, W, 3), not {source.dtype} {source.shape}")
        frames = source[start:stop] if each is None else _stack([each(x) for x in source[start:stop]])
    else:
        frames = _stack([(each or _same)(picture(x)) for x in source[start:stop]])
    if not len(frames):
        raise ValueError(f"start={start}: the video has only {len(source)} frames")
    return Video(frames)


def mask_video(source: Source, *, start: int = 0, stop: int | None = None) -> np.ndarray:
    """A mask as uint8 (T, H, W), white to be generated: whatever `video` takes, as luma (Pillow's "L"); arrays may also
    be (T, H, W) or (T, H, W, 1), uint8 or bool."""
    return luma(video(as_rgb(source), start=start, stop=stop).frames)


def as_rgb(source: Source) -> Source:
    """A mask in any form that `mask_video` takes as one that `video` takes."""
    if not isinstance(source, np.ndarray) or (source.ndim != 3 and source.shape[-1:] != (1,)):
        return source
    source = source.reshape(source.shape[:3])
    return np.repeat((source * np.uint8(255) if source.dtype == bool else source)[..., None], 3, -1)


def luma(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) as (T, H, W), uint8: Pillow's "L"."""
    return np.stack([np.asarray(Image.fromarray(frame).convert("L")) for frame in frames])


def _same(frame: np.ndarray) -> np.ndarray:
    return frame


def _stack(frames: list[np.ndarray], name: str = "a video") -> np.ndarray:
    sizes = sorted({f.shape[:2] for f in frames})
    if len(sizes) > 1:
        raise ValueError(f"the frames of {name} have one size, not {', '.join(f'{h} x {w}' for h, w in sizes)}")
    return np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8)


def _read(path: Path, start: int, stop: int | None, each: Each) -> Video:
    if not path.exists():
        raise FileNotFoundError(f"no video at {path}")
    if path.is_dir() or not path.stat().st_size:
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'empty'}, not a video")
    if path.suffix.lower() in (*FORMATS, ".apng"):
        frames, fps = _animation(path)
        count, frames = len(frames), [each(f) for f in frames[start:stop]]
    else:
        try:
            frames, fps, count = _decode(path, start, stop, each)
        except FFmpegError as e:
            raise ValueError(f"{path} is not a video that can be read: {e.strerror}") from None
    if not len(frames):
        raise ValueError(f"{path}: start={start}, but the video has only {count} frames")
    return Video(_stack(frames, str(path)), fps)


def _animation(path: Path) -> tuple[list[np.ndarray], float | None]:
    frames, shown = [], []
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                frames.append(picture(frame))
                shown.append(frame.info.get("duration", 0))
    except Exception as e:  # Pillow's parsers raise anything when bytes are missing
        raise ValueError(f"{path} is not a picture or animation that Pillow reads: {e}") from None
    if len(frames) == 1:
        return frames, None
    ms = np.array([d if d > 10 else 100 for d in shown])  # what browsers do with 0 and 1 hundredths
    tick = ms[ms < 1.6 * ms.min()].mean()  # hundredths of a second: 24 a second is a mix of 4 and 5
    times = np.rint(ms / tick).astype(int)
    return [f for f, n in zip(frames, times) for _ in range(n)], float(1000 * times.sum() / ms.sum())


def _decode(path: Path, start: int, stop: int | None, each: Each) -> tuple[list[np.ndarray], float | None, int]:
    frames, n = [], 0
    with av.open(path, options={"format_whitelist": DEMUXERS}) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError(f"{path} has no video: its streams are {', '.join(s.type for s in container.streams)}")
        stream = streams[0]
        stream.thread_type = "AUTO"
        why = None
        try:
            for n, frame in enumerate(container.decode(stream), 1):
                if n > start:
                    frames.append(each(_rgb(frame)))
                if n == stop:
                    break
        except FFmpegError as e:
            why = e.strerror
        if n != stop:
            _check_whole(path, container.format.name, stream, n, why)
        return frames, float(stream.average_rate) if stream.average_rate else None, n


def _check_whole(path: Path, kind: str, stream: av.VideoStream, n: int, why: str | None):
    """A cut file just ends and decoders skip what is damaged: headers tell where it ends and with how many frames."""
    entries = list(stream.index_entries)
    if "mp4" in kind:
        end, count = max((e.pos + e.size for e in entries), default=0), sum(not e.is_discard for e in entries)
    else:
        end, count = _matroska_end(path) if "matroska" in kind else 0, 0
    what = "truncated" if end > path.stat().st_size else "damaged" if why or n < count else None
    if what and n:
        raise ValueError(f"{path} is {what}: {n} of its {count or 'unknown'} frames can be read (with stop={n})")
    if not n:
        raise ValueError(f"{path} is {what or 'a video without frames'}: no frame can be read")


def _matroska_end(path: Path) -> int:
    """Where the one segment of a Matroska file ends; 0 where it does not say (recorded live)."""
    with open(path, "rb") as f:
        head = f.read(4096)
    at = head.find(b"\x18\x53\x80\x67") + 4
    length = 9 - head[at].bit_length()
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(head[at : at + length]) & unknown
    return 0 if size == unknown else at + length + size


def _rgb(frame: VideoFrame) -> np.ndarray:
    known = frame.format.is_rgb or frame.colorspace != 2  # 2: unspecified
    guess = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=None if known else guess,
        dst_color_range=ColorRange.JPEG,
        interpolation=EXACT,
    ).to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3)  # column x, row y go to (ax + cy, bx + dy)
    if abs(b) > abs(a):  # a quarter turn: rows become columns
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def resample(frames: np.ndarray, from_fps: float | Fraction, to_fps: float | Fraction) -> np.ndarray:
    """The same (T, ...) seconds at another rate: round(T * to / from) frames (at least 1), each the one nearest in time
    (the later of two equally near). Frames are repeated or dropped, never mixed."""
    ratio = as_fps(from_fps) / as_fps(to_fps)
    count = max(1, math.floor(len(frames) / ratio + Fraction(1, 2)))
    return frames[[min(len(frames) - 1, math.floor(i * ratio + Fraction(1, 2))) for i in range(count)]]


def spread(frames: np.ndarray, num_frames: int) -> np.ndarray:
    """`num_frames` frames, evenly spaced from the first to the last."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: at least 1")
    step = Fraction(len(frames) - 1, max(1, num_frames - 1))
    return frames[[math.floor(i * step + Fraction(1, 2)) for i in range(num_frames)]]


# ---- writing ----


def save(pixels: np.ndarray, path: str | Path, *, fps: float | Fraction | None, crf: float = 17) -> list[Path]:
    """Write (B, T, H, W, 3) as B videos: `path` itself for one, NAME-0.mp4, NAME-1.mp4 and so on for several."""
    if pixels.ndim != 5:
        raise ValueError(f"videos are (B, T, H, W, 3), not {pixels.shape}")
    path = check_target(path, num_frames=pixels.shape[1])
    return [write_video(frames, name, fps, crf=crf) for frames, name in zip(pixels, numbered(path, len(pixels)))]


def check_rate(path: Path, fps: float | Fraction) -> Fraction:
    """The rate as a fraction, if a file of this suffix can have it.

    Raises:
        ValueError: it cannot.
    """
    rate = as_fps(fps)
    if path.suffix.lower() == ".gif" and rate > 50:
        raise ValueError(f"{path}: fps={fps}, a gif has at most 50; write mp4 or webp")
    return rate


def write_video(frames: np.ndarray, path: str | Path, fps: float | Fraction | None, *, crf: float = 17) -> Path:
    """Write (T, H, W, 3), uint8 or float in [0, 1], beside its place and rename. The suffix chooses: mp4 and mov (as
    `VideoWriter`), gif (at most 50 frames a second) and webp, both looping; one frame may be any picture.

    Timing is exact: where 1 / fps is no multiple of gif's 10 ms or webp's 1 ms, durations vary and no error adds up.

    Raises:
        ValueError: a shape, suffix or rate that cannot be. OSError: the target cannot be written.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"a video is (T, H, W, 3), not {frames.shape}")
    path = check_target(path, num_frames=len(frames))
    suffix = path.suffix.lower()
    if suffix in FORMATS and len(frames) == 1:
        write(Image.fromarray(as_uint8(frames[0])), path)
        return path
    if fps is None:
        raise ValueError(f"{path}: a video needs fps, frames a second")
    if suffix not in FORMATS:
        with VideoWriter(path, fps, *frames.shape[1:3], crf=crf) as writer:
            for i in range(0, len(frames), 16):
                writer.write(frames[i : i + 16])
        return path
    rate, unit = check_rate(path, fps), 10 if suffix == ".gif" else 1
    ends = [unit * round(i * 1000 / rate / unit) for i in range(len(frames) + 1)]
    first, *rest = (Image.fromarray(as_uint8(f)) for f in frames)
    durations = [b - a for a, b in itertools.pairwise(ends)]
    write(first, path, save_all=True, append_images=rest, duration=durations, loop=0)
    return path
