"""CogVideoX's transformer and its conversion against diffusers' CogVideoXTransformer3DModel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import util_cogvideox
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from safetensors.numpy import load_file
from util_sd3 import error, noise

from convert import cogvideox, registry, write
from jdit import sharding, zoo
from jdit.nn.cogvideox import CogVideoXConfig
from jdit.nn.patch import sincos_3d
from jdit.sharding import dotted

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=util_cogvideox.KINDS, ids=util_cogvideox.KINDS.keys())
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogvideox")
    model = util_cogvideox.saved(folder, **util_cogvideox.KINDS[request.param])
    return model, util_cogvideox.ported(folder), folder


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogvideox")
    model = util_cogvideox.saved(folder, **util_cogvideox.KINDS["5b"])
    return model, util_cogvideox.ported(folder)


call = jax.jit(lambda module, *args: module(*args))
velocity = jax.jit(lambda module, *args: module.velocity(*args))


def test_velocity(both):
    model, module, _ = both
    given = util_cogvideox.inputs(model.config)
    assert error(call(module, *util_cogvideox.ours(given)), util_cogvideox.theirs(model, given)) < 1e-5


def test_other_sizes(both):
    """Longer than the sample size, taller and narrower; learned positions are of one height and width."""
    model, module, _ = both
    sizes = 4, 14, 6
    if model.config.use_learned_positional_embeddings:
        sizes = 4, model.config.sample_height, model.config.sample_width
    given = util_cogvideox.inputs(model.config, sizes=sizes)
    assert error(call(module, *util_cogvideox.ours(given)), util_cogvideox.theirs(model, given)) < 1e-5


def test_a_block_and_its_parts(rotary):
    model, module = rotary
    x, text, emb = noise(4, 2, 105, 48), noise(5, 2, 11, 48), noise(6, 2, 20)
    turn, block = util_cogvideox.rotary(model, (3, 10, 14)), model.transformer_blocks[1]

    @jax.jit
    def parts(module, x, text, emb):
        rope, block = module.rope((3, 5, 7), 11), jax.tree.map(lambda a: a[1], module.blocks)
        joined = jnp.concatenate([text, x], 1)
        return block.attn(joined, rope), block(joined, block.modulation(jax.nn.silu(emb)), rope, 11)

    with torch.no_grad():
        attention, whole = block.attn1(x, text, image_rotary_emb=turn), block(x, text, emb, turn)
    for got, want in zip(parts(module, x.numpy(), text.numpy(), emb.numpy()), (attention, whole)):
        assert error(got[:, 11:], want[0]) < 1e-5 and error(got[:, :11], want[1]) < 1e-5


@pytest.mark.parametrize("grid", [(3, 5, 7), (2, 7, 3), (4, 2, 13)])
def test_positions(rotary, grid):
    model, module = rotary
    turn = util_cogvideox.rotary(model, (grid[0], 2 * grid[1], 2 * grid[2]))
    rope = module.rope(grid, 4)
    for got, want, still in zip(rope, turn, (1, 0)):
        assert error(np.repeat(got[4:], 2, -1), want) < 1e-6 and np.all(np.asarray(got[:4]) == still)
    want = get_3d_sincos_pos_embed(48, (grid[2], grid[1]), grid[0], 1.4, 0.8).flatten(0, 1)
    assert error(sincos_3d(48, grid, (0.8, 1.4, 1.4)), want) < 1e-6


def test_prepared_prompt_and_modulation_equal_the_plain_call(both):
    model, module, _ = both
    x, t, text = util_cogvideox.ours(util_cogvideox.inputs(model.config))
    rows, embedded = jax.jit(lambda m, t, text: (m.modulation_table(t), m.embed_text(text)))(module, t, text)
    want = call(module, x, np.full(2, t[1]), text)
    assert error(velocity(module, x, jax.tree.map(lambda a: a[1], rows), embedded), want) < 1e-6


def test_parameter_count_and_way_back(both, tmp_path):
    model, module, folder = both
    assert sharding.count(module) == sum(p.numel() for p in model.parameters())
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    write.write_back(tmp_path, leaves, cogvideox.rules(module.cfg), cogvideox.upstream_config(module.cfg))
    back, tensors = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, folder))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert all(v == model.config[k] for k, v in again.config.items() if not k.startswith("_"))


def test_bfloat16_is_as_close_as_torch(tmp_path):
    """Root mean square over three draws of weights."""
    for kind in ("2b", "1.5-i2v"):
        errors = []
        for seed in range(3):
            kw = util_cogvideox.KINDS[kind] | dict(num_layers=4, num_attention_heads=6)
            model = util_cogvideox.saved(tmp_path, seed=seed, **kw)
            given = util_cogvideox.inputs(model.config)
            module = util_cogvideox.ported(tmp_path, "bfloat16")
            half = CogVideoXTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
            exact = util_cogvideox.theirs(model, given)
            low = {k: v if k == "timestep" else v.bfloat16() for k, v in given.items()}
            got = call(module, *util_cogvideox.ours(given))
            assert got.dtype == jnp.bfloat16
            errors.append((error(got.astype(jnp.float32), exact), error(util_cogvideox.theirs(half, low), exact)))
        got, bound = np.linalg.norm(errors, axis=0)
        assert bound > 1e-3 and got <= 1.2 * bound


def test_config_fields_and_refusals():
    signature = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if k != "self"}
    assert cogvideox.config({}) == cogvideox.config(defaults) == CogVideoXConfig()
    assert cogvideox.upstream_config(CogVideoXConfig()) == defaults | {"_class_name": util_cogvideox.CLASS}
    assert zoo.MODULES[CogVideoXConfig] is registry.COMPONENTS[util_cogvideox.CLASS].module
    for given, message in (
        ({"mystery": 1}, r"unknown config fields \['mystery'\]"),
        ({"freq_shift": 1, "flip_sin_to_cos": False}, r"flip_sin_to_cos=False \(it may be True\), freq_shift=1"),
        ({"timestep_activation_fn": "mish"}, "timestep_activation_fn='mish'"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu' is not supported; there are gelu-approximate, gelu"),
        ({"use_learned_positional_embeddings": True}, "needs use_rotary_positional_embeddings"),
        ({"patch_size_t": 2}, "patch_size_t=2 goes with rotary positions alone"),
        ({"attention_head_dim": 24, **util_cogvideox.ROTARY}, "attention_head_dim=24 must be a multiple of 16"),
        ({"ofs_embed_dim": 500}, "ofs_embed_dim=500 must equal time_embed_dim=512"),
        ({"out_channels": None}, "out_channels is null"),
    ):
        with pytest.raises(ValueError, match=message):
            cogvideox.config(given)


def test_sizes_that_do_not_fit(both):
    _, module, _ = both
    cfg, text = module.cfg, np.zeros((1, module.cfg.text_tokens, 24), np.float32)
    shaped = lambda *sizes: np.zeros((1, *sizes, cfg.in_channels), np.float32)
    refused = lambda x, text=text: jax.eval_shape(call, module, x, np.zeros(1, np.float32), text)
    if cfg.patch > 1:
        with pytest.raises(ValueError, match=r"latents of \(2, 5, 4\) do not divide into patches of"):
            refused(shaped(2, 5, 4))
    if cfg.learned:
        with pytest.raises(ValueError, match=r"latents of \(10, 12\): learned positions are for \(10, 14\) alone"):
            refused(shaped(3, 10, 12))
    if cfg.patch_frames:
        with pytest.raises(ValueError, match=r"a grid of \(16, 2\) patches; there are positions for \(15, 15\)"):
            refused(shaped(2, 32, 4))
    if cfg.learned or not cfg.rotary:
        with pytest.raises(ValueError, match="7 text tokens; this transformer has positions for 11"):
            refused(shaped(3, 10, 14), text[:, :7])
