"""Videos in and out."""

import io
import os
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from jdit import media, video
from jdit.structs import Output
from jdit.video import VideoWriter, write_video


def waves(t=6, h=48, w=64):
    """Soft moving colours, which any codec keeps."""
    y, x, c = np.mgrid[0:h, 0:w, 0:3]
    return np.stack([np.uint8(127 + 100 * np.sin(x / 17 + i / 5 + c) * np.cos(y / 13 + 2 * c)) for i in range(t)])


def far(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(float) - b).mean()


def encode(path, planes, pix_fmt, turn=(0, False), **tags):
    """A file of one frame with these Y, Cb and Cr, so that no conversion but the reader's takes part."""
    frame = av.VideoFrame.from_ndarray(planes, pix_fmt)
    with av.open(path, "w") as f:
        s = f.add_stream("libx264", rate=25, options={"crf": "1"})
        s.height, s.width, s.pix_fmt = frame.height, frame.width, pix_fmt
        s.set_display_rotation(turn[0], hflip=turn[1])
        for name, value in tags.items():
            setattr(s, name, value)
        f.mux(s.encode(frame))
        f.mux(s.encode(None))
    return path


@pytest.mark.parametrize("fps", [16, 24, 23.976, 12.5, Fraction(30000, 1001)])
def test_mp4_round_trip(tmp_path, fps):
    path = write_video(waves(), tmp_path / "a.mp4", fps)
    back = video.video(path)
    assert far(back.frames, waves()) < 2.5
    assert back.fps == (24000 / 1001 if fps == 23.976 else float(fps))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(path) as f:
        s = f.streams.video[0]
        assert (s.codec_context.name, s.pix_fmt, s.frames, s.start_time) == ("h264", "yuv420p", 6, 0)
        assert (s.colorspace, s.color_primaries, s.color_trc, s.color_range) == (1, 1, 1, 1)
        assert s.duration * s.time_base == 6 / video.as_fps(fps)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255), (0, 0, 0), (200, 100, 50)]


def test_patches_keep_their_colour(tmp_path):
    patches = np.repeat(np.repeat(np.uint8([COLOURS]), 32, 0), 32, 1)[None].repeat(3, 0)
    back = video.video(write_video(patches, tmp_path / "a.mp4", 8)).frames
    for i, colour in enumerate(COLOURS):
        assert far(back[:, 8:24, 32 * i + 8 : 32 * i + 24], np.broadcast_to(colour, (3, 16, 16, 3))) < 3


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "tag, size, kr, kb",
    [
        (1, 32, 0.2126, 0.0722),
        (6, 32, 0.299, 0.114),
        (9, 32, 0.2627, 0.0593),
        (2, 32, 0.299, 0.114),
        (2, 720, 0.2126, 0.0722),
    ],
)
def test_colour_tags_are_honoured(tmp_path, tag, size, kr, kb, full):
    """The definition: Y = kr R + kg G + kb B, Cb = (B - Y) / (2 - 2 kb), Cr likewise; untagged: by size."""
    rgb = np.array(COLOURS) / 255
    y = rgb @ [kr, 1 - kr - kb, kb]
    cb, cr = (rgb[:, 2] - y) / (2 - 2 * kb), (rgb[:, 0] - y) / (2 - 2 * kr)
    ycc = (255 * y, 128 + 255 * cb, 128 + 255 * cr) if full else (16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr)
    planes = [np.repeat(np.tile(np.clip(np.rint(p), 0, 255).astype(np.uint8), (size, 1)), 16, 1) for p in ycc]
    path = encode(tmp_path / "a.mp4", np.stack(planes), "yuv444p", colorspace=tag, color_range=2 if full else 1)
    got = video.video(path).frames[0, size // 2, 8::16]
    assert np.abs(got.astype(int) - COLOURS).max() <= 3


@pytest.mark.parametrize("degrees, flip", [(90, False), (180, False), (270, False), (0, True), (90, True)])
def test_rotation_is_applied(tmp_path, degrees, flip):
    grey = np.uint8(40 + 2 * np.mgrid[0:32, 0:48][0] + np.mgrid[0:32, 0:48][1])
    planes = np.concatenate([grey, np.full((16, 48), 128, np.uint8)])
    path = encode(tmp_path / "a.mp4", planes, "yuv420p", turn=(degrees, flip), color_range=1)
    plain = np.clip((grey.astype(float) - 16) * 255 / 219, 0, 255)
    want = np.rot90(plain, degrees // 90)  # counterclockwise, then the mirror: av_display_matrix_flip negates x'
    want = want[:, ::-1] if flip else want
    with av.open(path) as f:
        assert flip or next(f.decode(video=0)).rotation % 360 == degrees
    got = video.video(path).frames[0]
    assert far(got, np.repeat(want[..., None], 3, -1)) < 2


def test_a_range_is_read(tmp_path):
    path = write_video(waves(12), tmp_path / "a.mp4", 8, crf=5)
    assert far(video.video(path, start=3, stop=7).frames, waves(12)[3:7]) < 2
    path.write_bytes(path.read_bytes()[:-40])  # the last frame is never asked for
    assert len(video.video(path, stop=2).frames) == 2
    gif = write_video(waves(12), tmp_path / "a.gif", 10)
    for source in (waves(12), list(waves(12)), gif):
        assert len(video.video(source, start=3, stop=7).frames) == 4
        assert len(video.video(source, start=10, stop=40).frames) == 2
        with pytest.raises(ValueError, match=r"start=12.* only 12 frames"):
            video.video(source, start=12)
    with pytest.raises(ValueError, match="start=3, stop=3"):
        video.video(gif, start=3, stop=3)


def test_arrays_and_pictures(tmp_path):
    media.save(waves(3), tmp_path / "p.png")
    paths = sorted(tmp_path.iterdir())
    for source in (waves(3), paths, [Image.fromarray(x) for x in waves(3)], tuple(map(str, paths))):
        got = video.video(source)
        np.testing.assert_array_equal(got.frames, waves(3))
        assert got.fps is None
    np.testing.assert_array_equal(video.video(paths[1]).frames, waves(3)[1:2])
    with pytest.raises(ValueError, match=r"uint8 array \(T, H, W, 3\), not float64 \(2, 2\)"):
        video.video(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="one size, not 48 x 9, 48 x 64"):
        video.video([waves(1)[0], waves(1, 48, 9)[0]])


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [10, 24, 30])
def test_animations(tmp_path, suffix, fps):
    path = write_video(waves(24), tmp_path / f"a{suffix}", fps)
    back = video.video(path)
    assert far(back.frames, waves(24)) < 6
    unit = 0.01 if suffix == ".gif" else 0.001
    assert abs(24 / back.fps - 24 / fps) <= unit / 2 + 1e-9  # the whole length is right, however short a frame
    with pytest.raises(ValueError, match="fps=60, a gif has at most 50"):
        write_video(waves(2), tmp_path / "b.gif", 60)


def test_a_frame_that_stands_counts_as_often_as_it_is_shown(tmp_path):
    still = waves(4)[[0, 0, 0, 1, 2, 2, 3]]
    for suffix in (".gif", ".webp"):  # both merge equal frames
        back = video.video(write_video(still, tmp_path / f"a{suffix}", 24))
        assert far(back.frames, still) < 6


def test_webm(tmp_path):
    path = tmp_path / "a.webm"
    with av.open(path, "w") as f:
        s = f.add_stream("libvpx-vp9", rate=24, options={"deadline": "realtime", "cpu-used": "8"})
        s.height, s.width, s.pix_fmt = 48, 64, "yuv420p"
        for x in waves():
            f.mux(s.encode(av.VideoFrame.from_ndarray(x, "rgb24")))
        f.mux(s.encode(None))
    back = video.video(path)
    assert far(back.frames, waves()) < 5 and back.fps == 24
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"a\.webm is truncated"):
        video.video(path)


def test_files_that_are_no_videos(tmp_path):
    whole = write_video(waves(40), tmp_path / "a.mp4", 24).read_bytes()
    gif = write_video(waves(), tmp_path / "a.gif", 10).read_bytes()
    bad = tmp_path / "bad.mp4"
    playlist = b"ffconcat version 1.0\nfile a.mp4\n"
    with av.open(tmp_path / "a.mp4") as f:
        last = list(f.streams.video[0].index_entries)[-1]
        last = (last.pos, last.size)  # while the file is open: an entry points into it
    for data, what in [
        (b"", "is empty"),
        (b"no video at all\n" * 90, "is not a video that can be read"),
        (playlist, "is not a video that can be read"),
        (whole[:200], ""),
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-1], "truncated: [0-9]+ of its 40 frames can be read"),
    ]:
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=rf"bad\.mp4.*{what}"):
            video.video(bad)
    with av.open(bad, "w") as f:
        s = f.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 44100
        f.mux(s.encode(sound))
        f.mux(s.encode(None))
    with pytest.raises(ValueError, match=r"bad\.mp4 has no video: its streams are audio"):
        video.video(bad)
    (tmp_path / "bad.gif").write_bytes(gif[: len(gif) // 2])
    with pytest.raises(ValueError, match=r"bad\.gif is not"):
        video.video(tmp_path / "bad.gif")
    with pytest.raises(FileNotFoundError, match="no video at"):
        video.video(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="is a folder"):
        video.video(tmp_path)
    for at, n in (
        (len(whole) * 2 // 3, 99),
        last,
    ):  # the decoder tells of the first, not of the second
        bad.write_bytes(whole[:at] + bytes(n) + whole[at + n :])
        with pytest.raises(ValueError, match=r"bad\.mp4 is damaged: [0-9]+ of its 40 frames can be read"):
            video.video(bad)


def test_masks(tmp_path):
    mask = np.zeros((3, 16, 16), bool)
    mask[1, 4:] = True
    want = np.uint8(mask) * 255
    frames = np.repeat(want[..., None], 3, -1)
    path = write_video(frames, tmp_path / "m.mp4", 8, crf=1)
    for source in (mask, mask[..., None], want, frames, [Image.fromarray(x) for x in want], path):
        assert far(video.mask_video(source), want) < 1
    assert video.mask_video(np.uint8(np.full((1, 2, 2, 3), (255, 0, 0))))[0, 0, 0] == 76  # luma as Pillow and upstream


def test_odd_sizes_are_made_even(tmp_path):
    with pytest.warns(UserWarning, match="47 x 63 is written as 48 x 64"):
        path = write_video(waves(3, 47, 63), tmp_path / "a.mp4", 8, crf=5)
    back = video.video(path).frames
    assert back.shape == (3, 48, 64, 3) and far(back[:, :47, :63], waves(3, 47, 63)) < 3
    assert np.abs(back[:, 47].astype(int) - back[:, 46]).mean() < 3


def test_targets(tmp_path):
    with pytest.raises(ValueError, match=r"no video is '.png'; there are .mp4, .mov, .gif, .webp"):
        write_video(waves(), tmp_path / "a.png", 8)
    with pytest.raises(ValueError, match=r"unknown suffix '.avi'; there are .mp4"):
        media.check_target(tmp_path / "a.avi", num_frames=9)
    with pytest.raises(ValueError, match=r"unknown suffix '.mp4'"):
        media.check_target(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="needs fps"):
        write_video(waves(), tmp_path / "a.mp4", None)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps="):
            write_video(waves(), tmp_path / "a.mp4", fps)
    with pytest.raises(ValueError, match=r"a video is \(T, H, W, 3\)"):
        write_video(waves()[0], tmp_path / "a.mp4", 8)
    with pytest.raises(ValueError, match="crf=60"):
        VideoWriter(tmp_path / "a.mp4", 8, 16, 16, crf=60)
    write_video(waves(1), tmp_path / "a.png", None)
    np.testing.assert_array_equal(media.picture(tmp_path / "a.png"), waves(1)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_output_saves_several(tmp_path):
    pixels = np.stack([waves(3), waves(3)[:, ::-1]]) / np.float32(255)
    out = Output(pixels, None, {}, fps=16)  # pyright: ignore
    paths = out.save(tmp_path / "a.mp4")
    assert [p.name for p in paths] == ["a-0.mp4", "a-1.mp4"]
    assert far(video.video(paths[1]).frames, waves(3)[:, ::-1]) < 3
    assert video.video(out.save(tmp_path / "b.mp4", fps=30)[0]).fps == 30


@pytest.mark.parametrize("mode", [{}, {"growing": True}])
def test_pieces(tmp_path, mode):
    with VideoWriter(tmp_path / "a.mp4", 23.976, 48, 64, **mode) as writer:
        for piece in np.split(waves(10), [1, 2, 7, 7]):
            writer.write(piece)
    back = video.video(tmp_path / "a.mp4")
    assert far(back.frames, waves(10)) < 2.5 and back.fps == 24000 / 1001
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and b"moof" not in data
    with av.open(tmp_path / "a.mp4") as f:
        s = f.streams.video[0]
        assert (s.frames, s.start_time, s.colorspace, s.color_range) == (10, 0, 1, 1)
        assert s.duration * s.time_base == Fraction(10 * 1001, 24000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_growing_file_plays_after_each_segment(tmp_path):
    path, n = tmp_path / "a.mp4", 0
    path.write_bytes(b"an older video")
    with VideoWriter(path, 16, 48, 64, growing=True) as writer:
        assert path.read_bytes() == b"an older video"  # until there is something in its place
        for piece in np.split(waves(10), [4, 5]):
            writer.write(piece)
            n += len(piece)
            back = video.video(path)
            assert far(back.frames, waves(10)[:n]) < 2.5 and back.fps == 16
            with av.open(path) as f:
                assert [frame.time * 16 for frame in f.decode(video=0)] == list(range(n))
                assert f.streams.video[0].duration * f.streams.video[0].time_base == Fraction(n, 16)
        numbers = [int.from_bytes(x[4:8]) for x in path.read_bytes().split(b"mfhd")[1:]]
        assert numbers == [1, 2, 3]  # of the fragments


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("mode", [{}, {"keep_partial": True}, {"growing": True}])
def test_an_end_before_the_end(tmp_path, mode, error):
    for before in (True, False):
        with pytest.raises(error), VideoWriter(tmp_path / "a.mp4", 16, 48, 64, **mode) as writer:
            if not before:
                writer.write(waves(5))
                writer.write(waves(3))
            raise error
        if before or not mode:
            assert not list(tmp_path.iterdir())
        else:
            assert len(video.video(tmp_path / "a.mp4").frames) == 8
            assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("mode", [{}, {"keep_partial": True}, {"growing": True}])
def test_frames_that_do_not_fit(tmp_path, mode):
    with pytest.raises(ValueError, match=r"takes frames \(t, 48, 64, 3\)"):  # noqa: SIM117
        with VideoWriter(tmp_path / "a.mp4", 16, 48, 64, **mode) as writer:
            writer.write(waves(2, 48, 32))
    with pytest.raises(ValueError, match="no frame was written"), VideoWriter(tmp_path / "a.mp4", 16, 48, 64, **mode):
        pass
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_whole_segments(tmp_path):
    program = f"""
        import os, signal, numpy as np
        from jdit.video_writer import VideoWriter
        with VideoWriter({str(tmp_path / "a.mp4")!r}, 16, 48, 64, growing=True) as writer:
            for n in (5, 3, 4):
                writer.write(np.full((n, 48, 64, 3), 99, np.uint8))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(video.video(tmp_path / "a.mp4").frames) == 12


def test_a_failed_append_is_taken_back(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:50])
            raise OSError("disk full")

    path = tmp_path / "a.mp4"
    with VideoWriter(path, 16, 48, 64, growing=True) as writer:
        writer.write(waves(5))
        before = path.read_bytes()
        with monkeypatch.context() as m, pytest.raises(OSError, match="disk full"):
            m.setattr("jdit.video_writer.open", Full, raising=False)
            writer.write(waves(3))
        assert path.read_bytes() == before
        writer.write(waves(7)[5:])
    assert far(video.video(path).frames, waves(7)) < 2.5


def test_resampling():
    frames = np.arange(10)
    assert video.resample(frames, 24, 24).tolist() == list(range(10))
    assert video.resample(frames, 30, 15).tolist() == [0, 2, 4, 6, 8]
    assert video.resample(frames, 24, 16).tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert video.resample(frames[:3], 10, 20).tolist() == [0, 1, 1, 2, 2, 2]
    assert len(video.resample(np.zeros(300), 29.97, 16)) == round(300 * 16 * 1001 / 30000)
    assert video.resample(frames[:1], 30, 1).tolist() == [0]
    assert video.spread(frames, 4).tolist() == [0, 3, 6, 9] and video.spread(frames, 1).tolist() == [0]
    assert video.spread(frames[:2], 4).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="num_frames=0"):
        video.spread(frames, 0)


def test_rates():
    for fps, exact in [(23.976, "24000/1001"), (23.98, "24000/1001"), (29.97, "30000/1001"), (59.94, "60000/1001")]:
        assert video.as_fps(fps) == video.as_fps(np.float32(fps)) == Fraction(exact)
    for fps in (8, 16, 24, 25.0, 12.5, Fraction(7, 3), 0.5):
        assert video.as_fps(fps) == fps
