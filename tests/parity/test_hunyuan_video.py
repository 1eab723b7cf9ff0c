"""HunyuanVideo's transformer and its conversion against diffusers' HunyuanVideoTransformer3DModel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import util_hunyuan_video
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from safetensors.numpy import load_file
from util_hunyuan_video import LENGTHS, Inputs
from util_sd3 import error, noise

from convert import hunyuan_video, registry, write
from jdit import sharding, zoo
from jdit.nn import parts
from jdit.nn.hunyuan_video import HunyuanVideoConfig
from jdit.sharding import Rules, dotted, make_mesh

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind -> upstream's model, its port and the folder, each made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("hunyuan_video")
            model = util_hunyuan_video.saved(folder, **util_hunyuan_video.KINDS[kind])
            made[kind] = model, util_hunyuan_video.ported(folder), folder
        return made[kind]

    return get


call = jax.jit(lambda module, *args, **kw: module(*args, **kw))


@pytest.mark.parametrize("kind", util_hunyuan_video.KINDS)
def test_velocity(models, kind):
    """Most of what is left is torch's exp, which is one unit off in three frequencies: at a guidance of 6000 that moves
    a feature by 2e-4 (at 10, all is within 1e-6)."""
    model, module, _ = models(kind)
    inputs = Inputs(model.config)
    got, want = inputs.ours(call, module), inputs.theirs(model)
    assert got.shape == want.shape and error(got, want) < (1e-5 if model.config.guidance_embeds else 3e-6)


def test_prompts_without_padding(models):
    model, module, _ = models("no guidance")
    inputs = Inputs(model.config, lengths=(max(LENGTHS),) * 2, sizes=(1, 2, 6))  # a picture
    assert error(inputs.ours(call, module), inputs.theirs(model)) < 3e-6


def test_refined_text(models):
    """Tokens of the prompts; what becomes of padding nobody reads."""
    model, module, _ = models("text")
    inputs = Inputs(model.config)
    with torch.no_grad():
        want = model.context_embedder(inputs.text, inputs.t, inputs.mask)
    embed = jax.jit(lambda m, *a, **kw: m.embed_text(*a, **kw))
    got = embed(module, inputs.t.numpy(), inputs.text.numpy(), text_lengths=np.array(LENGTHS))
    for ours, theirs, n in zip(got, want, LENGTHS):
        assert error(ours[:n], theirs[:n]) < 2e-6


def test_blocks(models):
    """One block of two streams and one of one, with a first frame of another time and padded text."""
    model, module, _ = models("token_replace")
    x, text, emb, zero = noise(4, 2, 24, 32), noise(5, 2, 7, 32), noise(6, 2, 32), noise(7, 2, 32)
    rope = model.rope(torch.zeros(1, 4, 4, 4, 6))
    mask = (torch.arange(24 + 7) < 24 + torch.tensor(LENGTHS)[:, None])[:, None, None]
    with torch.no_grad():
        double = model.transformer_blocks[1](x, text, emb, mask, rope, zero, 6)
        single = model.single_transformer_blocks[2](x, text, emb, mask, rope, zero, 6)

    @jax.jit
    def run(module, x, text, emb, zero):
        double, single = (jax.tree.map(lambda a, i=i: a[i], b) for b, i in ((module.blocks, 1), (module.singles, 2)))
        kw = dict(first=6, rope=module.rope((4, 2, 3), 7), kv_lengths=24 + jnp.array(LENGTHS))
        rows, after = jax.nn.silu(jnp.stack([zero, emb], 1)), jax.nn.silu(emb[:, None])
        out = double(x, text, double.image.mod(rows), double.context.mod(after), **kw)
        return out, single(jnp.concatenate([x, text], 1), single.mod(rows), **kw)

    given = (a.numpy() for a in (x, text, emb, zero))
    got_double, got_single = run(module, *given)
    assert all(error(got, want) < 2e-6 for got, want in zip(got_double, double))
    assert error(got_single, torch.cat(single, 1)) < 2e-6


@pytest.mark.parametrize("grid", [(1, 5, 3), (33, 45, 80)], ids=str)
def test_rotary_tables(models, grid):
    upstream = HunyuanVideoRotaryPosEmbed(2, 1, [4, 6, 6], 256.0)
    frames, rows, columns = grid
    want = upstream(torch.zeros(1, 1, frames, 2 * rows, 2 * columns))
    got = models("text")[1].rope(grid, 3)
    n = frames * rows * columns
    for ours, theirs, rest in zip(got, want, (1, 0)):
        assert error(ours[:n], theirs[:, ::2]) < 2e-6 and np.array_equal(ours[n:], np.full((3, 8), rest))


@pytest.mark.parametrize("kind", ["token_replace", "latent_concat"])
def test_prepared_steps_equal_the_plain_call(models, kind):
    """Tables of all steps, made without the loop's weights, and a step without theirs."""
    _, module, _ = models(kind)
    x, t, text, pooled, guidance = Inputs(models(kind)[0].config).given()
    lengths = np.array(LENGTHS)

    def prepare(m, t, text):
        return m.modulation_table(t, pooled, guidance), m.text_table(t, text, text_lengths=lengths)

    def step(m, x, row, text):
        return m.velocity(x, row, text, text_lengths=lengths)

    first, loop = (parts.take(module, p) for p in (parts.MODULATION, parts.LOOP))
    table, states = jax.jit(prepare)(first, t, text)
    got = jax.jit(step)(loop, x, jax.tree.map(lambda a: a[1], table), states[1])
    want = call(module, x, t[1], text, pooled, guidance, text_lengths=lengths)
    assert error(got, want) < 1e-6
    assert states.shape == (2, 2, 7, 32) and table.final.shape == (2, 2, 2, 32)
    assert table.video.shape == (2, 2, 2, 2 if kind == "token_replace" else 1, 6, 32)


@pytest.mark.parametrize("kind", util_hunyuan_video.KINDS)
def test_parameter_count_and_way_back(models, kind, tmp_path):
    model, module, folder = models(kind)
    assert sharding.count(module) == sum(p.numel() for p in model.parameters())
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    write.write_back(tmp_path, leaves, hunyuan_video.rules(module.cfg), hunyuan_video.upstream_config(module.cfg))
    back, tensors = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, folder))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    again = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path)
    plain = lambda v: tuple(v) if isinstance(v, list) else v
    want = model.config | {"out_channels": model.config.out_channels or model.config.in_channels}
    assert all(plain(v) == plain(want[k]) for k, v in again.config.items() if not k.startswith("_"))


def test_bfloat16_is_as_close_as_torch(tmp_path):
    """Root mean square over three draws of weights; at times and guidance that bfloat16 has: torch rounds them."""
    errors = []
    for seed in range(3):
        model = util_hunyuan_video.saved(
            tmp_path, seed=seed, image_condition_type="token_replace", num_attention_heads=6
        )
        inputs = Inputs(model.config)
        inputs.t, inputs.guidance = torch.tensor([876.0, 125.0]), torch.tensor([4096.0, 1024.0])
        exact = inputs.theirs(model)
        got = inputs.ours(call, util_hunyuan_video.ported(tmp_path, "bfloat16"))
        half = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        errors.append((error(got, exact), error(inputs.theirs(half), exact)))
    got, bound = np.linalg.norm(errors, axis=0)
    assert bound > 1e-3 and got <= 1.2 * bound


@pytest.mark.parametrize("sizes", [dict(data=2, sequence=2, tensor=2), dict(sequence=8)], ids=["2x2x2", "sequence8"])
def test_eight_devices_equal_one(sizes, tmp_path):
    model = util_hunyuan_video.saved(tmp_path, image_condition_type="token_replace", num_attention_heads=8)
    inputs = Inputs(model.config, sizes=(4, 4, 8))
    want = inputs.ours(call, util_hunyuan_video.ported(tmp_path))
    mesh, rules = make_mesh(**sizes), Rules(embed="data")
    with jax.set_mesh(mesh):
        module = util_hunyuan_video.ported(tmp_path, mesh=mesh, rules=rules)
        got = inputs.ours(call, module)
    assert error(got, want) < 1e-5
    for kernel in (module.singles.attn.qkv.kernel, module.singles.out.kernel, module.refiner.blocks.mlp.up.kernel):
        kernel = kernel.get_value()
        assert kernel.addressable_shards[0].data.size == kernel.size // (sizes.get("data", 1) * sizes.get("tensor", 1))


def test_config_fields_and_refusals(models):
    signature = inspect.signature(HunyuanVideoTransformer3DModel.__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if k != "self"}
    assert hunyuan_video.config({}) == hunyuan_video.config(defaults) == HunyuanVideoConfig()
    assert hunyuan_video.upstream_config(HunyuanVideoConfig()) == defaults | {"_class_name": util_hunyuan_video.CLASS}
    assert hunyuan_video.config({"in_channels": 12, "out_channels": None}).out_channels == 12
    assert zoo.MODULES[HunyuanVideoConfig] is registry.COMPONENTS[util_hunyuan_video.CLASS].module
    for given, message in (
        ({"mystery": 1}, r"unknown config fields \['mystery'\]"),
        ({"mlp_ratio": 2.5}, "mlp_ratio=2.5 must be a whole number"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is not supported; there are None and 'rms_norm'"),
        ({"image_condition_type": "pose"}, "image_condition_type='pose'; there are None, 'latent_concat', 'token_re"),
        ({"rope_axes_dim": [16, 56, 54]}, "rope_axes_dim=.16, 56, 54. must be three even numbers whose sum is .* 128"),
        ({"num_layers": None}, "num_layers is null"),
    ):
        with pytest.raises(ValueError, match=f"HunyuanVideoTransformer3DModel: .*{message}"):
            hunyuan_video.config(given)


def test_inputs_that_do_not_fit(models):
    x, t, text, pooled, guidance = Inputs(models("text")[0].config).given()
    refused = lambda kind, x, guidance: jax.eval_shape(call, models(kind)[1], x, t, text, pooled, guidance)
    for args, message in (
        (("text", x[:, :, :5], guidance), r"latents of \(4, 5, 10\) do not divide into patches of \(1, 2, 2\)"),
        (("text", x, None), "guidance=None: this transformer needs the guidance scale"),
        (("no guidance", x, guidance), "this transformer takes no embedded guidance"),
    ):
        with pytest.raises(ValueError, match=message):
            refused(*args)
