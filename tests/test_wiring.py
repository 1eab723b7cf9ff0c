"""The stages of every full-size variant fit together: shapes by eval_shape, no weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import registry
from jdit import sampling, sharding, zoo
from jdit.pipeline import executor, sd3
from jdit.pipeline.executor import Stage, Weights, check_wiring, run, stream
from jdit.structs import Text

COUNTS = {  # transformers, as upstream's classes count them (tests/parity/test_zoo.py)
    "sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520, "sd3.5-large": 8_056_627_520,
    "sd3.5-large-turbo": 8_056_627_520,
}  # fmt: skip


@pytest.mark.slow  # as those of the other families
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("t5", [True, False])
def test_full_size(name, t5):
    variant = zoo.VARIANTS[name]
    modules = {n: sharding.described(registry.of_config(c).make(c)) for n, c in variant.components.items()}
    assert sharding.count(modules["transformer"]) == pytest.approx(COUNTS[name], rel=2e-2)
    ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    values = {"ids": ids, "ids_2": ids, "ids_3": jax.ShapeDtypeStruct((2, 256), jnp.int32), "joint_dim": 4096,
              "absent": 256, "clip_skip": 0}  # fmt: skip
    values = check_wiring(sd3.stages(t5=t5, image=False, pixels=False, generate=False), modules, values)
    text: Text = values["encoded"]
    assert text.states.shape == (2, 77 + (256 if t5 else 1), 4096)
    assert text.pooled.shape == (2, 2048)
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), text._replace(counts=None))
    half = half._replace(counts=text.counts)
    values |= {
        "positive": half, "negative": half, "noise": jax.ShapeDtypeStruct((1, 96, 160, 16), jnp.float32),
        "clean": None, "table": sampling.from_config(variant.scheduler, 4), "guidance": jnp.float32(5), "skip": None,
        "keys": None, "report": False, "output": "uint8", "vae_tiling": False, "vae_slicing": False,
        "image": jax.ShapeDtypeStruct((1, 768, 1280, 3), jnp.uint8), "image_keys": None,
    }  # fmt: skip
    values = check_wiring(sd3.stages(t5=t5, image=True, pixels=True, encode=False), modules, values)
    assert values["latents"].shape == (1, 96, 160, 16)
    assert values["pixels"].shape == (1, 768, 1280, 3) and values["pixels"].dtype == jnp.uint8


def add(module, a, b):
    return a + b + module.bias.get_value()[0]


def double(a):
    return a * 2, a * 3


class TestExecutor:
    @staticmethod
    def weights(log=None):
        make = lambda: nnx.Linear(1, 1, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
        if log is None:
            return Weights({"w": make()})
        return Weights({}, {"w": lambda: (log.append("read"), make())[1]})

    def test_order_timings_and_names(self):
        seen = []
        stages = [Stage("one", add, ("w",), ("x", "y"), ("z",)), Stage("two", double, (), ("z",), ("d", "t"))]
        values, timings = run(stages, self.weights(), {"x": 1.0, "y": 2.0}, on_stage=seen.append)
        assert (values["z"], values["d"], values["t"]) == (4, 8, 12)
        assert seen == ["one", "two"] == list(timings) and min(timings.values()) >= 0

    STAGES = (
        Stage("plan", lambda n: (jnp.float32(i + 1) for i in range(n)), (), ("n",), ("segment",), host=True),
        Stage("add", add, ("w",), ("carry", "segment"), ("sum",), repeats="segment"),
        Stage("carry", double, (), ("sum",), ("carry", "out"), repeats="segment"),
        Stage("merge", lambda parts: np.stack(parts), (), ("out",), ("all",), host=True),
    )

    @pytest.mark.parametrize("scanned", [False, True])
    def test_replays_a_block_for_each_segment_and_keeps_what_it_carries(self, scanned):
        told: list[str] = []
        given = {"carry": jnp.float32(0), "n": 3}
        values, timings = run(self.STAGES, self.weights(), given, scanned=scanned, on_stage=told.append)
        carry, want = 0.0, []
        for item in (1.0, 2.0, 3.0):  # the same by hand
            total = carry + item + 1
            carry = total * 2
            want.append(total * 3)
        np.testing.assert_allclose(values["all"], want)
        np.testing.assert_allclose(values["carry"], carry)
        assert list(timings) == ["plan", "add[0]", "carry[0]", "add[1]", "carry[1]", "add[2]", "carry[2]", "merge"]
        assert min(timings.values()) >= 0 and told == list(timings)

    def test_streams_a_block(self):
        log: list[str] = []
        weights = self.weights(log)
        replays = stream(self.STAGES[:-1], weights, {"carry": jnp.float32(0), "n": 3}, ("out", "sum"))
        made = [(float(result["out"]), list(spent)) for result, spent in replays]
        assert made == [
            (6, ["plan", "add[0]", "carry[0]"]), (21, ["add[1]", "carry[1]"]), (54, ["add[2]", "carry[2]"])
        ]  # fmt: skip
        assert log == ["read"] and "w" not in weights.resident

    def test_a_stream_that_is_left_lets_go_of_the_weights(self):
        weights = self.weights([])
        replays = stream(self.STAGES[:-1], weights, {"carry": jnp.float32(0), "n": 3}, ("out",))
        next(replays)
        assert "w" in weights.resident
        replays.close()
        assert "w" not in weights.resident

    def test_waiting_weights_are_read_for_their_stage_and_let_go(self):
        log: list[str] = []
        weights = self.weights(log)
        stages = [Stage("one", add, ("w",), ("x", "y"), ("z",)), Stage("two", double, (), ("z",), ("d", "t"))]
        for _ in range(2):
            run(stages, weights, {"x": 1.0, "y": 2.0})
            assert "w" not in weights.resident
        assert log == ["read", "read"]


def test_the_second_replay_is_not_compiled_again():
    """Weights are bound to a device, so what a stage hands on is too; the first carry must be like it."""
    weight = jax.device_put(jnp.ones(2), jax.devices()[0])
    play = lambda weight, item, tail: (tail * weight + item, tail)
    stage = Stage("play", play, ("w",), ("items", "tail"), ("tail", "out"), (), "items")
    run([stage], Weights({"w": weight}), {"items": [jnp.ones(2)] * 3, "tail": jnp.zeros(2)})  # type: ignore[dict-item]
    assert executor.compiled(play)._cache_size() == 1
