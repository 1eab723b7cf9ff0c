"""Train fluent-image: the stages one after another, each from where it stands, and the export.

    python -m jdit.train.recipes.fluent_image.run --work runs/fluent-image --out fluent-image

A stage whose result is there is passed over, one that was stopped goes on from its checkpoint. With --pack, results
travel as one .tar a stage; --unpack puts them back on another machine, where an unfinished MMDiT starts from its
averaged weights.
"""

import argparse
import logging
import shutil
import tarfile
import time
from pathlib import Path

from jdit.train import run
from jdit.train.export import PARTS, export
from jdit.train.loop import RESULT, checkpoints

log = logging.getLogger("jdit")

STAGES = ("vae", "text", "mmdit")


def pack(work: Path, to: Path) -> None:
    """A .tar of each stage's result, its log and its last sample sheet."""
    to.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        folder = work / stage
        parts = [p for p, s in PARTS.items() if s == stage and (folder / p).is_dir()]
        if parts:
            with tarfile.open(to / f"{stage}.tar", "w") as tar:
                for name in (*parts, RESULT, "config.json", "log.txt"):
                    if (folder / name).exists():
                        tar.add(folder / name, f"{stage}/{name}")
        if sheets := sorted((folder / "sheets").glob("*.png")):
            shutil.copy(sheets[-1], to / f"{stage}.png")
    logs = [f"== {s}\n{(work / s / 'log.txt').read_text()}" for s in STAGES if (work / s / "log.txt").is_file()]
    (to / "log.txt").write_text("\n".join(logs))


def unpack(source: Path, work: Path) -> None:
    """Put packed stages into a work folder; what is already there stays."""
    for stage in STAGES:
        if (tar := source / f"{stage}.tar").is_file() and not (work / stage).exists():
            with tarfile.open(tar) as archive:
                archive.extractall(work, filter="data")


def train_stage(stage: str, work: Path, overrides: list[str], minutes: float | None, stop_after: float) -> bool:
    """Run or resume one stage; whether it is finished."""
    folder = work / stage
    if (folder / RESULT).is_file():
        return True
    settings = [f'run.folder="{folder}"', f"run.stop_after={stop_after}"]
    if stage == "mmdit":
        settings += [f'vae="{work / "vae"}"', f'text="{work / "text"}"']
        if (folder / "transformer").is_dir() and not checkpoints(folder):
            start = folder / "start"
            shutil.copytree(folder / "transformer", start, dirs_exist_ok=True)
            settings.append(f'init="{start}"')
    return run(f"fluent-image/{stage}", [*settings, *overrides], minutes=minutes, resume=True).finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/fluent-image"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--minutes", type=float, help="length of each of these stages, instead of the recipe's")
    parser.add_argument("--stop-after", type=float, default=0.0, help="minutes after which this call saves and stops")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="write the finished pipeline here, as a diffusers folder")
    parser.add_argument("--pack", type=Path, help="write the results here, one .tar a stage")
    parser.add_argument("--unpack", type=Path, help="first take results packed earlier from here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    start = time.monotonic()
    if args.unpack:
        unpack(args.unpack, args.work)
    finished = True
    try:
        for stage in args.stages:
            left = args.stop_after - (time.monotonic() - start) / 60 if args.stop_after else 0.0
            if args.stop_after and left < 0.2:
                finished = False
                break
            finished = train_stage(stage, args.work, args.overrides, args.minutes, left)
            if not finished:
                break
    finally:
        if args.pack:
            pack(args.work, args.pack)
    if args.out and finished:
        log.info("wrote %s", export({s: args.work / s for s in STAGES}, args.out, overwrite=True))


if __name__ == "__main__":
    main()
