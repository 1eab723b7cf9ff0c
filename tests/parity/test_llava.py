"""LLaVA against transformers: states of prompts with pictures, layouts and sizes."""

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
from util_llava import TEXT, TOKENS, VISION, pictures, ported, prompts, read, theirs, upstream  # noqa: E402
from util_text import error, load, names, write_back  # noqa: E402

from convert import llava as conv  # noqa: E402
from convert import registry, table  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.text.llava import Llava, LlavaConfig  # noqa: E402

pytestmark = pytest.mark.torch

PUBLISHED = dict(
    architectures=["LlavaForConditionalGeneration"], ignore_index=-100, image_token_index=128257, model_type="llava",
    pad_token_id=128258, projector_hidden_act="gelu", torch_dtype="float16", transformers_version="4.40.1",
    text_config=dict(
        architectures=["LlamaForCausalLM"], bos_token_id=128000, eos_token_id=128001, intermediate_size=14336,
        max_position_embeddings=8192, model_type="llama", num_key_value_heads=8, rms_norm_eps=1e-05,
        rope_theta=500000.0, torch_dtype="float16", vocab_size=128320,
    ),
    vision_config=dict(
        architectures=["CLIPVisionModel"], dropout=0.0, hidden_size=1024, image_size=336, intermediate_size=4096,
        model_type="clip_vision_model", num_attention_heads=16, num_hidden_layers=24, patch_size=14,
        projection_dim=768, torch_dtype="float32",
    ),
    vision_feature_layer=-2, vision_feature_select_strategy="default",
)  # fmt: skip
"""config.json of llava-llama-3-8b-v1_1, the text_encoder of HunyuanVideo's image to video."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, folder of save_pretrained)."""
    folder = tmp_path_factory.mktemp("llava")
    model = upstream()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def module(saved):
    return ported(saved[1])


encode = jax.jit(lambda m, ids, pixels, skip: m(ids, m.features(pixels), skip=skip), static_argnums=3)


def real(states, lengths):
    """The rows' states that are not padding, one after another."""
    return jnp.concatenate([jnp.asarray(s)[:n] for s, n in zip(states, lengths)])


def test_states_of_prompts_with_pictures(saved, module):
    """Unequal prompts, a picture each or one for both, the last state and the one that HunyuanVideo takes."""
    ids, lengths = prompts()
    pixels = pictures()
    for skip in (0, 2):
        want = real(theirs(saved[0], ids, lengths, pixels, skip), lengths)
        assert error(real(encode(module, ids, pixels, skip), lengths), want) < 1e-5
    want = real(theirs(saved[0], ids, lengths, pixels[[1, 1]], 2), lengths)
    assert error(real(encode(module, ids, pixels[1:], 2), lengths), want) < 1e-5
    assert module.cfg.tokens == TOKENS


@pytest.mark.parametrize("settings", [
    dict(vision_feature_layer=-1, vision_feature_select_strategy="full", projector_hidden_act="gelu_new"),
    dict(vision_feature_layer=1), dict(vision_feature_layer=-4),
], ids=str)  # fmt: skip
def test_settings(tmp_path, settings):
    model = upstream(1, **settings)
    model.save_pretrained(tmp_path)
    ours = ported(tmp_path)
    ids, lengths = prompts(ours.cfg.tokens)
    got = encode(ours, ids, pictures(), 1)
    assert error(real(got, lengths), real(theirs(model, ids, lengths, pictures(), 1), lengths)) < 1e-5
    assert conv.config(conv.upstream_config(ours.cfg)) == ours.cfg


def test_bfloat16_is_as_good_as_torch(tmp_path):
    """Root mean square over draws of weights: single draws scatter."""
    (ids, lengths), pixels, errors = prompts(), pictures(), []
    for seed in range(3):
        model = upstream(seed)
        model.save_pretrained(tmp_path)
        got = encode(ported(tmp_path, "bfloat16"), ids, pixels, 2)
        assert got.dtype == jnp.bfloat16
        exact = real(theirs(model, ids, lengths, pixels, 2), lengths)
        half = real(theirs(model.bfloat16(), ids, lengths, pixels, 2), lengths)
        errors.append((error(real(got, lengths), exact), error(half, exact)))
    got, bound = np.linalg.norm(errors, axis=0)
    assert bound > 1e-3 and got <= 1.2 * bound


def test_namings_and_way_back(tmp_path, saved, module):
    model, folder = saved
    tensors = write_back(module, conv.rules(module.cfg), tmp_path / "model.safetensors")
    assert {k.split(".")[0] for k in tensors} == {"language_model", "vision_tower", "multi_modal_projector"}
    (tmp_path / "config.json").write_text(json.dumps(conv.upstream_config(module.cfg)))
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) <= {"lm_head.weight"} and not info["unexpected_keys"]
    assert again.config.pad_token_id == model.config.pad_token_id
    want = model.state_dict()
    for name, value in again.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(value, want[name]), name
    assert read(tmp_path) == read(folder) == module.cfg
    leaves = sharding.leaves(module)
    own = {k: v.numpy() for k, v in model.state_dict().items()}  # transformers 5's own names
    bare = {k: v.numpy() for k, v in model.model.state_dict().items()}  # without output layer
    older = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in own.items()}  # 4.52's
    for of in (tensors, own, bare, older):
        got = load(of, lambda: Llava(module.cfg, rngs=nnx.Rngs(0)), conv.rules(module.cfg))
        assert all(np.array_equal(v, leaves[p]) for p, v in sharding.leaves(got).items())
    assert any(k.startswith("language_model.model.layers.") for k in names(folder))


@pytest.mark.parametrize("sizes", [dict(data=2, sequence=2, tensor=2)], ids=str)
def test_eight_devices_equal_one(module, sizes):
    (ids, _), pixels = prompts(), pictures()
    ids, pixels = np.tile(ids, (4, 1)), np.tile(pixels, (4, 1, 1, 1))
    want = encode(module, ids, pixels, 2)
    make, mesh = lambda: Llava(module.cfg, rngs=nnx.Rngs(0)), sharding.make_mesh(**sizes)
    _, leaves = sharding.abstract(make, mesh, sharding.Rules())
    placed = {p: jax.device_put(v, leaves[p].sharding) for p, v in sharding.leaves(module).items()}
    with jax.set_mesh(mesh):
        got = encode(sharding.assemble(make, placed), ids, pixels, 2)
    assert error(got, np.asarray(want)) < 1e-5


def test_published_config_and_size():
    cfg = conv.config(PUBLISHED)
    assert cfg == LlavaConfig() and cfg.tokens == 576
    kept = conv.upstream_config(cfg)
    for part in (None, "text_config", "vision_config"):
        mine, published = (kept, PUBLISHED) if part is None else (kept[part], PUBLISHED[part])
        same = {k: v for k, v in published.items() if k in mine and not isinstance(v, dict)}
        if part is not None:  # the whole models that the parts were taken from
            same = {k: v for k, v in same.items() if k not in ("architectures", "projection_dim")}
        assert {k: mine[k] for k in same} == same
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**copy.deepcopy(PUBLISHED)))
    make = lambda: Llava(cfg, rngs=nnx.Rngs(0))
    assert sharding.count(make) == sum(p.numel() for p in model.model.parameters())
    targets = {sharding.dotted(p): leaf for p, leaf in sharding.abstract(make)[1].items()}
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert not table.match(shapes, conv.rules(cfg), targets)[1]
    ids, picture = jax.ShapeDtypeStruct((2, 934), jnp.int32), jax.ShapeDtypeStruct((1, 336, 336, 3), jnp.float32)
    run = lambda ids, picture: (m := make())(ids, m.features(picture), skip=2)
    assert jax.eval_shape(run, ids, picture).shape == (2, 934, 4096)


@pytest.mark.parametrize("sparse", [{}, {"text_config": TEXT}, {"vision_config": {"model_type": "clip_vision_model"}}])
def test_sparse_configs_take_the_class_defaults(sparse):
    full = transformers.LlavaConfig(**copy.deepcopy(sparse)).to_dict()
    assert conv.config(sparse) == conv.config(full)


def test_description_comes_back(module):
    """A jdit checkpoint keeps the config as JSON."""
    cfg = dataclasses.replace(module.cfg, dtype="bfloat16")
    described = json.loads(json.dumps(registry.describe(cfg)))
    assert "dtype" not in json.dumps(described) and "rules" not in json.dumps(described)
    assert registry.from_description(described) == module.cfg
    component = registry.COMPONENTS[conv.CLASS]
    assert component.module is Llava and registry.of_config(module.cfg) is component


@pytest.mark.parametrize("change, message", [
    ({"text_config": {"model_type": "qwen2"}}, "text_config.model_type='qwen2' is not supported; 'llama' is"),
    ({"vision_config": VISION | {"model_type": "siglip_vision_model"}}, "vision_config.model_type='siglip_vision_mod"),
    ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer=\[-2, -5\] is not supported: one number is"),
    ({"vision_feature_layer": 25}, "feature_layer=25; with 24 layers it can be -25 to 24"),
    ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls'; there are default, full"),
    ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False is not supported"),
    ({"projector_hidden_act": "mish"}, "'mish' is not known"),
])  # fmt: skip
def test_refused_configs(change, message):
    with pytest.raises(ValueError, match=message):
        conv.config(PUBLISHED | change)
