"""What drives fluent-animate: of a clip of one character, the drawing of its outlines and the crop of its head.

    python -m jdit.train.drive data/fluent_video/1f3cc-200d-2640.avif driving

Writes pose.png and face.png: strips, the frames one under another, as `jdit generate` takes them for pose and face.

The pose video must say how a figure moves and not who it is. A clip in grey would still give the skin's and the
clothes' shades, a silhouette loses arms before a body. Outlines of log luminance keep both: a darker skin multiplies
the light of a surface, which moves its logarithm and leaves its differences, and a saturating curve makes weak and
strong borders alike. Hair and clothes are still outlined, but what colour they have, and in a pair of unlike characters
what shape, only the reference says. The face video is the head in grey: a few numbers a frame pass the motion encoder.

N clips, T frames of S x S pixels on white, F pixels of a side of a face.
"""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

BLACK, BORDER = 0.05, 0.25
"""Luminance that is added before the logarithm; difference of logarithms that gives half of full black."""
HEAD, FULL = 0.5, 0.7
"""Side of the head's square as a share of the figure's height; a figure that fills this share of its box is a head."""


def luminance(frames: UInt8[np.ndarray, "*N S S 3"]) -> Float[np.ndarray, "*N S S"]:
    """Rec. 601 luma in [0, 1]."""
    return frames @ np.asarray([0.299, 0.587, 0.114], np.float32) / 255


def drawing(frames: UInt8[np.ndarray, "*N S S 3"]) -> UInt8[np.ndarray, "*N S S 3"]:
    """Outlines, black on white."""
    log = np.log(BLACK + luminance(frames))
    edge = ((0, 0),) * (log.ndim - 2)
    down = np.diff(np.pad(log, (*edge, (0, 1), (0, 0)), mode="edge"), axis=-2)
    right = np.diff(np.pad(log, (*edge, (0, 0), (0, 1)), mode="edge"), axis=-1)
    strength = down**2 + right**2
    grey = np.round(255 * BORDER**2 / (BORDER**2 + strength)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


def figure(frames: UInt8[np.ndarray, "*N S S 3"]) -> Bool[np.ndarray, "*N S S"]:
    """What is not white."""
    return frames.min(-1) < 240


def heads(frames: UInt8[np.ndarray, "T S S 3"], size: int) -> UInt8[np.ndarray, "T F F 3"]:
    """The head in grey: a square at the top of the figure, sized by its height over the whole clip."""
    here = figure(frames)
    if not here.any():
        return np.full((len(frames), size, size, 3), 255, np.uint8)
    (top, bottom), (left, right) = ((i[0], i[-1] + 1) for i in (np.flatnonzero(here.any((0, a))) for a in (2, 1)))
    full = here[:, top:bottom, left:right].mean() >= FULL
    side = max((1 if full else HEAD) * (bottom - top), 4)
    out = []
    for frame, mask in zip(frames, here):
        top = int(mask.any(1).argmax())
        columns = np.flatnonzero(mask[top : top + int(np.ceil(side / 2))].any(0))
        centre = (columns[0] + columns[-1] + 1) / 2 if len(columns) else frame.shape[1] / 2
        box = (centre - side / 2, top - 1, centre + side / 2, top - 1 + side)
        grey = Image.fromarray(255 - np.round(255 * luminance(frame)).astype(np.uint8))  # outside is then white
        corner = (size, size)
        out.append(255 - np.asarray(grey.transform(corner, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)))
    return np.repeat(np.stack(out)[..., None], 3, -1)


def main() -> None:
    from jdit.train.clips import load_whole

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--face", type=int, default=32, help="motion_encoder_size of the model")
    args = parser.parse_args()
    frames = load_whole(args.clip, args.size)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, video in (("pose", drawing(frames)), ("face", heads(frames, args.face))):
        Image.fromarray(video.reshape(-1, *video.shape[2:])).save(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
