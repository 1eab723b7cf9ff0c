"""Pictures in and out."""

import numpy as np
import pytest
from PIL import Image

from jdit import media


def draw(b=1, h=20, w=30):
    return np.random.default_rng(0).integers(0, 255, (b, h, w, 3), np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".gif"])
def test_save(tmp_path, suffix):
    (path,) = media.save(draw(), tmp_path / f"a{suffix}")
    back = media.picture(path)
    assert back.shape == (20, 30, 3)
    if suffix == ".png":
        np.testing.assert_array_equal(back, draw()[0])
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


def test_several_get_numbers(tmp_path):
    assert [p.name for p in media.save(draw(3), tmp_path / "a.png")] == ["a-0.png", "a-1.png", "a-2.png"]


def test_float_pixels_are_rounded(tmp_path):
    (path,) = media.save(draw() / np.float32(255), tmp_path / "a.png")
    np.testing.assert_array_equal(media.picture(path), draw()[0])


def test_targets_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"unknown suffix '.tif'; there are .png"):
        media.check_target(tmp_path / "a.tif")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        media.check_target(tmp_path / "no" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(IsADirectoryError):
        media.check_target(tmp_path / "b.png")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        media.save(draw(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanished_is_named(tmp_path):
    """While the picture was being made."""
    with pytest.raises(FileNotFoundError, match=r"gone/a\.png cannot be written: No such file"):
        media.write(Image.new("RGB", (2, 2)), tmp_path / "gone" / "a.png")


def test_pictures_that_are_none(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="not a picture"):
        media.picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no picture at"):
        media.picture(tmp_path / "b.png")
    (path,) = media.save(draw(), tmp_path / "a.gif")
    whole = path.read_bytes()
    for n in (20, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"a\.gif is not a picture"):
            media.picture(path)
    with pytest.raises(ValueError, match=r"uint8 array \(H, W, 3\), not float64 \(2, 2\)"):
        media.picture(np.zeros((2, 2)))


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (media.picture(clear) == 255).all()


def test_transparency_is_kept(tmp_path):
    """Where it is asked for; what has none is opaque."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (pixels, Image.fromarray(pixels), tmp_path / "a.png"):
        np.testing.assert_array_equal(media.picture(source, alpha=True), pixels)
    opaque = np.dstack([pixels[..., :3], np.full((5, 6), 255, np.uint8)])
    for source in (pixels[..., :3], Image.fromarray(pixels[..., :3])):
        np.testing.assert_array_equal(media.picture(source, alpha=True), opaque)
    with pytest.raises(ValueError, match=r"\(H, W, 3\) or \(H, W, 4\), not uint8 \(5, 6\)"):
        media.picture(pixels[..., 0], alpha=True)


def test_photos_are_turned(tmp_path):
    """Orientation 6 of EXIF: the first row is the right-hand side, as cameras write portraits."""
    image = Image.fromarray(draw()[0])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(media.picture(tmp_path / "a.png"), np.rot90(draw()[0], -1))


def test_contact_sheet():
    sheet = media.contact_sheet(draw(5, 32, 32), ["one", "a caption that is much too long for its picture"])
    assert sheet.size == (3 * 40 + 8, 2 * (32 + 16 + 8) + 8)
    np.testing.assert_array_equal(np.asarray(sheet)[8:40, 8:40], draw(5, 32, 32)[0])
