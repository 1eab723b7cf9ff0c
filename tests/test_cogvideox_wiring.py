"""Every full-size CogVideoX: its stages fit together (shapes by eval_shape); sizes and frames that are taken."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from convert import registry
from jdit import sharding, zoo
from jdit.pipeline.base import Parts
from jdit.pipeline.cogvideox import TEXT, CogVideoXVideo, stages
from jdit.pipeline.executor import Weights, check_wiring
from jdit.structs import Text

pytestmark = pytest.mark.slow

NAMES = [n for n, v in zoo.VARIANTS.items() if v.family == "cogvideox"]
LATENTS = {n: (13, 60, 90, 16) if "1.5" not in n else (22, 96, 170, 16) for n in NAMES}
PIXELS = {n: (49, 480, 720, 3) if "1.5" not in n else (81, 768, 1360, 3) for n in NAMES}


def dry(name: str, dtype: str = "float32") -> CogVideoXVideo:
    v = zoo.VARIANTS[name]
    configs = {n: dataclasses.replace(c, dtype=dtype) for n, c in v.components.items()}
    parts = Parts(v.family, name, configs, {}, v.scheduler, v.plan, {})
    assert not CogVideoXVideo.misfits(parts)
    return CogVideoXVideo(parts, Weights({}))


def module(cfg):
    return sharding.described(registry.of_config(cfg).make(cfg))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_activations_are_about_what_was_measured():
    """benchmarks/cogvideox_h100.md: the decode's peak less the autoencoder's weights, which is above the steps'."""
    assert dry("cogvideox-5b", "bfloat16").activations() == pytest.approx(12.8e9 - 0.43e9, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_full_size(name):
    variant, pipe = zoo.VARIANTS[name], dry(name)
    modules = {n: module(c) for n, c in variant.components.items()}
    frames, (height, width) = pipe.frames(), pipe.size()
    assert (frames, height, width, 3) == PIXELS[name]
    encoded: Text = check_wiring([TEXT], modules, {"ids": array(2, 226, dtype=jnp.int32)})["encoded"]
    assert encoded.states.shape == (2, 226, 4096)
    table, text = pipe.table(variant.plan.steps), Text(array(1, 226, 4096))
    values = {
        "positive": text, "negative": text, "table": table, "noise": array(1, *LATENTS[name]), "clean": None,
        "first": None, "guidance": array(50), "keys": None, "two_passes": False, "report": False, "output": "uint8",
        "extra": LATENTS[name][0] % 2 ^ 1, "vae_tiling": False, "vae_slicing": False, "report_frames": False,
        "posterior_keys": None, "image": array(1, height, width, 3, dtype=jnp.uint8),
    }  # fmt: skip
    out = check_wiring(pipe.usual_stages()[1:], modules, values)
    assert out["latents"].shape == (1, *LATENTS[name])
    assert out["pixels"].shape == (1, *PIXELS[name]) and out["pixels"].dtype == jnp.uint8
    assert pipe.pictured == (out["first"] is not None) == name.endswith("i2v")
    assert 1e9 < dry(name, "bfloat16").activations() < 60e9
    if not pipe.pictured and "1.5" not in name:
        given = values | {"video": array(1, frames, height, width, 3, dtype=jnp.uint8)}
        assert check_wiring(stages(given="video", pixels=False), modules, given)["clean"].shape == (1, *LATENTS[name])


SIZES = {  # what does not work -> what is said
    ("cogvideox-5b", 488, 720): "height=488 does not work, 480 or 496 would",
    ("cogvideox-2b", 480, 8): "width=8 does not work, 16 would",
    ("cogvideox-5b-i2v", 480, 736): "480 x 736 pixels do not work: positions were learned for 480 x 720",
    ("cogvideox1.5-5b", 768, 2416): r"width=2416 does not work, 2400 would \(multiples of 16 up to 2400\)",
}  # fmt: skip


@pytest.mark.parametrize("name, height, width", SIZES)
def test_sizes(name, height, width):
    with pytest.raises(ValueError, match=SIZES[name, height, width]):
        dry(name).size(height, width)


def test_frames():
    """8 n + 1 frames, or 8 n: other numbers of latent frames become another number of frames than was asked for."""
    for name in ("cogvideox-5b", "cogvideox1.5-5b"):
        pipe = dry(name)
        assert [n for n in range(1, 40) if works(pipe.frames, n)] == [1, 8, 9, 16, 17, 24, 25, 32, 33]
        with pytest.raises(ValueError, match=r"num_frames=50 does not work, 49 or 56 would \(8 n \+ 1 or 8 n\)"):
            pipe.frames(50)
    latent = [dry(n)._latent(81) for n in ("cogvideox-5b", "cogvideox1.5-5b")]
    assert latent == [21, 22] and dry("cogvideox1.5-5b")._latent(80) == 20


def works(check, *arguments) -> bool:
    try:
        check(*arguments)
    except ValueError:
        return False
    return True
