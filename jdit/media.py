"""Pictures in and out of arrays (Pillow). H W pixel rows and columns, L layers; RGB or RGBA, uint8."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
MOVIES = {".mp4": "mp4", ".mov": "mov"}
ANIMATIONS = (*MOVIES, ".gif", ".webp")
Picture = np.ndarray | Image.Image | str | Path


def opened(path: str | Path) -> Image.Image:
    """A file's picture, read whole and turned as its EXIF orientation says.

    Raises:
        ValueError: a file that is no picture. FileNotFoundError: no such file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as e:  # Pillow's parsers raise anything when bytes are missing
        raise ValueError(f"{path} is not a picture that Pillow reads: {e}") from None


def picture(source: Picture, *, alpha: bool = False) -> np.ndarray:
    """A picture as uint8 (H, W, 3), from an array, a PIL image or a path. Transparency is laid on white, or with
    `alpha` kept: (H, W, 4), opaque where a picture has none.

    Raises:
        ValueError: an array of another shape or dtype, or a file that is no picture. FileNotFoundError: no such file.
    """
    if isinstance(source, str | Path):
        source = opened(source)
    if isinstance(source, Image.Image) and alpha:
        return np.asarray(source.convert("RGBA"))
    if isinstance(source, Image.Image):
        if source.mode in ("RGBA", "LA", "PA") or "transparency" in source.info:
            rgba = source.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            source = Image.alpha_composite(white, rgba)
        return np.asarray(source.convert("RGB"))
    array = np.asarray(source)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in ((3, 4) if alpha else (3,)):
        shapes = f"(H, W, 3){' or (H, W, 4)' * alpha}"
        raise ValueError(f"a picture is a uint8 array {shapes}, not {array.dtype} {array.shape}")
    if alpha and array.shape[-1] == 3:
        return np.concatenate([array, np.full_like(array[..., :1], 255)], -1)
    return array


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lanczos to (height, width), aspect not kept: what upstream's image processor does before encoding."""
    if array.shape[:2] == (height, width):
        return array
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS))


def as_uint8(pixels: np.ndarray) -> np.ndarray:
    """uint8 as it is; float in [0, 1] rounded to it."""
    if pixels.dtype == np.uint8:
        return pixels
    return np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def check_target(
    path: str | Path, formats: Sequence[str] | None = None, *, num_frames: int | None = None, layers: bool = False
) -> Path:
    """The path, if something can be written there: a picture, or `layers` of one, a video of `num_frames`, or one of
    `formats`.

    Raises:
        ValueError: an unknown suffix. OSError: the folder is missing or not writable.
    """
    if formats is None:
        formats = tuple({None: FORMATS, 1: MOVIES | FORMATS}.get(num_frames, ANIMATIONS))
    path = Path(path)
    if layers and path.suffix.lower() != ".png":
        raise ValueError(f"{path}: layers have transparency, they are written as .png")
    if path.suffix.lower() not in formats:
        what = "unknown suffix" if path.suffix.lower() not in FORMATS | MOVIES or num_frames is None else "no video is"
        raise ValueError(f"{path}: {what} {path.suffix!r}; there are {', '.join(formats)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} is not writable")
    return path


def save(pixels: np.ndarray, path: str | Path, *, fps: float | None = None) -> list[Path]:
    """Write (B, H, W, 3) as B pictures: `path` itself for one, NAME-0.png, NAME-1.png and so on for several; or layers
    (B, L, H, W, 4) as L such files for each of the B (NAME-0-0.png, NAME-0-1.png and so on for several)."""
    layers = pixels.ndim == 5 and pixels.shape[-1] == 4
    if pixels.ndim != 4 and not layers:
        raise ValueError(f"pictures are (B, H, W, 3), or layers (B, L, H, W, 4), not {pixels.shape}")
    path, pixels = check_target(path, layers=layers), as_uint8(np.asarray(pixels))
    del fps  # pictures have none
    names = numbered(path, len(pixels))
    if layers:
        names = [layer for name in names for layer in numbered(name, pixels.shape[1])]
    for name, frame in zip(names, pixels.reshape(-1, *pixels.shape[-3:])):
        write(Image.fromarray(frame), name)
    return names


def numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one, NAME-0.png, NAME-1.png and so on for several."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def write(image: Image.Image, path: Path, **options):
    """Write beside the place and rename, so that no half file stands. `options` are Pillow's."""
    suffix = path.suffix.lower()
    options = ({} if suffix == ".png" else {"quality": 95}) | options
    with beside(path) as partial:
        image.save(partial, FORMATS[suffix], **options)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that becomes `path` when the block ends, and vanishes if it raises (Ctrl-C too)."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as e:
        raise type(e)(f"{path} cannot be written: {e.strerror}") from e
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def contact_sheet(pixels: np.ndarray, captions: Sequence[str] = (), *, columns: int | None = None) -> Image.Image:
    """All pictures (B, H, W, 3) on one sheet, each over its caption."""
    pixels = as_uint8(np.asarray(pixels))
    b, h, w, _ = pixels.shape
    across = columns or min(b, max(1, round(b**0.5 + 0.49)))
    line = 16 if captions else 0
    sheet = Image.new("RGB", (across * (w + 8) + 8, -(-b // across) * (h + line + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, frame in enumerate(pixels):
        x, y = 8 + (i % across) * (w + 8), 8 + (i // across) * (h + line + 8)
        sheet.paste(Image.fromarray(frame), (x, y))
        if i < len(captions):
            draw.text((x, y + h + 2), _fit_text(draw, captions[i], w), fill="black")
    return sheet


def _fit_text(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
