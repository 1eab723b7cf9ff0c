"""MMDiT and its conversion against diffusers' SD3Transformer2DModel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from flax import nnx
from util_optimised import optimised
from util_sd3 import channels_last, error, noise, transformer

from convert import sd3
from convert.table import back, fill, plan
from jdit import sharding
from jdit.nn.context_parallel import whole_tiles
from jdit.nn.mmdit import MMDiT
from jdit.nn.patch import sincos_2d
from jdit.sharding import dotted
from jdit.target import Target, compiling_for

pytestmark = pytest.mark.torch

KINDS = {
    "sd3": dict(qk_norm=None, dual_attention_layers=()),
    "sd3.5-large": dict(qk_norm="rms_norm", dual_attention_layers=()),
    "sd3.5-medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "scattered": dict(qk_norm="rms_norm", dual_attention_layers=(1, 3), patch_size=1, sample_size=8),
    "one-layer": dict(num_layers=1, dual_attention_layers=()),
}


def load(tensors: dict[str, np.ndarray], rules, cfg) -> MMDiT:
    make = lambda: MMDiT(cfg, rngs=nnx.Rngs(0))
    _, leaves = sharding.abstract(make)
    fills = plan({k: v.shape for k, v in tensors.items()}, rules, {dotted(p): s for p, s in leaves.items()})
    values = {f.path: jnp.asarray(fill(f, tensors.__getitem__), f.dtype) for f in fills}
    return sharding.assemble(make, {p: values[dotted(p)] for p in leaves})


@pytest.fixture(scope="module", params=KINDS, ids=KINDS.keys())
def both(request):
    theirs = transformer(**KINDS[request.param])
    theirs.pos_embed.pos_embed.normal_(generator=torch.Generator().manual_seed(9))
    tensors = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    cfg = sd3.config(dict(theirs.config))
    return theirs, tensors, load(tensors, sd3.rules(cfg), cfg)


def inputs():
    x, context, pooled = noise(0, 2, 16, 6, 10), noise(1, 2, 7, 40), noise(2, 2, 28)
    return x, context, pooled, torch.tensor([913.3, 20.5])


def run(ours, x, context, pooled, t, **kw):
    call = jax.jit(lambda m, x, t, c, p: m(x, t, c, p, **kw))
    return call(ours, channels_last(x), t.numpy(), context.numpy(), pooled.numpy())


def reference(theirs, x, context, pooled, t, **kw) -> np.ndarray:
    with torch.no_grad():
        return channels_last(theirs(x, context, pooled, t, **kw).sample)


@pytest.mark.parametrize("skip", [None, [0], [1, 2]])
def test_velocity(both, skip):
    theirs, _, ours = both
    x, context, pooled, t = inputs()
    layers = len(theirs.transformer_blocks)
    skip = skip and [i for i in skip if i < layers]
    flags = None if skip is None else jnp.asarray(np.isin(np.arange(layers), skip))
    got = run(ours, x, context, pooled, t, skip=flags)
    assert error(got, reference(theirs, x, context, pooled, t, skip_layers=skip)) < 1e-5


def test_tokens_are_padded_on_a_gpu(both):
    """Neither 15 image nor 7 context tokens make whole tiles; nobody attends to the zeros behind them."""
    _, _, ours = both
    x, context, pooled, t = inputs()
    want = run(ours, x, context, pooled, t)
    with compiling_for(Target("gpu")):
        assert whole_tiles(context.numpy(), ours.cfg.rules).shape == (2, 8, 40)
        assert error(run(ours, x, context, pooled, t), want) < 1e-5


def test_counted_tokens_equal_repeated_ones(both):
    theirs, _, ours = both
    x, context, pooled, t = inputs()
    repeated = torch.cat([context[:, :-1], context[:, -1:].expand(2, 30, 40)], 1)
    got = run(ours, x, context, pooled, t, context_counts=jnp.array([1.0] * 6 + [30.0]))
    assert error(got, reference(theirs, x, repeated, pooled, t)) < 1e-5


def test_modulation_table_equals_single_steps(both):
    _, _, ours = both
    x, context, pooled, t = inputs()
    single, whole = optimised(lambda m, *a: m.velocity(*a)), optimised(lambda m, *a: m(*a))
    table = ours.modulation_table(jnp.asarray(t.numpy()), jnp.asarray(pooled.numpy()))
    for i in range(2):
        step = jax.tree.map(lambda a, i=i: a[i], table)
        got = single(ours, channels_last(x), step, ours.embed_context(context.numpy()))
        assert error(got, whole(ours, channels_last(x), t.numpy()[i], context.numpy(), pooled.numpy())) < 1e-6


def test_parameter_count_and_way_back(both):
    theirs, tensors, ours = both
    assert sharding.count(ours) == sum(p.numel() for p in theirs.parameters())
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(ours).items()}
    written = {key: op.inverse(leaves[path][at]) for key, path, at, op in back(sd3.rules(ours.cfg), leaves)}
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[k], tensors[k]) for k in tensors)


def test_original_layout(both):
    """Our original-layout tensors, taken through diffusers' own converter, are diffusers' tensors; and they load."""
    theirs, tensors, ours = both
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(ours).items()}
    rules = sd3.original_rules(ours.cfg)
    written = {k: np.ascontiguousarray(op.inverse(leaves[p][at])) for k, p, at, op in back(rules, leaves)}
    as_torch = {k: torch.from_numpy(v.copy()) for k, v in written.items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(as_torch)
    converted = {k: v for k, v in converted.items() if v is not None}
    assert converted.keys() == tensors.keys()
    assert all(np.array_equal(converted[k].numpy(), tensors[k]) for k in tensors)
    if theirs.config.qk_norm:  # heads are read off the norms' shapes
        cfg = sd3.original_config({k: v.shape for k, v in written.items()})
        again = load(written, sd3.original_rules(cfg), cfg)
        x, context, pooled, t = inputs()
        assert error(run(again, x, context, pooled, t), run(ours, x, context, pooled, t)) < 1e-6


def test_position_table():
    want = get_2d_sincos_pos_embed(32, 12, base_size=8, output_type="np").reshape(12, 12, 32)
    np.testing.assert_allclose(sincos_2d(32, 12, 8), want, atol=1e-6)


def test_bfloat16_is_as_close_as_torch():
    theirs = transformer()
    x, context, pooled, t = inputs()
    exact = reference(theirs, x, context, pooled, t)
    tensors = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    cfg = sd3.config(dict(theirs.config), dtype="bfloat16")
    ours = run(load(tensors, sd3.rules(cfg), cfg), x, context, pooled, t)
    half = theirs.to(torch.bfloat16)
    low = reference(half, x.bfloat16(), context.bfloat16(), pooled.bfloat16(), t.bfloat16())
    assert error(np.asarray(ours, np.float32), exact) < 1.2 * error(low, exact)


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="qk_norm='layer_norm'"):
        sd3.config({"qk_norm": "layer_norm"})
    with pytest.raises(ValueError, match="mystery"):
        sd3.config({"mystery": 1})
    defaults = sd3.config({})
    signature = inspect.signature(SD3Transformer2DModel.__init__).parameters
    theirs = [signature[n].default for n in ("num_layers", "num_attention_heads", "pos_embed_max_size", "sample_size")]
    assert [defaults.layers, defaults.heads, defaults.pos_size, defaults.sample_size] == theirs
