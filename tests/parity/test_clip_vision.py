"""CLIP vision encoders against transformers, and against Wan's own class in the original release's naming."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from util_text import error, load, names, randomise, run, write_back  # noqa: E402
from util_wan_original import needs_original, original  # noqa: E402

from convert import clip_vision, registry, single, table  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.vision.clip import CLIPVision, CLIPVisionConfig  # noqa: E402

pytestmark = pytest.mark.torch

H_LIKE = dict(
    hidden_size=32, intermediate_size=50, num_hidden_layers=3, num_attention_heads=4, image_size=29, patch_size=7,
    hidden_act="gelu", layer_norm_eps=1e-5, num_channels=3, projection_dim=20,
)  # fmt: skip
"""29 is no multiple of 7: a row and a column of pixels are not seen."""
L_LIKE = H_LIKE | dict(
    hidden_size=36, num_hidden_layers=4, num_attention_heads=3, image_size=24, patch_size=8, hidden_act="quick_gelu",
    layer_norm_eps=1e-3, num_channels=4, projection_dim=36,
)  # fmt: skip
CASES = {"H": H_LIKE, "L": L_LIKE}
PLAIN, PROJECTED = transformers.CLIPVisionModel, transformers.CLIPVisionModelWithProjection
PUBLISHED = dict(
    architectures=["CLIPVisionModel"], attention_dropout=0.0, dropout=0.0, hidden_act="gelu", hidden_size=1280,
    image_size=224, initializer_factor=1.0, initializer_range=0.02, intermediate_size=5120, layer_norm_eps=1e-05,
    model_type="clip_vision_model", num_attention_heads=16, num_channels=3, num_hidden_layers=32, patch_size=14,
    projection_dim=1024,
)  # fmt: skip
"""image_encoder/config.json of Wan's image-to-video checkpoints."""


def upstream(settings, cls=PROJECTED, seed=0):
    return randomise(cls(transformers.CLIPVisionConfig(**settings)), seed)


def pixels(settings, batch=3, seed=0):
    size, channels = settings["image_size"], settings["num_channels"]
    return np.random.default_rng(seed).normal(size=(batch, size, size, channels)).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def make(cfg):
    return lambda: CLIPVision(cfg, rngs=nnx.Rngs(0))


def ported(folder, dtype="float32"):
    cfg = clip_vision.config(json.loads((folder / "config.json").read_text()), dtype=dtype)
    return load(folder, make(cfg), clip_vision.rules(cfg), {"bfloat16": ml_dtypes.bfloat16}.get(dtype))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{(case, class): (model, folder of save_pretrained)}."""
    out = {}
    for case, cls in (("H", PROJECTED), ("L", PROJECTED), ("H", PLAIN)):
        folder = tmp_path_factory.mktemp(f"{case}-{cls.__name__}")
        model = upstream(CASES[case], cls)
        model.save_pretrained(folder)
        out[case, cls] = model, folder
    return out


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(folders, case):
    model, folder = folders[case, PROJECTED]
    x, module = pixels(CASES[case]), ported(folder)
    with torch.no_grad():
        theirs = model(channels_first(x), output_hidden_states=True)
        pooled = model.vision_model(channels_first(x)).pooler_output
    call = jax.jit(lambda m, x, skip: m(x, skip=skip), static_argnums=2)
    for skip in range(module.cfg.layers):
        ours = call(module, x, skip)
        assert error(ours.states, theirs.hidden_states[-(skip + 2)]) < 1e-5
    assert error(ours.last, theirs.hidden_states[-1]) < 1e-5
    assert error(ours.pooled, pooled) < 1e-5
    assert error(ours.projected, theirs.image_embeds) < 1e-5
    with pytest.raises(ValueError, match=f"skip={module.cfg.layers}; with"):
        module(x, skip=module.cfg.layers)


def test_equals_transformers_without_projection(folders):
    model, folder = folders["H", PLAIN]
    x, module = pixels(H_LIKE), ported(folder)
    assert module.cfg.projection is None
    ours = run(module, x)
    with torch.no_grad():
        theirs = model(channels_first(x), output_hidden_states=True)
    assert error(ours.states, theirs.hidden_states[-2]) < 1e-5
    assert error(ours.projected, theirs.pooler_output) < 1e-5


def test_bfloat16_is_as_good_as_torch(tmp_path):
    """Root mean square over draws of weights: single draws scatter."""
    settings = H_LIKE | dict(num_hidden_layers=8, hidden_size=96, intermediate_size=200)
    errors = []
    for seed in range(3):
        model = upstream(settings, seed=seed)
        model.save_pretrained(tmp_path)
        x = pixels(settings, seed=seed)
        ours = run(ported(tmp_path, "bfloat16"), x)
        assert ours.states.dtype == ours.projected.dtype == jnp.bfloat16
        with torch.no_grad():
            exact = model(channels_first(x), output_hidden_states=True)
            half = model.bfloat16()(channels_first(x), output_hidden_states=True)
        pairs = [(ours.states, half.hidden_states[-2], exact.hidden_states[-2]),
                 (ours.projected, half.image_embeds, exact.image_embeds)]  # fmt: skip
        errors.append([(error(a, want), error(b.float().numpy(), want)) for a, b, want in pairs])
    for got, bound in np.linalg.norm(errors, axis=0):
        assert bound > 1e-3 and got <= 1.2 * bound


@pytest.mark.parametrize("cls", [PROJECTED, PLAIN])
def test_written_back_in_the_published_naming(tmp_path, folders, cls):
    model, folder = folders["H", cls]
    module = ported(folder)
    tensors = write_back(module, clip_vision.rules(module.cfg), tmp_path / "model.safetensors")
    assert all(k.startswith("vision_model.") or k == "visual_projection.weight" for k in names(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(clip_vision.upstream_config(module.cfg)))
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = dict(model.named_parameters())
    assert len(want) == len(tensors)
    for name, value in again.named_parameters():
        assert torch.equal(value, want[name]), name
    assert clip_vision.config(again.config.to_dict() | {"architectures": [cls.__name__]}) == module.cfg


def test_both_namings_and_buffers_load(folders):
    model, folder = folders["H", PLAIN]
    module, x = ported(folder), pixels(H_LIKE)
    want = run(module, x).states
    bare = {k.removeprefix("vision_model."): v.numpy() for k, v in model.state_dict().items()}
    for prefix in ("", "vision_model."):
        tensors = {prefix + k: v for k, v in bare.items()}
        tensors[f"{prefix}embeddings.position_ids"] = np.arange(17)[None]
        tensors["visual_projection.weight"] = np.zeros((20, 32), np.float32)  # the plain class has no use for it
        got = load(tensors, make(module.cfg), clip_vision.rules(module.cfg))
        assert np.array_equal(run(got, x).states, want)
    del tensors["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(table.ConversionError, match=r"vision_model.encoder.layers.1.self_attn.k_proj.bias: missing"):
        load(tensors, make(module.cfg), clip_vision.rules(module.cfg))


@needs_original
@pytest.mark.parametrize("prefix", ["", "visual."])
def test_original_release(prefix):
    """models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth: names, and a config read off the shapes."""
    vit = original("wan_image_encoder").VisionTransformer(
        image_size=28, patch_size=7, dim=32, mlp_ratio=2, out_dim=20, num_heads=16, num_layers=3, activation="gelu"
    )
    vit = randomise(vit)
    tensors = {prefix + k: v.detach().numpy() for k, v in vit.state_dict().items()}
    cfg = single.clip_vision_config({k.removeprefix(prefix): v.shape for k, v in tensors.items()})
    assert cfg == CLIPVisionConfig(width=32, mlp=64, layers=3, heads=16, act="gelu", image_size=28, patch=7)
    cfg = dataclasses.replace(cfg, projection=20)
    rules = clip_vision.original_rules(cfg, prefix)
    module = load(tensors, make(cfg), rules)
    x = pixels(dict(image_size=28, num_channels=3))
    ours = run(module, x)
    with torch.no_grad():
        assert error(ours.states, vit(channels_first(x), use_31_block=True)) < 1e-5
        assert error(ours.last, last := vit(channels_first(x))) < 1e-5
        assert error(ours.projected, vit.post_norm(last[:, 0]) @ vit.head) < 1e-5
    leaves = {sharding.dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    again = {key: op.inverse(leaves[p][i]) for key, p, i, op in table.back(rules, leaves)}
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[k], v) for k, v in tensors.items())
    plain = dataclasses.replace(cfg, projection=None)
    assert np.array_equal(
        run(load(tensors, make(plain), clip_vision.original_rules(plain, prefix)), x).states, ours.states
    )


@pytest.mark.parametrize("cls", [PROJECTED, PLAIN])
def test_published_config_and_size(cls):
    published = PUBLISHED | {"architectures": [cls.__name__]}
    component = registry.COMPONENTS[cls.__name__]
    cfg = component.config(published)
    assert cfg == dataclasses.replace(CLIPVisionConfig(), projection=1024 if cls is PROJECTED else None)
    kept = component.upstream_config(cfg)
    assert {k: v for k, v in published.items() if k in kept and k != "projection_dim"}.items() <= kept.items()
    with torch.device("meta"):
        theirs = cls(transformers.CLIPVisionConfig(**PUBLISHED))
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert sharding.count(component.make(cfg)) == sum(p.numel() for p in theirs.parameters())
    targets = {sharding.dotted(p): leaf for p, leaf in component.targets(cfg).items()}
    assert not table.match(shapes, component.rules(cfg), targets)[1]
    out = jax.eval_shape(lambda: make(cfg)()(jnp.zeros((1, 224, 224, 3))))
    assert out.states.shape == (1, 257, 1280)


@pytest.mark.parametrize("sparse", [{}, {"hidden_size": 32, "num_attention_heads": 4}, {"patch_size": 14}])
def test_sparse_configs_take_the_class_defaults(sparse):
    want = transformers.CLIPVisionConfig(**sparse)
    for name in ("CLIPVisionModel", "CLIPVisionModelWithProjection"):
        cfg = clip_vision.config(sparse, architecture=name)
        assert cfg == clip_vision.config(want.to_dict(), architecture=name)
        assert cfg == clip_vision.config({"model_type": "clip", "vision_config": sparse}, architecture=name)
        back = transformers.CLIPVisionConfig(**clip_vision.upstream_config(cfg))
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "hidden_act",
            "image_size",
            "patch_size",
        ):
            assert getattr(back, key) == getattr(want, key), key


def test_refusals():
    with pytest.raises(ValueError, match="'CLIPModel'; CLIP vision encoders are"):
        clip_vision.config({"architectures": ["CLIPModel"]})
    with pytest.raises(ValueError, match="'mish' is not known"):
        clip_vision.config({"hidden_act": "mish"})
    with pytest.raises(ValueError, match=r"patch_size=\[14, 14\] is not supported: one number"):
        clip_vision.config({"patch_size": [14, 14]})
    with pytest.raises(ValueError, match="patches of 32 pixels do not fit pictures of 16"):
        clip_vision.config({"image_size": 16})
    with pytest.raises(ValueError, match=r"pictures of \(28, 29, 3\); this CLIP vision encoder takes \(29, 29, 3\)"):
        jax.eval_shape(lambda: make(clip_vision.config(H_LIKE))()(jnp.zeros((1, 28, 29, 3))))
