"""A recipe of several runs: one after another, each from where it stands, then the export."""

import io
import logging
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

from jdit.load import ASSETS
from jdit.train import portable, run
from jdit.train.export import Layout, export
from jdit.train.loop import RESULT

log = logging.getLogger("jdit")

PART = 15 * 2**20
"""Largest file that `pack` writes, in bytes."""


class Recipe(NamedTuple):
    """name: of the recipe and its runs' folder. layout: the stages and what each gives, see `jdit.train.export`.

    needs: config keys of a stage, and the stage whose folder each names. A stage of another recipe is called
    "recipe/stage"; its folder is looked for beside this recipe's work folder, and is neither run nor packed here. Where
    it is not there, the bundled model that the recipe made stands for it.
    """

    name: str
    layout: Layout
    needs: dict[str, dict[str, str]]

    @property
    def stages(self) -> tuple[str, ...]:
        """Those of this recipe, in the order in which they run."""
        return tuple(dict.fromkeys(s for s in self.layout.parts.values() if "/" not in s))

    def parts(self, stage: str) -> list[str]:
        """The components that a stage gives."""
        return [p for p, s in self.layout.parts.items() if s == stage]

    def folder(self, work: Path, stage: str) -> Path:
        """Where a stage's run is, or the bundled model that stands for it."""
        if "/" not in stage:
            return work / stage
        run, bundled = work.parent / stage, ASSETS / stage.partition("/")[0]
        return run if run.exists() or not bundled.is_dir() else bundled


def pack(recipe: Recipe, work: Path, to: Path) -> list[Path]:
    """All results, logs and last sample sheets, and of an unfinished stage the portable checkpoint: one archive in
    parts of at most `PART` bytes, and log.txt."""
    to.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for stage in recipe.stages:
            folder = work / stage
            names = [RESULT, "config.json", "log.txt"]
            if (folder / RESULT).is_file():
                names += recipe.parts(stage)
            elif (folder / portable.FILE).is_file():
                names += [portable.FILE, *(p for p in recipe.parts(stage) if p.startswith("tokenizer"))]
            names += [f"sheets/{p.name}" for p in sorted((folder / "sheets").glob("*.png"))[-1:]]
            for name in names:
                if (folder / name).exists():
                    tar.add(folder / name, f"{stage}/{name}")
    for old in to.glob("results.tar.*"):
        old.unlink()
    data, out = archive.getbuffer(), []
    for n, start in enumerate(range(0, len(data), PART)):
        out.append(to / f"results.tar.{n:02d}")
        out[-1].write_bytes(data[start : start + PART])
    logs = [f"== {s}\n{(work / s / 'log.txt').read_text()}" for s in recipe.stages if (work / s / "log.txt").is_file()]
    (to / "log.txt").write_text("\n".join(logs))
    log.info("packed %.1f MiB in %d parts in %s", len(data) / 2**20, len(out), to)
    return out


def unpack(recipe: Recipe, source: Path, work: Path) -> None:
    """Put packed stages into a work folder; a stage that is already there stays.

    Raises:
        ValueError: nothing to unpack.
    """
    parts = sorted(source.glob("results.tar.*"))
    if not parts:
        raise ValueError(f"{source}: no results.tar.00 there, as --pack writes it")
    there = {s for s in recipe.stages if (work / s).exists()}
    work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(p.read_bytes() for p in parts))) as archive:
        members = [m for m in archive.getmembers() if m.name.partition("/")[0] not in there]
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it from 3.11.4 on
        archive.extractall(work, members)


def train_stage(
    recipe: Recipe, stage: str, work: Path, overrides: list[str], minutes: float | None, stop_after: float
) -> bool:
    """Run or resume one stage; whether it is finished.

    Raises:
        ValueError: a stage that it needs is not finished.
    """
    folder = work / stage
    if (folder / RESULT).is_file():
        return True
    settings = [f'run.folder="{folder}"', f"run.stop_after={stop_after}", "run.portable=true"]
    for key, other in recipe.needs.get(stage, {}).items():
        source = recipe.folder(work, other)
        if not (source / RESULT).is_file() and source.parent != ASSETS:
            raise ValueError(f"{recipe.name}/{stage} needs {other} first: {source / RESULT} is missing")
        settings.append(f'{key}="{source}"')
    return run(f"{recipe.name}/{stage}", [*settings, *overrides], minutes=minutes, resume=True).finished


def run_stages(
    recipe: Recipe, work: Path, stages: tuple[str, ...], *, minutes: float | None = None, stop_after: float = 0.0,
    overrides: list[str] | None = None,
) -> bool:  # fmt: skip
    """Run stages one after another for at most `stop_after` minutes (0: without end); whether all are finished."""
    start = time.monotonic()
    for stage in stages:
        left = stop_after - (time.monotonic() - start) / 60 if stop_after else 0.0
        if stop_after and left < 0.2 and not (work / stage / RESULT).is_file():
            return False
        if not train_stage(recipe, stage, work, overrides or [], minutes, left):
            return False
    return True


def finish(recipe: Recipe, work: Path, out: Path) -> Path:
    """The finished pipeline as a diffusers folder."""
    folders = {s: recipe.folder(work, s) for s in dict.fromkeys(recipe.layout.parts.values())}
    return export(folders, out, layout=recipe.layout, overwrite=True)
