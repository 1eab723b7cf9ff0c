"""Wan's transformer and its conversion against diffusers' WanTransformer3DModel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import util_wan
from diffusers import WanTransformer3DModel
from safetensors.numpy import load_file
from util_sd3 import error, noise

from convert import registry, table, wan, write
from convert.convert import convert
from jdit import checkpoint, sharding, zoo
from jdit.nn.wan import WanConfig
from jdit.sharding import Rules, dotted

pytestmark = pytest.mark.torch

FULL = {  # transformer/config.json of each release, where it is not the class's default
    "wan2.1-t2v-1.3b": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "wan2.1-t2v-14b": {},
    "wan2.1-i2v-14b": dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    "wan2.1-flf2v-14b": dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514),
    "wan2.2-t2v-a14b": {},
    "wan2.2-i2v-a14b": dict(in_channels=36),
    "wan2.2-ti2v-5b": dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
}


@pytest.fixture(scope="module", params=util_wan.KINDS, ids=util_wan.KINDS.keys())
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    model = util_wan.saved(folder, **util_wan.KINDS[request.param])
    return model, util_wan.ported(folder), folder


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    model = util_wan.saved(folder)
    return model, util_wan.ported(folder), folder


call = jax.jit(lambda module, *args: module(*args))
velocity = jax.jit(lambda module, *args: module.velocity(*args))
table_and_context = jax.jit(
    lambda module, t, text, image: (module.modulation_table(t), module.embed_context(text, image))
)


def with_time(given: dict, t: torch.Tensor) -> dict:
    return given | {"timestep": t}


def test_velocity(both):
    model, module, _ = both
    given = util_wan.inputs(model.config)
    assert error(call(module, *util_wan.ours(module, given)), util_wan.theirs(model, given)) < 1e-5


def test_a_block_and_its_parts(t2v):
    model, module, _ = t2v
    x, text, emb = noise(4, 2, 105, 32), noise(5, 2, 11, 32), noise(6, 2, 6, 32)
    theirs, turn = model.blocks[1], model.rope(torch.zeros(1, 6, 3, 10, 14))

    @jax.jit
    def parts(module, x, text, emb):
        rope, block = module.rope((3, 5, 7)), jax.tree.map(lambda a: a[1], module.blocks)
        context = block.cross.context(text, None)
        return block.attn(x, rope), block.cross(x, context), block(x, emb[:, None], rope, context)

    with torch.no_grad():
        want = theirs.attn1(x, None, None, turn), theirs.attn2(x, text, None, None), theirs(x, text, emb, turn)
    for a, b in zip(parts(module, x.numpy(), text.numpy(), emb.numpy()), want):
        assert error(a, b) < 1e-5


def test_conditions(both):
    """Time, text and picture before they meet the video."""
    model, module, _ = both
    _, t, text, image = util_wan.ours(module, given := util_wan.inputs(model.config))
    names = ("timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    with torch.no_grad():
        emb, block, *states = model.condition_embedder(*(given.get(n) for n in names))
        final = model.scale_shift_table + emb[:, None]
    embed = lambda m, t, text, image: (m.modulation(t), m.text(text), None if image is None else m.image(image))
    modulation, *got = jax.jit(embed)(module, t, text, image)
    assert error(modulation.final[:, 0], final) < 1e-5
    assert error(modulation.block[:, 0], block.unflatten(1, (6, -1))) < 1e-5
    assert all(error(a, b) < 1e-5 for a, b in zip(got, states) if b is not None)


def test_time_that_differs_between_tokens(t2v):
    """One timestep a token is upstream's expanded form; one a frame is the same where a frame's tokens agree."""
    model, module, _ = t2v
    given = util_wan.inputs(model.config)
    tokens = torch.rand(2, 105, generator=torch.Generator().manual_seed(3)) * 1000
    tokens[:, :35] = 0
    given = with_time(given, tokens)
    assert error(call(module, *util_wan.ours(module, given)), util_wan.theirs(model, given)) < 1e-5
    frames = torch.tensor([[0.0, 700.0, 350.0], [0.0, 20.5, 999.0]])
    got = call(module, *util_wan.ours(module, with_time(given, frames)))
    assert error(got, util_wan.theirs(model, with_time(given, frames.repeat_interleave(35, 1)))) < 1e-5
    with pytest.raises(ValueError, match="4 rows of modulation for 105 tokens"):
        jax.eval_shape(call, module, *util_wan.ours(module, with_time(given, torch.zeros(2, 4))))


def test_prepared_prompt_and_modulation_equal_the_plain_call(both):
    model, module, _ = both
    x, t, text, image = util_wan.ours(module, util_wan.inputs(model.config))
    rows, context = table_and_context(module, t, text, image)
    assert {a.shape[0] for a in jax.tree.leaves(context)} == {module.cfg.layers}
    want = call(module, x, np.full(2, t[1]), text, image)
    assert error(velocity(module, x, jax.tree.map(lambda a: a[1], rows), context), want) < 1e-6


def test_shapes_of_time(t2v):
    """A scalar is every sample's timestep; a table of (S, B, M) has a sample's own."""
    model, module, _ = t2v
    x, t, text, image = util_wan.ours(module, util_wan.inputs(model.config))
    rows, context = table_and_context(module, t[None, :, None], text, image)
    got = velocity(module, x, jax.tree.map(lambda a: a[0], rows), context)
    assert error(got, call(module, x, t, text, image)) < 1e-6
    one, same = (module.modulation(jnp.asarray(a)) for a in (t[0], np.full(2, t[0])))
    for a, b in zip(one, same):
        assert a.shape[0] == 1 and error(jnp.broadcast_to(a, b.shape), b) < 1e-6


def test_pictures_are_optional_and_checked(both):
    model, module, _ = both
    given = util_wan.inputs(model.config)
    x, t, text, image = util_wan.ours(module, given)
    if image is None:
        with pytest.raises(ValueError, match="no image embedding"):
            jax.eval_shape(call, module, x, t, text, noise(0, 2, 7, 22).numpy())
        return
    given.pop("encoder_hidden_states_image")
    assert error(call(module, x, t, text), util_wan.theirs(model, given)) < 1e-5
    if model.config.pos_embed_seq_len:  # first and last frame may also come side by side
        pairs = image.reshape(2, 14, 22)
        assert error(call(module, x, t, text, pairs), call(module, x, t, text, image)) < 1e-6
        with pytest.raises(ValueError, match=r"image tokens \(4, 5\).*14 together"):
            jax.eval_shape(call, module, x, t, text, image[:, :5])


def test_parameter_count_and_way_back(both, tmp_path):
    model, module, folder = both
    assert sharding.count(module) == sum(p.numel() for p in model.parameters())
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    write.write_back(tmp_path, leaves, wan.rules(module.cfg), wan.upstream_config(module.cfg))
    back, tensors = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, folder))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    theirs = dict(model.config) | {"qk_norm": "rms_norm_across_heads", "out_channels": module.cfg.out_channels}
    theirs["patch_size"] = list(theirs["patch_size"])
    assert all(v == theirs[k] for k, v in again.config.items() if not k.startswith("_"))


def test_queries_of_pictures_are_passed_over(both):
    """norm_added_q, which some checkpoints hold and upstream ignores."""
    _, module, folder = both
    shapes = {k: v.shape for k, v in load_file(folder / "diffusion_pytorch_model.safetensors").items()}
    targets = {dotted(p): leaf for p, leaf in sharding.abstract(lambda: module)[1].items()}
    table.plan(shapes | {"blocks.0.attn2.norm_added_q.weight": (32,)}, wan.rules(module.cfg), targets)


@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_bfloat16_is_as_close_as_torch(kind, tmp_path):
    """Root mean square over three draws of weights, torch keeping in float32 what upstream keeps."""
    sizes = dict(num_layers=4, attention_head_dim=24, ffn_dim=128)
    sizes |= {"added_kv_proj_dim": 96} if kind != "t2v" else {}
    errors = []
    for seed in range(3):
        model = util_wan.saved(tmp_path, seed=seed, **(util_wan.KINDS[kind] | sizes))
        given = util_wan.inputs(model.config)
        module = util_wan.ported(tmp_path, "bfloat16")
        half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        kept = sum(p.numel() for p in half.parameters() if p.dtype == torch.float32)
        assert sum(v.size for v in sharding.leaves(module).values() if v.dtype == jnp.float32) == kept
        exact = util_wan.theirs(model, given)
        low = util_wan.theirs(half, {k: v if k == "timestep" else v.bfloat16() for k, v in given.items()})
        got = call(module, *util_wan.ours(module, given))
        assert got.dtype == jnp.bfloat16
        errors.append((error(got.astype(jnp.float32), exact), error(low, exact)))
    got, bound = np.linalg.norm(errors, axis=0)
    assert bound > 1e-3 and got <= 1.2 * bound


@pytest.mark.parametrize("name", FULL)
def test_full_size(name):
    """Shapes of a forward pass and the parameter count, without weights."""
    cfg = wan.config(FULL[name])
    component = registry.of_config(cfg)
    with torch.device("meta"):
        model = WanTransformer3DModel(**FULL[name])
    assert sharding.count(component.make(cfg)) == sum(p.numel() for p in model.parameters())
    assert dict(model.config).items() >= (wan.upstream_config(cfg) | {"patch_size": (1, 2, 2)}).items() - {
        ("_class_name", "WanTransformer3DModel")
    }
    module = jax.eval_shape(component.make(cfg))
    x = jax.ShapeDtypeStruct((1, 21, 60, 104, cfg.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    image = jax.ShapeDtypeStruct((1, cfg.image_positions or 257, 1280), jnp.float32) if cfg.image_dim else None
    out = jax.eval_shape(lambda m, *a: m(*a), module, x, jax.ShapeDtypeStruct((1,), jnp.float32), text, image)
    assert out.shape == (1, 21, 60, 104, cfg.out_channels)


def test_config_fields_and_refusals():
    signature = inspect.signature(WanTransformer3DModel.__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if k != "self"}
    assert wan.config({}) == wan.config(defaults) == WanConfig()
    assert wan.upstream_config(WanConfig()).keys() == defaults.keys() | {"_class_name"}
    assert zoo.MODULES[WanConfig] is registry.COMPONENTS["WanTransformer3DModel"].module
    for given, message in (
        ({"mystery": 1}, r"unknown config fields \['mystery'\]"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is not supported"),
        ({"added_kv_proj_dim": 7}, "added_kv_proj_dim=7 must equal the width 5120"),
        ({"patch_size": [2, 2]}, "three sizes"),
        ({"attention_head_dim": 7}, "head_dim 7 must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            wan.config(given)


def test_sizes_that_do_not_fit(t2v):
    _, module, _ = t2v
    with pytest.raises(ValueError, match=r"latents of \(1, 5, 4\) do not divide into patches of \(1, 2, 2\)"):
        jax.eval_shape(call, module, jnp.zeros((1, 1, 5, 4, 6)), jnp.zeros(1), jnp.zeros((1, 3, 20)))
    with pytest.raises(ValueError, match="a side may be 1024"):
        module.rope((1, 2, 1025))


def test_conversion_to_bfloat16_keeps_what_stays_float32(both, tmp_path):
    """A checkpoint that was converted to bfloat16, loaded, is the source loaded in bfloat16; and on the way back."""
    _, module, folder = both
    assert "every tensor agrees" in convert(folder, tmp_path / "x", dtype="bfloat16", check=True)
    cfg = registry.placed(module.cfg, "bfloat16", Rules())
    got = checkpoint.restore(tmp_path / "x", "transformer", registry.of_config(cfg).targets(cfg))
    want = sharding.leaves(util_wan.ported(folder, "bfloat16"))
    assert got.keys() == want.keys()
    assert all(got[p].dtype == want[p].dtype and np.array_equal(got[p], want[p]) for p in want)
    assert "every tensor agrees" in convert(
        tmp_path / "x", tmp_path / "back", to="diffusers", dtype="bfloat16", check=True
    )
    half = load_file(tmp_path / "back" / "transformer" / "diffusion_pytorch_model.safetensors")
    names = ("scale_shift_table", "time_embedder", "norm1", "norm2")
    assert all((v.dtype == np.float32) == any(n in k.split(".") for n in names) for k, v in half.items())
