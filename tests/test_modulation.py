"""Modulation as a stage of its own: the loop is given none of its weights, the numbers stay, the plan counts both.

That the loop reads none of them in any family, and the table no others, is what test_full_size of each family's wiring
shows: reading a weight that a part lacks is an error.
"""

import dataclasses
import gc
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from rich.console import Console

import jdit
from convert.convert import convert
from jdit import cli, sharding, zoo
from jdit.load import ASSETS, open_model
from jdit.nn import parts
from jdit.nn.mmdit import MMDiT
from jdit.pipeline import executor, memory, modulation, sd3
from jdit.pipeline.base import Parts
from jdit.pipeline.executor import Stage, Weights
from jdit.pipeline.families import PIPELINES
from jdit.structs import Text

pytestmark = pytest.mark.slow

CALL = dict(height=32, width=48, steps=2, guidance=4.0, seed=3, output="latents", num_outputs=2)
PROMPTS = ["a red apple", "a cat on the moon"]
NAMES = [n for n, v in zoo.VARIANTS.items() if v.family in PIPELINES]


def make(cfg):
    return sharding.Make(zoo.MODULES[type(cfg)], cfg)


def dry(name, **plan):
    v = zoo.VARIANTS[name]
    configs = {n: dataclasses.replace(c, dtype="bfloat16") for n, c in v.components.items()}
    settings = v.settings or {}
    parts_ = Parts(v.family, name, configs, {}, v.scheduler, dataclasses.replace(v.plan, **plan), settings)
    return PIPELINES[v.family](parts_, Weights({}))


@pytest.fixture(scope="module")
def whole():
    pipe = jdit.load("fluent-image", dtype="float32")
    return pipe, pipe(PROMPTS, **CALL).latents


def watched(pipe, **call):
    """The latents, and what was resident at the first step: names, and bytes of all arrays."""
    seen = []

    def note(*_):
        gc.collect()  # flax's merge leaves cycles that hold what it merged
        seen.append((set(pipe.weights.resident), sum(a.nbytes for a in jax.live_arrays())))

    out = pipe(PROMPTS, **{**CALL, **call}, on_step=note)
    return out, *seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "jdit"])
def test_the_loop_runs_without_the_weights_and_the_encoders(whole, tmp_path, layout):
    pipe, want = whole
    source = "fluent-image" if layout == "diffusers" else tmp_path / "ours"
    if layout == "jdit":
        convert(ASSETS / "fluent-image", source)
    _, names, resident = watched(pipe)
    assert "transformer" in names
    spare = jdit.load(source, dtype="float32", room=1)
    assert not spare.weights.resident
    out, here, less = watched(spare)
    assert here == {"transformer/loop"} and np.array_equal(out.latents, want)
    assert list(out.timings) == ["encode_text", "prepare", "modulate", "denoise"]
    mod = sharding.tree_bytes(parts.take(pipe.components["transformer"], parts.MODULATION))
    loop = sharding.tree_bytes(parts.take(pipe.components["transformer"], parts.LOOP))
    assert mod > 9e6 and less - resident == pytest.approx(loop, abs=1e6)  # beside what the first pipeline holds
    both = (jax.tree.leaves(p.components["transformer"]) for p in (spare, pipe))  # whole again
    assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))


def test_the_loop_stays_where_the_modulation_goes(whole):
    pipe = jdit.load("fluent-image", dtype="float32", room=36e6)
    assert set(pipe.weights.resident) == {"transformer/loop"} and "transformer/modulation" in pipe.weights.waiting
    assert np.array_equal(pipe(PROMPTS, **CALL).latents, whole[1])


def test_made_in_the_steps_where_the_table_would_be_larger(whole, monkeypatch):
    pipe, plain = whole
    layers = CALL | dict(skip_layers=[1, 2], skip_layer_start=-1.0, skip_layer_stop=1.0)
    want = pipe(PROMPTS, **layers)
    monkeypatch.setattr(modulation, "LARGE", 0)
    monkeypatch.setattr(modulation, "weight_bytes", lambda *_: 0)
    out = pipe(PROMPTS, **layers)
    assert "modulate" in want.timings and "modulate" not in out.timings
    close = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)) < 2e-5  # guidance 4: rounding times 7
    assert close(out.latents, want.latents) and not close(out.latents, plain)


def test_the_programs_arguments():
    """Bytes that the compiled loop and table of SD3's transformer are given, by a closed formula."""
    cfg = open_model("fluent-image").parts.configs["transformer"]
    module, d, rows, steps = nnx.eval_shape(make(cfg)), cfg.width, 2, 3
    spec = modulation.spec
    text = Text(spec(2, 7, cfg.joint_dim), spec(rows, cfg.pooled_dim))
    table = jax.tree.map(lambda a: spec(*a.shape), dry("sd3.5-large").table(1024, 1024, steps))
    x, dense = spec(1, 4, 4, cfg.in_channels), lambda n: (d + 1) * n * d  # of n d numbers from d, with a bias
    mods = jax.eval_shape(MMDiT.modulation_table, module, spec(steps), text.pooled)
    args = (x, text, mods, table, spec(), None, None)
    given = lambda part: sharding.tree_bytes(jax.tree.leaves(parts.take(module, part)))
    lowered = executor.compiled(sd3.denoise, (8,)).lower(parts.take(module, parts.LOOP), *args, False)
    received = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(lowered.args_info))
    assert received == given(parts.LOOP) + sharding.tree_bytes(args)
    blocks = (cfg.layers - 1) * 2 * dense(6) + dense(6) + dense(2)
    embeds = (256 + 1) * d + (cfg.pooled_dim + 1) * d + 2 * dense(1)
    assert given(parts.MODULATION) == 4 * (blocks + embeds + dense(2))
    assert given(parts.MODULATION) + given(parts.LOOP) == sharding.tree_bytes(module)
    made = executor.compiled(sd3.modulate).lower(parts.take(module, parts.MODULATION), text, table).compile()
    size = 4 * d * rows * steps * ((cfg.layers - 1) * 12 + 8 + 2)
    assert made.memory_analysis().output_size_in_bytes == pytest.approx(size, rel=1e-3)  # the tuple's own pointers
    assert sharding.tree_bytes(mods) == size == modulation.table_bytes(MMDiT, cfg, spec(steps), text.pooled)


# ------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_the_parts(name):
    pipe = dry(name)
    stages, tables = pipe.usual_stages(), pipe.tables()
    experts = [n for n in pipe.parts.configs if n.startswith("transformer")]
    assert len(tables) == len(experts) and all(0 < size < 1e9 for size in tables.values())
    for component in experts:
        assert memory.entries(stages, component) == [f"{component}/modulation", f"{component}/loop"]
    named = {w for s in stages for w in s.weights}
    assert not named & set(experts)  # nothing takes a transformer whole
    assert memory.entries(stages, "vae") == ["vae"]


def test_the_plan_of_sd35_large():
    pipe = dry("sd3.5-large")
    cfg, tables = pipe.parts.configs["transformer"], pipe.tables()
    have = {f"transformer/{p}": modulation.weight_bytes(MMDiT, cfg, p) for p in (parts.MODULATION, parts.LOOP)}
    d, layers, steps = 2432, 38, 28
    dense = lambda n: (d + 1) * n * d
    want = (layers - 1) * 2 * dense(6) + dense(6) + dense(2) + dense(2) + 257 * d + 2049 * d + 2 * dense(1)
    assert have["transformer/modulation"] == 2 * want and 5.3e9 < 2 * want < 5.5e9
    assert tables == {"modulation": 4 * d * 2 * steps * ((layers - 1) * 12 + 8 + 2)}
    others = {"text_encoder": 3, "text_encoder_2": 5, "text_encoder_3": 9_000_000_000, "vae": 7}
    fits = memory.plan(pipe.usual_stages(), have | others, 80e9, tables)
    assert fits.waiting == () and fits.resident[0] == "transformer" and fits.in_step == ()
    assert fits.peak == sum(have.values()) + sum(others.values()) + tables["modulation"]
    tight = memory.plan(pipe.usual_stages(), have | others, 21e9, tables)  # neither beside the encoder nor in the loop
    assert tight.waiting == ("transformer/modulation", "text_encoder_3") and tight.fits
    assert tight.resident == ("transformer/loop", "text_encoder", "text_encoder_2", "vae")
    at = {s.stage: s for s in tight.stages}
    loop = have["transformer/loop"] + 15  # and the small ones
    assert at["encode_text"].bytes == loop + others["text_encoder_3"] and at["decode"].bytes == loop
    assert at["modulate"].bytes == loop + have["transformer/modulation"] + tables["modulation"]
    assert at["denoise"].bytes == loop + tables["modulation"]
    assert "modulation" in at["denoise"].components and "modulation" not in at["decode"].components
    least = memory.plan(pipe.usual_stages(), have | others, 1, tables)
    assert least.peak == least.least == have["transformer/loop"] + tables["modulation"] and not least.fits


@pytest.mark.parametrize("name", ["cogvideox-5b", "qwen-image", "wan2.1-t2v-14b"])
def test_what_depends_on_time_alone_is_always_made_before_the_loop(name):
    pipe = dry(name, steps=10_000)
    assert max(pipe.tables().values()) > 1e9
    assert "modulate" in [s.name for s in pipe.usual_stages()]


def test_the_plan_says_that_a_table_would_be_too_large():
    pipe = dry("sd3.5-large", steps=1000)
    found = memory.plan(pipe.usual_stages(), {"transformer": 7}, None, pipe.tables())
    assert [s.name for s in pipe.usual_stages()] == ["encode_text", "prepare", "denoise", "decode"]
    assert found.in_step == (("modulation", 4 * 2432 * 2 * 1000 * (37 * 12 + 10)),)
    assert found.stages[2].components == ("transformer",)
    out = io.StringIO()
    cli._print_memory(Console(file=out, width=200), found.describe())
    assert "no table of modulation: of all steps it would be 8.83 GB" in out.getvalue()


def test_inspect_prints_the_parts():
    run = lambda *more: CliRunner().invoke(cli.main, ["inspect", "fluent-image", *more]).stdout
    lines = {line.split()[0]: line.split()[1:] for line in run("--room", "0.013").splitlines() if line}
    assert lines["modulate"] == ["transformer/modulation,", "modulation", "7.68", "MB"]
    assert lines["denoise"] == ["transformer/loop,", "modulation", "12.39", "MB"]
    assert run().splitlines()[-1].startswith("memory: 25.34 MB of weights and tables at most, 12.39 MB if each waits")


def test_parts_of_what_waits_or_is_resident():
    cfg = dataclasses.replace(dry("sd3.5-large").parts.configs["transformer"], layers=2, heads=1, dtype="float32")
    module, log = nnx.eval_shape(make(cfg)), []
    waiting = {f"t/{p}": (lambda p=p: (log.append(p), parts.take(module, p))[1]) for p in ("modulation", "loop")}
    apart = Weights({}, waiting)
    assert len(jax.tree.leaves(apart["t"])) == len(jax.tree.leaves(module))  # made whole of both
    apart.release({"t/loop"})
    assert set(apart.resident) == {"t/loop"} and log == ["modulation", "loop"]
    one = Weights({}, {"t": lambda: module})
    assert one["t/loop"].patch.kernel.get_value() is module.patch.kernel.get_value()
    one.release({"t/modulation"})
    assert "t" in one.resident
    one.release({"other"})
    assert not one.resident
    for missing in ("u", "u/loop"):
        with pytest.raises(KeyError, match="u"):
            one[missing]
    with pytest.raises(ValueError, match="part 'half' of MMDiT, which has 'modulation' and 'loop'"):
        parts.take(module, "half")
    with pytest.raises(ValueError, match="no parts"):
        parts.take(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "loop")


def test_a_value_that_is_freed_is_let_go():
    stages = [Stage("a", lambda x: x + 1, (), ("x",), ("y",)), Stage("b", lambda y: y * 2, (), ("y",), ("z",),
                                                                   frees=("y",))]  # fmt: skip
    values, _ = executor.run(stages, Weights({}), {"x": jnp.ones(2)})
    assert sorted(values) == ["x", "z"]
