"""Every full-size Qwen-Image: its stages fit together (shapes by eval_shape), and its weights into a plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import registry
from jdit import sharding, zoo
from jdit.pipeline import memory
from jdit.pipeline.base import Parts
from jdit.pipeline.executor import Weights, check_wiring
from jdit.pipeline.families import PIPELINES
from jdit.sharding import count
from jdit.structs import Text

pytestmark = pytest.mark.slow

SIZES = {
    "qwen-image": (1328, 1328), "qwen-image-edit": (832, 1248), "qwen-image-edit-2509": (832, 1248),
    "qwen-image-edit-2511": (832, 1248), "qwen-image-layered": (512, 768),
}  # fmt: skip


def dry(name: str):
    v = zoo.VARIANTS[name]
    parts, pipeline = Parts(v.family, name, v.components, {}, v.scheduler, v.plan, {}), PIPELINES[v.family]
    assert not pipeline.misfits(parts)
    return pipeline(parts, Weights({}))


def module(cfg):
    return sharding.described(registry.of_config(cfg).make(cfg))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", SIZES)
def test_full_size(name):
    variant, pipe = zoo.VARIANTS[name], dry(name)
    configs = dict(variant.components) | PIPELINES[variant.family].reduced(variant.components)
    modules, editing, layered = {n: module(c) for n, c in configs.items()}, "edit" in name, "layered" in name
    image, channels = np.zeros((800, 1200, 3), np.uint8), 4 if layered else 3  # 2 : 3
    height, width = pipe.run_size({"image": image})
    assert (height, width) == SIZES[name]
    size, latent = (height, width), (1, height // 8, width // 8, 16)
    made = (1, 5, *latent[1:]) if layered else latent
    values = {
        "tokens": array(2, 500, dtype=jnp.int32), "lengths": array(2, dtype=jnp.int32), "drop": pipe.template.drop,
        "positions": array(2, 500, 3, dtype=jnp.int32) if editing else None,
        "prompt_pictures": (array(1, 280, 420, 3),) * editing,
    }  # fmt: skip
    first, *rest = pipe.usual_stages()
    encoded: Text = check_wiring([first], modules, values)["encoded"]
    assert encoded.states.shape == (2, 500 - pipe.template.drop, 3584) and encoded.lengths.shape == (2,)
    text = Text(array(1, 436, 3584), lengths=array(1, dtype=jnp.int32))
    values = {
        "positive": text, "negative": text, "table": pipe.table(*size, variant.plan.steps), "noise": array(*made),
        "clean": None, "pictures": (), "mask": None, "guidance": array(), "keys": None, "two_passes": False,
        "cfg_normalize": True, "report": False, "output": "uint8", "vae_tiling": False, "vae_slicing": False,
        "image_keys": None,
        "image": array(1, *size, 3, dtype=jnp.uint8), "images": (array(1, *size, channels, dtype=jnp.uint8),) * 2,
    }  # fmt: skip
    out = check_wiring(rest, modules, values)
    assert out["latents"].shape == made
    assert out["pixels"].shape == (*(1, 4)[: 1 + layered], *size, channels) and out["pixels"].dtype == jnp.uint8
    assert [z.shape for z in out["pictures"]] == [latent] * (2 * (editing or layered))


def test_memory():
    """57 GB do not fit into 80 beside the activations unless the text encoder waits for its stage."""
    pipe, sizes = dry("qwen-image"), {}
    for name, cfg in zoo.VARIANTS["qwen-image"].components.items():
        sizes[name] = 2 * count(registry.of_config(cfg).make(cfg))
    assert 40e9 < sizes["transformer"] < 42e9 and 15e9 < sizes["text_encoder"] < 17e9
    assert 2e9 < pipe.activations() < 20e9
    decoded = 4 * 640**2 / 1328**2  # all layers at once, to one picture
    assert np.isclose(dry("qwen-image-layered").activations() / pipe.activations(), decoded)
    plan = memory.plan(pipe.usual_stages(), sizes, 50e9)
    assert plan.fits and "text_encoder" in plan.waiting and plan.peak < 42e9
