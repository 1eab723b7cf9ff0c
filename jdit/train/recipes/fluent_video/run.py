"""Train fluent-video: the autoencoder, the transformer with its text encoder, and the export.

    python -m jdit.train.recipes.fluent_video.run --work runs/fluent-video --out fluent-video

A stage whose result is there is passed over, one that was stopped goes on from its checkpoint. With --pack, results
travel as one .tar a stage; --unpack puts them back on another machine, where an unfinished transformer starts from its
averaged weights.
"""

from jdit.train.export import WAN
from jdit.train.stages import Recipe, main

RECIPE = Recipe("fluent-video", WAN, {"wan": {"vae": "vae"}})

if __name__ == "__main__":
    main(RECIPE, __doc__)
