"""Qwen-Image's transformer and its conversion against diffusers' QwenImageTransformer2DModel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import util_qwen_image
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope, QwenEmbedRope
from safetensors.numpy import load_file
from util_qwen_image import Inputs
from util_sd3 import error, noise

from convert import qwen_image, registry, write
from jdit import sharding, zoo
from jdit.nn import attention_cudnn
from jdit.nn.context_parallel import whole_tiles
from jdit.nn.qwen_image import QwenImageConfig, ms_rope
from jdit.sharding import dotted
from jdit.target import Target, compiling_for

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind -> upstream's model, its port and the folder, each made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("qwen_image")
            model = util_qwen_image.saved(folder, **util_qwen_image.KINDS[kind])
            made[kind] = model, util_qwen_image.ported(folder), folder
        return made[kind]

    return get


call = jax.jit(lambda module, *args, **kw: module(*args, **kw))
velocity = jax.jit(lambda module, *args, **kw: module.velocity(*args, **kw))

CASES = {
    "text to image": ("image", dict()),
    "prompts of one length": ("image", dict(lengths=None)),
    "one picture": ("image", dict(given=1)),
    "two pictures": ("image", dict(given=2)),
    "a larger picture": ("image", dict(given=1, sizes=[(2, 4), (18, 6)])),
    "time 0, no picture": ("edit-2511", dict()),
    "time 0, two pictures": ("edit-2511", dict(given=2)),
    "time 0, layers": ("edit-2511", dict(given=1, made=2)),
    "layers of a picture": ("layered", dict(given=1, made=3)),
    "layers, small": ("layered", dict(given=1, made=5, sizes=[(2, 2), (2, 4)])),
    "one layer": ("layered", dict()),
    "patches of 1": ("patch-1", dict(given=1, sizes=[(5, 3), (4, 7)])),
}


@pytest.mark.parametrize("case", CASES)
def test_velocity(models, case):
    kind, given = CASES[case]
    model, module, _ = models(kind)
    inputs = Inputs(model.config, **given)
    got, want = inputs.ours(call, module), inputs.theirs(model)
    assert got.shape == want.shape and error(got, want) < 2e-6


def test_tokens_are_padded_on_a_gpu(models):
    """Nobody attends to the zeros behind either stream; with given pictures the first ones have rows of their own."""
    model, module, _ = models("edit-2511")
    inputs = Inputs(model.config, given=1)
    with compiling_for(Target("gpu")):
        assert whole_tiles(inputs.text.numpy(), module.cfg.rules).shape[1] > inputs.text.shape[1]
        got = inputs.ours(call, module)
    assert error(got, inputs.theirs(model)) < 2e-6


def test_joined_attention_without_a_mask(models, as_cudnn, monkeypatch):
    """As long sequences are attended to on a GPU, in float32: the texts are written where the picture has room."""
    monkeypatch.setattr(attention_cudnn, "FILL_FROM", 1)
    monkeypatch.setattr(attention_cudnn, "check", lambda q, k: None)
    model, module, _ = models("image")
    inputs = Inputs(model.config, given=1)
    got = inputs.ours(jax.jit(lambda module, *args, **kw: module(*args, **kw)), module)
    assert as_cudnn and not any(masked for masked, *_ in as_cudnn)
    assert error(got, inputs.theirs(model)) < 2e-6


GRIDS = [[(5, 7)], [(6, 4), (11, 3)], [(3, 3), (4, 9), (8, 2)], [(2, 2)] * 4 + [(3, 2)], [(83, 104), (64, 64)]]


@pytest.mark.parametrize("layered", [False, True], ids=["plain", "layered"])
@pytest.mark.parametrize("grids", GRIDS, ids=lambda g: f"{len(g)} of {max(g)}")
def test_rotary_tables(grids, layered):
    dims = (16, 56, 56)
    upstream = (QwenEmbedLayer3DRope if layered else QwenEmbedRope)(theta=10000, axes_dim=list(dims), scale_rope=True)
    pictures, text = upstream([[(1, *g) for g in grids]], max_txt_seq_len=13, device=torch.device("cpu"))
    got = ms_rope(grids, 13, dims, layered=layered)
    for ours, theirs in ((got.cos, "real"), (got.sin, "imag")):
        n = len(pictures)
        assert ours.shape == (n + 13, 64)
        assert error(ours[:n], getattr(pictures, theirs)) < 2e-6 and error(ours[n:], getattr(text, theirs)) < 2e-6


def test_a_block(models):
    """Both streams, image tokens of two times, padded text."""
    model, module, _ = models("edit-2511")
    x, text, emb = noise(4, 2, 23, 32), noise(5, 2, 9, 32), noise(6, 4, 32)
    block, index = model.transformer_blocks[1], (torch.arange(23) >= 15).int().expand(2, 23)
    rope, mask = (
        model.pos_embed([[(1, 3, 5), (1, 2, 4)]], max_txt_seq_len=9),
        torch.arange(9) < torch.tensor([[9], [4]]),
    )
    with torch.no_grad():
        want_text, want = block(x, text, mask, emb, rope, None, index)

    @jax.jit
    def run(module, x, text, emb):
        block = jax.tree.map(lambda a: a[1], module.blocks)
        rows = [block.image.mod(jax.nn.silu(e)) for e in jnp.split(emb, 2)]
        context = block.context.mod(jax.nn.silu(emb[:2]))[:, None]
        turn = ms_rope([(3, 5), (2, 4)], 9, (4, 6, 6))
        lengths = jnp.array([32, 27])
        return block(x, text, jnp.stack(rows, 1), context, first=15, rope=turn, kv_lengths=lengths)

    got, got_text = run(module, x.numpy(), text.numpy(), emb.numpy())
    assert error(got, want) < 2e-6 and error(got_text, want_text) < 2e-6


@pytest.mark.parametrize("kind", ["edit-2511", "layered"])
def test_prepared_steps_equal_the_plain_call(models, kind):
    """A table of all steps, an embedded prompt, and one given picture for the whole batch."""
    model, module, _ = models(kind)
    inputs = Inputs(model.config, given=1)
    x, given = (p.movedim(1, -1).numpy() for p in inputs.pictures)
    t, text, kw = inputs.t.numpy(), inputs.text.numpy(), dict(text_lengths=np.array(inputs.lengths))
    table, states = jax.jit(lambda m, t, text: (m.modulation_table(t), m.embed_text(text)))(module, t, text)
    got = velocity(module, x, jax.tree.map(lambda a: a[1], table), states, pictures=(given[:1],), **kw)
    want = call(module, x, t[1], text, pictures=(np.repeat(given[:1], 2, 0),), **kw)
    assert error(got, want) < 1e-6
    assert table.image.shape[:5] == (2, 3, 1, 2 if kind == "edit-2511" else 1, 6)


@pytest.mark.parametrize("kind", util_qwen_image.KINDS)
def test_parameter_count_and_way_back(models, kind, tmp_path):
    model, module, folder = models(kind)
    assert sharding.count(module) == sum(p.numel() for p in model.parameters())
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    write.write_back(tmp_path, leaves, qwen_image.rules(module.cfg), qwen_image.upstream_config(module.cfg))
    back, tensors = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, folder))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    again = QwenImageTransformer2DModel.from_pretrained(tmp_path)
    plain = lambda v: tuple(v) if isinstance(v, list) else v
    assert all(plain(v) == plain(model.config[k]) for k, v in again.config.items() if not k.startswith("_"))


def test_bfloat16_is_as_close_as_torch(tmp_path):
    """Root mean square over three draws of weights; at times that bfloat16 has, for torch rounds them, too."""
    errors = []
    for seed in range(3):
        model = util_qwen_image.saved(tmp_path, seed=seed, zero_cond_t=True, num_attention_heads=6)
        inputs = Inputs(model.config, given=1)
        inputs.t = torch.tensor([875.0, 125.0])
        exact = inputs.theirs(model)
        got = inputs.ours(call, util_qwen_image.ported(tmp_path, "bfloat16"))
        half = QwenImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        errors.append((error(got, exact), error(inputs.theirs(half), exact)))
    got, bound = np.linalg.norm(errors, axis=0)
    assert bound > 1e-3 and got <= 1.2 * bound


def test_config_fields_and_refusals():
    signature = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if k != "self"}
    assert qwen_image.config({}) == qwen_image.config(defaults) == QwenImageConfig()
    assert qwen_image.upstream_config(QwenImageConfig()) == defaults | {"_class_name": util_qwen_image.CLASS}
    assert qwen_image.config({"pooled_projection_dim": 768}) == QwenImageConfig()  # the first releases have it
    assert qwen_image.config({"in_channels": 12, "out_channels": None}).out_channels == 12
    assert zoo.MODULES[QwenImageConfig] is registry.COMPONENTS[util_qwen_image.CLASS].module
    for given, message in (
        ({"mystery": 1}, r"unknown config fields \['mystery'\]"),
        ({"guidance_embeds": True}, r"guidance_embeds=True \(it may be False\) is not supported"),
        (
            {"axes_dims_rope": [16, 56, 54]},
            "axes_dims_rope=.16, 56, 54. must be three even numbers whose sum is .* 128",
        ),
        ({"in_channels": 66}, "in_channels=66 must be a multiple of patch_size.2 = 4"),
        ({"num_layers": None}, "num_layers is null"),
    ):
        with pytest.raises(ValueError, match=message):
            qwen_image.config(given)


def test_sizes_that_do_not_fit(models):
    _, module, _ = models("image")
    shaped = lambda *sizes: np.zeros((1, *sizes, 4), np.float32)
    refused = lambda x, *given: jax.eval_shape(call, module, x, 1.0, np.zeros((1, 3, 24), np.float32), pictures=given)
    for args in ((shaped(5, 4),), (shaped(4, 4), shaped(5, 4))):
        with pytest.raises(ValueError, match=r"latents of \(1, 5, 4\) do not divide into patches of \(1, 2, 2\)"):
            refused(*args)
