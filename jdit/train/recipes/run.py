"""Train a recipe: its stages one after another, and the export.

    python -m jdit.train.recipes.run fluent-video --out fluent-video

A stage whose result is there is passed over, one that was stopped goes on from its checkpoint. --pack writes results
and, of a stage that is not finished, a small checkpoint, in parts of at most 15 MiB; --unpack puts them back on
another machine. `--stages` with nothing after it runs none: `--stages --pack DIR` packs a run while it goes on.
"""

import argparse
import logging
from pathlib import Path

from jdit.train.export import SD3, WAN, WAN_ANIMATE
from jdit.train.stages import Recipe, finish, pack, run_stages, unpack

RECIPES = {
    r.name: r
    for r in (
        Recipe("fluent-image", SD3, {"mmdit": {"vae": "vae", "text": "text"}}),
        Recipe("fluent-video", WAN, {"wan": {"vae": "vae"}}),
        Recipe("fluent-animate", WAN_ANIMATE, {"animate": {"vae": "fluent-video/vae", "text": "fluent-video/wan"}}),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--work", type=Path, help="folder of the runs; runs/RECIPE without it")
    parser.add_argument("--stages", nargs="*", help="all without it")
    parser.add_argument("--minutes", type=float, help="length of each of these stages, instead of the recipe's")
    parser.add_argument("--stop-after", type=float, default=0.0, help="minutes after which this call saves and stops")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="write the finished pipeline here, as a diffusers folder")
    parser.add_argument("--pack", type=Path, help="write results and checkpoints here, to be taken away")
    parser.add_argument("--unpack", type=Path, help="first take those packed earlier from here")
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    stages = recipe.stages if args.stages is None else tuple(args.stages)
    if unknown := sorted(set(stages) - set(recipe.stages)):
        parser.error(f"no stages {', '.join(unknown)}; {recipe.name} has {', '.join(recipe.stages)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    log, work = logging.getLogger("jdit"), args.work or Path("runs") / recipe.name
    if args.unpack:
        unpack(recipe, args.unpack, work)
    if stages:
        import jax  # a resumed stage finds its programs here

        jax.config.update("jax_compilation_cache_dir", str(work.absolute() / "compiled"))
    try:
        finished = run_stages(recipe, work, stages, minutes=args.minutes, stop_after=args.stop_after,
                              overrides=args.overrides)  # fmt: skip
    finally:
        if args.pack:
            pack(recipe, work, args.pack)
    if args.out and finished:
        log.info("wrote %s", finish(recipe, work, args.out))


if __name__ == "__main__":
    main()
