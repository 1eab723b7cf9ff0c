"""Train fluent-image: the stages one after another, each from where it stands, and the export.

    python -m jdit.train.recipes.fluent_image.run --work runs/fluent-image --out fluent-image

A stage whose result is there is passed over, one that was stopped goes on from its checkpoint. With --pack, results
travel as one .tar a stage; --unpack puts them back on another machine, where an unfinished MMDiT starts from its
averaged weights.
"""

from jdit.train.export import SD3
from jdit.train.stages import Recipe, main

RECIPE = Recipe("fluent-image", SD3, {"mmdit": {"vae": "vae", "text": "text"}})

if __name__ == "__main__":
    main(RECIPE, __doc__)
