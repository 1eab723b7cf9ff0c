"""Videos out, piece by piece (PyAV). t frames of a piece, H W pixel rows and columns; RGB, uint8."""

import contextlib
import io
import math
import warnings
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from jdit.media import MOVIES, as_uint8, beside, check_target

NTSC = [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)]
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


def as_fps(fps: float | Fraction) -> Fraction:
    """The rate as a fraction; 23.976, 29.97, 59.94 and their like are the n * 1000 / 1001 that they stand for."""
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise ValueError(f"fps={fps}: a rate is above 0 and at most 1000 frames a second")
    exact = Fraction(fps) if isinstance(fps, int | Fraction) else Fraction(float(fps)).limit_denominator(1001)
    return next((n for n in NTSC if exact.denominator > 1 and abs(exact - n) < 0.005), exact)


class VideoWriter:
    """A video file written piece by piece: h264 that everything plays (yuv420p, BT.709, limited range, index in front).

        with VideoWriter("out.mp4", fps=16, height=480, width=832) as writer:
            for frames in segments:
                writer.write(frames)

    The file is written beside its place and renamed at the end. If the block raises (Ctrl-C too) nothing stays, or with
    `keep_partial` a whole file of the frames so far. With `growing` each call of `write` is one segment, and the file
    stands in its place, playable, from the first segment on: whatever happens afterwards (a kill too), it holds all
    whole segments. A growing file has an index a segment; when the block ends it gets one in front as any other.

    An odd height or width, which yuv420p cannot have, is made even by repeating the last row or column, with a warning.

    Args:
        path: .mp4 or .mov. fps: kept exactly; see `as_fps`.
        crf: x264's constant rate factor, 0 (nearly lossless) to 51; 17 is visually lossless.

    Raises:
        ValueError: a suffix, rate, size or crf that cannot be; at the end of the block, if nothing was written.
        OSError: the target cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float | Fraction,
        height: int,
        width: int,
        *,
        crf: float = 17,
        growing: bool = False,
        keep_partial: bool = False,
    ):
        self.path, self.fps, self.size = check_target(path, formats=tuple(MOVIES)), as_fps(fps), (height, width)
        if not (0 <= crf <= 51) or min(height, width) < 1 or max(height, width) > 8192:
            raise ValueError(f"{path}: crf={crf} (0 to 51), height={height}, width={width} (1 to 8192)")
        self.num_frames, self._segments, self._bytes = 0, 0, 0
        self._format = MOVIES[self.path.suffix.lower()]
        # so that the same frames make the same file: of small ones x264's quick code does not always
        self._options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
        self._options |= {"bf": "0"} if growing else {}  # no B-frame reaches past its segment
        self._growing, self._keep = growing, keep_partial or growing
        if height % 2 or width % 2:
            even = f"{height + height % 2} x {width + width % 2}"
            warnings.warn(f"{path}: {height} x {width} is written as {even}, h264 needs even sizes", stacklevel=2)

    def __enter__(self) -> "VideoWriter":
        with contextlib.ExitStack() as stack:
            if not self._growing:
                self._out = self._open(stack.enter_context(beside(self.path)), "faststart")
            self._place = stack.pop_all()
        return self

    def write(self, frames: np.ndarray):
        """Append (t, H, W, 3), uint8 or float in [0, 1]."""
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(f"{self.path} takes frames (t, {self.size[0]}, {self.size[1]}, 3), not {frames.shape}")
        if self._growing and len(frames):
            self._append(frames)
        elif not self._growing:
            self._encode(*self._out, frames)
        self.num_frames += len(frames)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        kept = self.num_frames > 0 and (kind is None or self._keep)
        with self._place:  # left by an exception it removes what is beside the place, otherwise it renames
            if not self._growing:
                self._close(*self._out, whole=kept)
            elif kept:
                with contextlib.suppress(OSError):  # a full disk: the file is whole without
                    _reindex(self.path, self._format)
            if not kept:
                raise error or ValueError(f"{self.path}: no frame was written")

    def _open(self, file: Path | IO[bytes], movflags: str, **options: str) -> tuple[OutputContainer, av.VideoStream]:
        container = av.open(file, "w", format=self._format, options={"movflags": movflags, **options})
        stream = container.add_stream("libx264", rate=self.fps, options=self._options)
        stream.height, stream.width = (n + n % 2 for n in self.size)
        stream.pix_fmt, stream.color_range = "yuv420p", ColorRange.MPEG
        stream.colorspace = stream.color_primaries = stream.color_trc = 1  # BT.709
        return container, stream

    def _encode(self, container: OutputContainer, stream: av.VideoStream, frames: np.ndarray):
        odd = [(0, n % 2) for n in self.size]
        for i, pixels in enumerate(frames, self.num_frames):
            pixels = np.ascontiguousarray(np.pad(as_uint8(pixels), (*odd, (0, 0)), "edge"))
            frame = VideoFrame.from_ndarray(pixels, "rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT,
            )
            frame.pts, frame.time_base = i, 1 / self.fps
            container.mux(stream.encode(frame))

    def _close(self, container: OutputContainer, stream: av.VideoStream, whole: bool = True):
        with container:
            if whole:
                container.mux(stream.encode(None))

    def _append(self, frames: np.ndarray):
        """One segment: an encoder of its own, one fragment, appended in one go or not at all."""
        fragment = io.BytesIO()
        flags = "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer"
        out = self._open(fragment, flags, fragment_index=str(self._segments + 1), avoid_negative_ts="disabled")
        self._encode(*out, frames)
        self._close(*out)
        data = fragment.getvalue()
        if self._segments:
            data = data[_header(data) :]  # that of the first segment serves all
            with open(self.path, "r+b") as f:
                try:
                    f.seek(self._bytes)
                    f.write(data)
                    f.flush()
                except BaseException:
                    f.truncate(self._bytes)
                    raise
        else:
            with beside(self.path) as partial:
                partial.write_bytes(data)
        self._bytes += len(data)
        self._segments += 1


def _header(data: bytes) -> int:
    """How long the boxes before the first fragment are."""
    at = 0
    while data[at + 4 : at + 8] != b"moof":
        at += int.from_bytes(data[at : at + 4])
    return at


def _reindex(path: Path, kind: str):
    """The same packets with one index in front, which seeking and old players want."""
    with (
        beside(path) as partial,
        av.open(path) as old,
        av.open(partial, "w", format=kind, options={"movflags": "faststart"}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
