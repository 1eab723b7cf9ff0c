"""Qwen2.5-VL against transformers: language model, vision tower, prompts with pictures, layouts and sizes."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from util_qwen2_5_vl import (  # noqa: E402
    IMAGE,
    SIZES,
    pictures,
    ported,
    prompts,
    read,
    upstream,
    upstream_pixels,
)
from util_text import error, load, names, randomise, run, write_back  # noqa: E402

from convert import decoder as decoder_rules  # noqa: E402
from convert import qwen2_5_vl as conv  # noqa: E402
from convert import registry, single, table  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.text.decoder import Decoder, DecoderConfig, RopeScaling, decoder_rope  # noqa: E402
from jdit.nn.text.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig, picture_positions  # noqa: E402
from jdit.nn.vision.qwen2_5_vl import Qwen2_5VisionConfig, layout  # noqa: E402

pytestmark = pytest.mark.torch

GRIDS = [(h // 8, w // 8) for h, w in SIZES]
PUBLISHED = dict(
    architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151645, hidden_act="silu", hidden_size=3584, image_token_id=151655, initializer_range=0.02,
    intermediate_size=18944, max_position_embeddings=128000, max_window_layers=28, model_type="qwen2_5_vl",
    num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-06,
    rope_scaling={"mrope_section": [16, 24, 24], "type": "mrope"}, rope_theta=1000000.0, sliding_window=32768,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
    video_token_id=151656, vision_end_token_id=151653, vision_start_token_id=151652, vision_token_id=151654,
    vocab_size=152064,
    vision_config=dict(
        depth=32, fullatt_block_indexes=[7, 15, 23, 31], hidden_act="silu", hidden_size=1280, in_chans=3,
        intermediate_size=3420, model_type="qwen2_5_vl", num_heads=16, out_hidden_size=3584, patch_size=14,
        spatial_merge_size=2, spatial_patch_size=14, temporal_patch_size=2, tokens_per_second=2, window_size=112,
    ),
)  # fmt: skip
"""config.json of Qwen2.5-VL-7B-Instruct, which Qwen-Image's text_encoder is."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, folder of save_pretrained)."""
    folder = tmp_path_factory.mktemp("qwen")
    model = upstream()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def module(saved):
    return ported(saved[1])


def masked(model, ids, lengths, **more):
    """Upstream's states with the mask of its pipelines."""
    mask = torch.tensor(np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]).long()
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=mask, output_hidden_states=True, **more).hidden_states


def real(states, lengths):
    """The rows' states that are not padding, one after another."""
    return jnp.concatenate([jnp.asarray(s)[:n] for s, n in zip(states, lengths)])


def test_language_model(saved, module):
    """Unequal prompts padded on the right, every state that `skip` gives."""
    ids, lengths = prompts([])
    theirs = masked(saved[0], ids, lengths)
    states = jax.jit(lambda m, ids, skip: m(ids, skip=skip), static_argnums=2)
    for skip in (0, 2):
        want = real(theirs[-1 - skip].numpy(), lengths)
        assert error(real(states(module, ids, skip), lengths), want) < 1e-5
    with pytest.raises(ValueError, match="skip=4; with 3 layers it can be 0 to 3"):
        module(ids, skip=4)


def test_left_padding_gives_the_same_states(saved, module):
    """A release of the reference that pads on the left: distances between tokens are the same."""
    ids, lengths = prompts([])
    left = np.stack([np.roll(row, len(row) - n) for row, n in zip(ids, lengths)])
    mask = torch.tensor(np.arange(ids.shape[1]) >= (ids.shape[1] - lengths)[:, None]).long()
    with torch.no_grad():
        out = saved[0](input_ids=torch.tensor(left), attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    want = jnp.concatenate([jnp.asarray(s)[-n:] for s, n in zip(out.numpy(), lengths)])
    assert error(real(run(module, ids), lengths), want) < 1e-5


@pytest.mark.parametrize("sizes", [SIZES, [(32, 48)]], ids=["several", "even"])
def test_vision_tower(saved, module, sizes):
    """Cut windows at the edges, whole ones, a picture smaller than a window; a batch of pictures is the singles."""
    pics = pictures(sizes)
    pixels, grid = upstream_pixels(pics)
    with torch.no_grad():
        want = saved[0].model.visual(pixels, grid_thw=grid).pooler_output
    other = pictures(sizes, seed=1)
    tower = jax.jit(lambda m, pics: m.vision(pics))
    got = tower(module, [np.concatenate(pair) for pair in zip(pics, other)])
    assert error(got[0], want) < 1e-5
    assert error(got[1:], np.asarray(tower(module, other))) < 1e-5


def test_windows_and_positions_are_upstreams():
    from transformers import vision_utils

    cfg = Qwen2_5VisionConfig()
    grids = [(9, 5), (4, 8), (1, 3)]
    thw = torch.tensor([[1, 2 * h, 2 * w] for h, w in grids])
    windows, whole, positions = layout(grids, cfg)
    index, bounds = vision_utils.get_vision_window_index(thw, 2, 112, 14)
    sizes = np.diff(bounds.numpy())
    assert windows.lengths.tolist() == sizes.tolist()
    flat = np.concatenate([row[:n] for row, n in zip(windows.index, windows.lengths)])
    assert flat.reshape(-1, 4)[:, 0].tolist() == (4 * index).tolist()
    assert windows.index.reshape(-1)[windows.place].tolist() == list(range(len(flat)))
    assert whole.lengths.tolist() == thw.prod(-1).tolist()
    assert positions.tolist() == vision_utils.get_vision_position_ids(thw, 2).tolist()


def test_prompts_with_pictures(saved, module):
    """3D positions, as with upstream's token types; features once for both prompts, and zeros after each."""
    model, grids = saved[0], GRIDS
    ids, lengths = prompts(grids)
    pics = pictures()
    pixels, grid = upstream_pixels(pics)
    types = torch.tensor(ids == IMAGE).int()
    more = dict(pixel_values=pixels.repeat(2, 1), image_grid_thw=grid.repeat(2, 1), mm_token_type_ids=types)
    theirs = masked(model, ids, lengths, **more)[-1].numpy()
    positions = picture_positions(ids, grids, IMAGE)
    encode = jax.jit(lambda m, ids, n, pics, at: m.padded(ids, n, 2, m.vision(pics), at))
    got = encode(module, ids, lengths, pics, positions)
    assert error(real(got, lengths - 2), real(theirs[:, 2:], lengths - 2)) < 1e-5
    assert got.shape[1] == ids.shape[1] - 2 and not np.asarray(got[1, lengths[1] - 2 :]).any()
    # numbered like text, as a reference that loses the token types does, the states are others
    flat = masked(model, ids, lengths, **(more | {"mm_token_type_ids": None}))[-1].numpy()
    assert error(real(flat, lengths), real(theirs, lengths)) > 1e-2
    mask = torch.tensor(np.arange(ids.shape[1]) < lengths[:, None]).long()
    want, _ = model.model.get_rope_index(torch.tensor(ids), types, grid.repeat(2, 1), attention_mask=mask)
    assert real(positions, lengths).tolist() == real(want.permute(1, 2, 0).numpy(), lengths).tolist()


def test_bfloat16_is_as_good_as_torch(tmp_path):
    """Root mean square over draws of weights: single draws scatter."""
    ids, lengths = prompts(GRIDS[:2])
    pics = pictures(SIZES[:2])
    pixels, grid = upstream_pixels(pics)
    more = dict(
        pixel_values=pixels.repeat(2, 1),
        image_grid_thw=grid.repeat(2, 1),
        mm_token_type_ids=torch.tensor(ids == IMAGE).int(),
    )
    positions, errors = picture_positions(ids, GRIDS[:2], IMAGE), []
    encode = jax.jit(lambda m, ids, pics, at: (f := m.vision(pics), m(ids, f, at)))
    for seed in range(3):
        model = upstream(seed)
        model.save_pretrained(tmp_path)
        features, states = encode(ported(tmp_path, "bfloat16"), ids, pics, positions)
        assert features.dtype == states.dtype == jnp.bfloat16
        exact = masked(model, ids, lengths, **more)[-1].numpy()
        with torch.no_grad():
            seen = model.model.visual(pixels, grid_thw=grid).pooler_output
            model.bfloat16()
            half_seen = model.model.visual(pixels.bfloat16(), grid_thw=grid).pooler_output
        half = masked(model, ids, lengths, **more)[-1].float().numpy()
        errors.append([
            (error(features[0], seen), error(half_seen.float().numpy(), seen)),
            (error(real(states, lengths), real(exact, lengths)), error(real(half, lengths), real(exact, lengths))),
        ])  # fmt: skip
    for got, bound in np.linalg.norm(errors, axis=0):
        assert bound > 1e-3 and got <= 1.2 * bound


def test_namings_and_way_back(tmp_path, saved, module):
    model, folder = saved
    assert "model.embed_tokens.weight" in names(folder) and "visual.merger.ln_q.weight" in names(folder)
    tensors = write_back(module, conv.rules(module.cfg), tmp_path / "model.safetensors")
    assert sorted([*tensors, "lm_head.weight"]) == sorted(names(folder))
    (tmp_path / "config.json").write_text(json.dumps(conv.upstream_config(module.cfg)))
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) <= {"lm_head.weight"} and not info["unexpected_keys"]
    want = model.state_dict()
    for name, value in again.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(value, want[name]), name
    assert read(tmp_path) == read(folder) == module.cfg
    ids = prompts([])[0]
    expected = run(module, ids)
    for of in (model.state_dict(), model.model.state_dict()):  # transformers 5's own names, and without output layer
        tensors = {k: v.numpy() for k, v in of.items()}
        got = load(tensors, lambda: Qwen2_5VL(module.cfg, rngs=nnx.Rngs(0)), conv.rules(module.cfg))
        assert np.array_equal(run(got, ids), expected)


def test_without_vision_tower(saved, module):
    alone = ported(saved[1], vision=False)
    assert alone.cfg.vision is None and not hasattr(alone, "vision")
    ids = prompts([])[0]
    assert np.array_equal(run(alone, ids), run(module, ids))
    back = conv.upstream_config(alone.cfg)
    assert "vision_config" not in back and conv.config(back, vision=False) == alone.cfg


@pytest.mark.parametrize("sizes", [dict(data=2, sequence=2, tensor=2)], ids=str)
def test_eight_devices_equal_one(saved, module, sizes):
    ids, _ = prompts(GRIDS[:2])
    ids, pics = np.tile(ids, (4, 1)), [np.tile(p, (8, 1, 1, 1)) for p in pictures(SIZES[:2])]
    positions = picture_positions(ids, GRIDS[:2], IMAGE)
    encode = jax.jit(lambda m, ids, pics, at: m(ids, m.vision(pics), at))
    want = encode(module, ids, pics, positions)
    make, mesh = lambda: Qwen2_5VL(module.cfg, rngs=nnx.Rngs(0)), sharding.make_mesh(**sizes)
    _, leaves = sharding.abstract(make, mesh, sharding.Rules())
    placed = {p: jax.device_put(v, leaves[p].sharding) for p, v in sharding.leaves(module).items()}
    with jax.set_mesh(mesh):
        got = encode(sharding.assemble(make, placed), ids, pics, positions)
    assert error(got, np.asarray(want)) < 1e-5


@pytest.mark.parametrize("vision", [True, False])
def test_published_config_and_size(vision):
    cfg = conv.config(PUBLISHED, vision=vision)
    assert cfg == dataclasses.replace(Qwen2_5VLConfig(), **({} if vision else {"vision": None}))
    kept = conv.upstream_config(cfg)
    assert all(kept[k] == v for k, v in PUBLISHED.items() if k in kept and k != "vision_config")
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(**copy.deepcopy(PUBLISHED))
        )
    parts = [model.model.language_model, *([model.model.visual] if vision else [])]
    make = lambda: Qwen2_5VL(cfg, rngs=nnx.Rngs(0))
    assert sharding.count(make) == sum(p.numel() for part in parts for p in part.parameters())
    targets = {sharding.dotted(p): leaf for p, leaf in sharding.abstract(make)[1].items()}
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert not table.match(shapes, conv.rules(cfg), targets)[1]
    assert single.qwen2_5_vl_config({k: v for k, v in shapes.items() if vision or ".visual." not in k}) == cfg
    if vision:
        picture, ids, at = (
            jnp.zeros((1, 364, 392, 3)),
            jnp.zeros((2, 300), jnp.int32),
            jnp.zeros((2, 300, 3), jnp.int32),
        )
        features = jax.eval_shape(lambda: make().vision([picture]))
        assert features.shape == (1, 13 * 14, 3584)
        assert jax.eval_shape(lambda f: make()(ids, f, at), features).shape == (2, 300, 3584)


def test_llama_is_the_same_module():
    """No biases, one axis of positions, stretched wavelengths, head dims that do not make up the width."""
    rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    }  # fmt: skip
    settings = dict(
        vocab_size=70, hidden_size=24, intermediate_size=28, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=12, rms_norm_eps=1e-3, rope_parameters=rope,
    )  # fmt: skip
    model = randomise(transformers.LlamaModel(transformers.LlamaConfig(**settings)))
    cfg = DecoderConfig(
        vocab_size=70, width=24, mlp=28, layers=3, heads=3, kv_heads=1, head_dim=12, eps=1e-3, qkv_bias=False,
        theta=100.0, sections=None, scaling=RopeScaling(8, 1, 4, 24),
    )  # fmt: skip
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    ours = load(tensors, lambda: Decoder(cfg, rngs=nnx.Rngs(0)), decoder_rules.rules(cfg, ""))
    ids, lengths = np.random.default_rng(0).integers(0, 70, (2, 29)), np.array([29, 12])
    theirs = masked(model, ids, lengths)
    for skip in (0, 2):
        got = jax.jit(lambda m, ids: m(ids, skip=skip))(ours, ids)  # noqa: B023
        assert error(real(got, lengths), real(theirs[-1 - skip].numpy(), lengths)) < 1e-5
    want = model.rotary_emb(torch.zeros(1), torch.arange(40)[None])
    assert error(decoder_rope(cfg, jnp.arange(40)[:, None]).cos, want[0][0, :, :6]) < 1e-5


@pytest.mark.parametrize(
    "sparse", [{}, {"hidden_size": 4096, "num_attention_heads": 32, "vision_config": {"depth": 3}}]
)
def test_sparse_configs_take_the_class_defaults(sparse):
    full = transformers.Qwen2_5_VLConfig(**sparse).to_dict()
    part = dict(
        vision_config={"out_hidden_size": full["text_config"]["hidden_size"], **sparse.get("vision_config", {})}
    )
    full["vision_config"]["out_hidden_size"] = full["text_config"]["hidden_size"]
    assert conv.config(sparse | part) == conv.config(full)


def test_description_comes_back(module):
    """A jdit checkpoint keeps the config as JSON."""
    cfg = dataclasses.replace(module.cfg, dtype="bfloat16")
    described = json.loads(json.dumps(registry.describe(cfg)))
    assert "dtype" not in json.dumps(described) and "rules" not in json.dumps(described)
    assert registry.from_description(described) == module.cfg
    component = registry.COMPONENTS[conv.CLASS]
    assert component.module is Qwen2_5VL and registry.of_config(module.cfg) is component


@pytest.mark.parametrize("change, message", [
    ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
    ({"use_sliding_window": True, "max_window_layers": 20}, "use_sliding_window"),
    ({"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
    ({"hidden_act": "mish"}, "'mish' is not known"),
    ({"vision_config": {"patch_size": [14, 14]}}, r"vision_config.patch_size=\[14, 14\]"),
    ({"vision_config": {"out_hidden_size": 20}}, "vision.out=20 must be the language model's width 3584"),
    ({"num_key_value_heads": 5}, "heads=28 is not a multiple of kv_heads=5"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, "must add up to half of the head dim, 64"),
])  # fmt: skip
def test_refused_configs(change, message):
    with pytest.raises(ValueError, match=message):
        conv.config(PUBLISHED | change)


def test_refused_inputs(module):
    with pytest.raises(ValueError, match="sides that are multiples of 8"):
        module.vision([jnp.zeros((1, 12, 8, 3))])
    with pytest.raises(ValueError, match="need `positions`"):
        module(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 2, 40)))
    ids = np.array([[5, IMAGE, IMAGE, 5, IMAGE]])
    with pytest.raises(ValueError, match=r"prompt 0 has 3 picture tokens, its pictures make 4: \[\(2, 2\)\]"):
        picture_positions(ids, [(2, 2)], IMAGE)
    with pytest.raises(ValueError, match="the 3 tokens of a picture do not follow"):
        picture_positions(ids, [(1, 3)], IMAGE)
