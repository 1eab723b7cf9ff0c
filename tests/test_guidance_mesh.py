"""Guidance as data parallelism: with data=2 the unconditional half of a step is one device's, the conditional half the
other's, in every family, and neither is told what the other makes of its own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives

from jdit import sampling, sharding
from jdit.nn.cogvideox import CogVideoX, CogVideoXConfig
from jdit.nn.mmdit import MMDiT, MMDiTConfig
from jdit.nn.qwen_image import QwenImage, QwenImageConfig
from jdit.nn.wan import Wan, WanConfig
from jdit.pipeline import cogvideox, executor, qwen_stages, sd3, wan
from jdit.pipeline.executor import Weights
from jdit.structs import Text

pytestmark = pytest.mark.slow

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DDIM = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
COMMON = {
    "clean": None, "skip": None, "keys": None, "report": False, "cfg_normalize": True, "two_passes": False,
    "tokens": None, "channels": None, "first": None, "held": None, "pictures": (), "mask": None, "modulation": None,
}  # fmt: skip


def text(dim, pooled=None, lengths=None, tokens=5):
    make = lambda key: Text(
        jax.random.normal(jax.random.key(key), (1, tokens, dim)),
        None if pooled is None else jnp.ones((1, pooled)), None, None if lengths is None else jnp.array([lengths]),
    )  # fmt: skip
    return {"positive": make(0), "negative": make(1)}


FAMILIES = {
    "sd3": (
        MMDiT, MMDiTConfig(sample_size=16, layers=2, heads=4, head_dim=8, joint_dim=24, pooled_dim=16, pos_size=8),
        lambda: sd3.stages(t5=False, image=False, pixels=False, encode=False),
        (16, 16, 16), EULER, text(24, pooled=16),
    ),
    "wan": (
        Wan, WanConfig(heads=4, head_dim=8, text_dim=24, freq_dim=16, mlp=64, layers=2),
        lambda: wan.stages(tokens=False, picture=None, pixels=False), (3, 16, 16, 16), UNIPC, text(24),
    ),
    "cogvideox": (
        CogVideoX, CogVideoXConfig(heads=2, head_dim=16, layers=2, text_dim=24, text_tokens=5, time_dim=16,
                                   sample_width=16, sample_height=16, sample_frames=9, rotary=True),
        lambda: cogvideox.stages(given=None, pixels=False), (3, 16, 16, 16), DDIM, text(24),
    ),
    "qwen-image": (
        QwenImage, QwenImageConfig(layers=2, heads=4, head_dim=8, text_dim=24, rope_dims=(2, 2, 4)),
        lambda: [qwen_stages.PREPARE, *qwen_stages.solving(tabled=True)], (16, 16, 16), EULER, text(24, lengths=4),
    ),
}  # fmt: skip


@functools.cache
def program(family: str, data: int):
    """The compiled sampling loop of a guided run of one prompt."""
    module, cfg, stages, shape, scheduler, prompts = FAMILIES[family]
    make = sharding.Make(module, cfg)
    mesh = sharding.make_mesh(data=data)
    table = sampling.from_config(scheduler, 2)
    scale = jnp.full(2, 4.0) if family == "cogvideox" else jnp.float32(4)
    with jax.set_mesh(mesh):
        _, targets = sharding.abstract(make, mesh)
        values = {p: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding) for p, leaf in targets.items()}
        weights = Weights({"transformer": sharding.assemble(make, values)})
        given = {**COMMON, **prompts, "noise": jax.random.normal(jax.random.key(2), (1, *shape)), "table": table,
                 "guidance": scale, "table:denoise": table, "guidance:denoise": scale, "steps": 2}  # fmt: skip
        todo = stages()
        at = next(i for i, stage in enumerate(todo) if stage.name == "denoise")
        given, _ = executor.run(todo[:at], weights, given)
        loop = todo[at]
        arguments = [*(weights[w] for w in loop.weights), *(given[name] for name in loop.reads)]
        return executor.compiled(loop.fn, executor._static(loop)).lower(*arguments).compile()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_half_is_a_device_of_its_own(family):
    one, two = (program(family, data) for data in (1, 2))
    assert two.cost_analysis()["flops"] < 0.53 * one.cost_analysis()["flops"]
    (told,) = collectives(two.as_text())
    # each is told the other's prediction, once in each of two steps, and goes on alone
    assert (told.kind, told.bytes, told.times) == ("all-gather", 2 * 4 * math.prod(FAMILIES[family][3]), 2)
