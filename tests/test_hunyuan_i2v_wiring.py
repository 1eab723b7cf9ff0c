"""Every full-size picture to video of HunyuanVideo: its stages fit together (shapes by eval_shape); its numbers of
frames."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from convert import registry
from jdit import sharding, zoo
from jdit.pipeline.base import Parts
from jdit.pipeline.executor import Weights, check_wiring
from jdit.pipeline.hunyuan_i2v import HunyuanVideoFromPicture
from jdit.structs import Text

pytestmark = pytest.mark.slow

NAMES = [n for n, v in zoo.VARIANTS.items() if v.family == "hunyuan-video-i2v"]
TOKENS = {"hunyuan-video-i2v": 144 + 252, "hunyuan-video-i2v-33ch": 288 + 252}
FRAMES = {"hunyuan-video-i2v": 129, "hunyuan-video-i2v-33ch": 125}


def dry(name: str, dtype: str = "float32") -> HunyuanVideoFromPicture:
    v = zoo.VARIANTS[name]
    configs = {n: dataclasses.replace(c, dtype=dtype) for n, c in v.components.items()}
    parts = Parts(v.family, name, configs, {}, v.scheduler, v.plan, {})
    assert not HunyuanVideoFromPicture.misfits(parts)
    return HunyuanVideoFromPicture(parts, Weights({}))


def module(cfg):
    return sharding.described(registry.of_config(cfg).make(cfg))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_full_size(name):
    variant, pipe = zoo.VARIANTS[name], dry(name)
    modules = {n: module(c) for n, c in variant.components.items()}
    (height, width), count = pipe.size(), TOKENS[name]
    assert (height, width, pipe.frames()) == (720, 1280, 129)
    encode, *stages = pipe.usual_stages()
    given = {
        "tokens": array(1, 934, dtype="int32"), "seen": array(1, count, dtype="int32"), "pixels": array(1, 336, 336, 3),
        "which": array(1, dtype="int32"), "lengths": array(1, dtype="int32"), "clip_ids": array(1, 77, dtype="int32"),
    }  # fmt: skip
    encoded: Text = check_wiring([encode], modules, given)["encoded"]
    assert (encoded.states.shape, encoded.pooled.shape) == ((1, count, 4096), (1, 768))
    embedded = array() if variant.components["transformer"].guidance else None
    values = {
        "positive": encoded, "negative": None, "table": pipe.table(variant.plan.steps), "keys": None, "guidance": None,
        "noise": array(1, 33, 90, 160, 16), "embedded": embedded, "two_passes": False, "report": False,
        "output": "uint8", "vae_tiling": True, "vae_slicing": False, "report_frames": False, "modulation": None,
        "image": array(1, height, width, 3, dtype="uint8"), "concat": name.endswith("33ch"),
    }  # fmt: skip
    out = check_wiring(stages, modules, values)
    assert out["latents"].shape == (1, 33, 90, 160, 16)
    assert out["pixels"].shape == (1, FRAMES[name], height, width, 3) and out["pixels"].dtype == jnp.uint8
    channels, first = out["picture"]
    assert (channels if first is None else first).shape == (
        1,
        *((33, 90, 160, 17) if first is None else (1, 90, 160, 16)),
    )
    assert pipe._text_tokens == count and 1e9 < dry(name, "bfloat16").activations() < 60e9


def test_frames():
    """Of "latent_concat" the first four are not shown."""
    for name in NAMES:
        pipe = dry(name)
        with pytest.raises(ValueError, match="num_frames=48 does not work, 45 or 49 would"):
            pipe.frames(48)
        assert pipe.frames(5) == 5
    with pytest.raises(ValueError, match="num_frames=1 does not work, 5 would: this model leaves out the first 4"):
        dry("hunyuan-video-i2v-33ch").frames(1)
    assert dry("hunyuan-video-i2v").frames(1) == 1


def test_told_apart():
    for name in NAMES:
        assert zoo.recognise(zoo.VARIANTS[name].components, "model", "hunyuan-video-i2v") == name
