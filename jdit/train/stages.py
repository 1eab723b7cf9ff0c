"""A recipe of several runs: one after another, each from where it stands, then the export."""

import argparse
import logging
import shutil
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

from jdit.train import run
from jdit.train.export import Layout, export
from jdit.train.loop import RESULT, checkpoints

log = logging.getLogger("jdit")


class Recipe(NamedTuple):
    """name: of the recipe and its runs' folder. layout: the stages and what each gives, see `jdit.train.export`.

    needs: config keys of a stage, and the stage whose folder each names.
    """

    name: str
    layout: Layout
    needs: dict[str, dict[str, str]]

    @property
    def stages(self) -> tuple[str, ...]:
        """In the order in which they run."""
        return tuple(dict.fromkeys(self.layout.parts.values()))

    def parts(self, stage: str) -> list[str]:
        """The components that a stage gives."""
        return [p for p, s in self.layout.parts.items() if s == stage]


def pack(recipe: Recipe, work: Path, to: Path) -> None:
    """A .tar of each stage's result, its log and its last sample sheet."""
    to.mkdir(parents=True, exist_ok=True)
    for stage in recipe.stages:
        folder = work / stage
        if any((folder / p).is_dir() for p in recipe.parts(stage)):
            with tarfile.open(to / f"{stage}.tar", "w") as tar:
                for name in (*recipe.parts(stage), RESULT, "config.json", "log.txt"):
                    if (folder / name).exists():
                        tar.add(folder / name, f"{stage}/{name}")
        if sheets := sorted((folder / "sheets").glob("*.png")):
            shutil.copy(sheets[-1], to / f"{stage}.png")
    logs = [f"== {s}\n{(work / s / 'log.txt').read_text()}" for s in recipe.stages if (work / s / "log.txt").is_file()]
    (to / "log.txt").write_text("\n".join(logs))


def unpack(recipe: Recipe, source: Path, work: Path) -> None:
    """Put packed stages into a work folder; what is already there stays."""
    for stage in recipe.stages:
        if (tar := source / f"{stage}.tar").is_file() and not (work / stage).exists():
            with tarfile.open(tar) as archive:
                archive.extractall(work, filter="data")


def train_stage(
    recipe: Recipe, stage: str, work: Path, overrides: list[str], minutes: float | None, stop_after: float
) -> bool:
    """Run or resume one stage; whether it is finished. Without a checkpoint it starts from unpacked weights, if any."""
    folder = work / stage
    if (folder / RESULT).is_file():
        return True
    settings = [f'run.folder="{folder}"', f"run.stop_after={stop_after}"]
    settings += [f'{key}="{work / other}"' for key, other in recipe.needs.get(stage, {}).items()]
    nets = [p for p in recipe.parts(stage) if not p.startswith("tokenizer") and (folder / p).is_dir()]
    if recipe.needs.get(stage) and nets and not checkpoints(folder):
        for part in nets:
            shutil.copytree(folder / part, folder / "start" / part, dirs_exist_ok=True)
        settings.append(f'init="{folder / "start"}"')
    return run(f"{recipe.name}/{stage}", [*settings, *overrides], minutes=minutes, resume=True).finished


def main(recipe: Recipe, doc: str | None) -> None:
    """The recipe's command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs") / recipe.name)
    parser.add_argument("--stages", nargs="+", choices=recipe.stages, default=recipe.stages)
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
        unpack(recipe, args.unpack, args.work)
    finished = True
    try:
        for stage in args.stages:
            left = args.stop_after - (time.monotonic() - start) / 60 if args.stop_after else 0.0
            if args.stop_after and left < 0.2:
                finished = False
                break
            finished = train_stage(recipe, stage, args.work, args.overrides, args.minutes, left)
            if not finished:
                break
    finally:
        if args.pack:
            pack(recipe, args.work, args.pack)
    if args.out and finished:
        folders = {s: args.work / s for s in recipe.stages}
        log.info("wrote %s", export(folders, args.out, layout=recipe.layout, overwrite=True))
