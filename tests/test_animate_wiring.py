"""Full-size Wan-Animate: its stages fit together, in a loop of programs and in one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from convert import registry
from jdit import sharding, zoo
from jdit.pipeline import executor, memory, wan_animate
from jdit.pipeline.animate_conditions import Segment, Tail
from jdit.pipeline.base import Parts
from jdit.pipeline.executor import Weights, check_wiring
from jdit.structs import Text

pytestmark = pytest.mark.slow

NAME = "wan2.2-animate-14b"


@pytest.fixture(scope="module")
def pipe():
    v = zoo.VARIANTS[NAME]
    parts = Parts(v.family, NAME, v.components, {}, v.scheduler, v.plan, {})
    assert not wan_animate.WanAnimation.misfits(parts)
    return wan_animate.WanAnimation(parts, Weights({}))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_full_size(pipe):
    modules = {n: sharding.described(registry.of_config(c).make(c)) for n, c in zoo.VARIANTS[NAME].components.items()}
    table, (height, width) = pipe.table(20), pipe.size()
    plan = pipe.segments({}, 200)
    assert (plan.count, plan.length, height, width, pipe.frames()) == (3, 77, 720, 1280, 77)
    uint8 = lambda *shape: array(*shape, dtype=jnp.uint8)
    segment = Segment(
        uint8(77, height, width, 3), uint8(77, 512, 512, 3), uint8(77, height, width, 3), uint8(77, height, width),
        array(1, 21, 90, 160, 16),
    )  # fmt: skip
    values = {
        "positive": Text(array(1, 512, 4096)), "negative": Text(array(1, 512, 4096)), "table": table,
        "image": uint8(1, height, width, 3), "pictures": array(1, 224, 224, 3), "outputs": 1, "length": 77,
        "guidance": jnp.float32(2), "steps": 20, "report": False, "output": "uint8", "vae_tiling": False,
        "hold": jnp.float32(1), "tail": Tail(array(1, 1, height, width, 3), array(dtype=jnp.bool_)),
        "segment": segment,
    }  # fmt: skip
    made = check_wiring(wan_animate.stages(), modules, values)
    assert made["channels"].shape == (1, 21, 90, 160, 20) and made["pose"].shape == (1, 20, 90, 160, 16)
    assert made["latents"].shape == (1, 21, 90, 160, 16) and made["pixels"].shape == (1, 77, 720, 1280, 3)
    assert made["pixels"].dtype == jnp.uint8 and made["tail"].frames.shape == (1, 1, 720, 1280, 3)


def test_what_a_segment_hands_on_is_its_tail():
    block = [s for s in wan_animate.stages() if s.repeats]
    values = {name: name for s in block for name in (*s.reads, *s.writes)}
    assert executor._carried(block, values) == {"tail": "tail"}
    assert executor._results(block, wan_animate.stages()[-1:]) == ("latents", "pixels")


def test_memory_plan(pipe):
    sizes = {n: 2 * sharding.count(registry.of_config(c).make(c)) for n, c in zoo.VARIANTS[NAME].components.items()}
    found = memory.plan(pipe.usual_stages(), sizes, 40e9)
    assert found.fits and "text_encoder" in found.waiting
    by_stage = {r.stage: set(r.components) for r in found.stages}
    assert by_stage["denoise"] == by_stage["decode"]  # the weights of a segment's stages stay between segments
    assert pipe.activations() > 5e9


def test_a_shift_by_size_is_refused(pipe):
    """Upstream never gives this family's scheduler a mu."""
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    parts = dataclasses.replace(pipe.parts, scheduler=scheduler)
    with pytest.raises(ValueError, match="use_dynamic_shifting=True"):
        wan_animate.WanAnimation(parts, Weights({})).table(4)
