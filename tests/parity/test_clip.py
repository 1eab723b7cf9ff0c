"""CLIP text encoders against transformers."""

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

from convert import clip  # noqa: E402
from convert.table import ConversionError  # noqa: E402
from jdit.nn.text.clip import CLIPText  # noqa: E402

pytestmark = pytest.mark.torch

L_LIKE = dict(
    vocab_size=99, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
    max_position_embeddings=19, projection_dim=20, eos_token_id=2, bos_token_id=0, pad_token_id=1,
)  # fmt: skip
G_LIKE = L_LIKE | dict(hidden_act="gelu", num_hidden_layers=4, eos_token_id=97, projection_dim=36, layer_norm_eps=1e-3)


def upstream(settings, cls=None, seed=0):
    cls = cls or transformers.CLIPTextModelWithProjection
    return randomise(cls(transformers.CLIPTextConfig(**settings)), seed)


def ids(n=13, seed=0):
    """Start 96, text, end 97, padding; the end at different places, twice in row 1 (padding with the end token)."""
    out = np.random.default_rng(seed).integers(3, 95, (2, n))
    out[:, 0] = 96
    out[0, 7:] = [97] + [0] * (n - 8)
    out[1, 4:] = 97
    return out


def ported(folder, dtype="float32", **replace):
    cfg = clip.config(json.loads((folder / "config.json").read_text()), dtype=dtype)
    cfg = dataclasses.replace(cfg, **replace)
    cast = {"bfloat16": ml_dtypes.bfloat16}.get(dtype)
    return load(folder, lambda: CLIPText(cfg, rngs=nnx.Rngs(0)), clip.rules(cfg), cast)


@pytest.mark.parametrize("settings", [L_LIKE, G_LIKE], ids=["L", "G"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_equals_transformers(tmp_path, settings, skip):
    model = upstream(settings)
    model.save_pretrained(tmp_path)
    ours = jax.jit(lambda m, t: m(t, skip=skip))(ported(tmp_path), ids())
    with torch.no_grad():
        theirs = model(torch.tensor(ids()), output_hidden_states=True)
        pooled = model.text_model(torch.tensor(ids())).pooler_output
    assert len(theirs.hidden_states) == settings["num_hidden_layers"] + 1
    assert error(ours.states, theirs.hidden_states[-(skip + 2)]) < 1e-5
    assert error(ours.pooled, pooled) < 1e-5
    assert error(ours.projected, theirs.text_embeds) < 1e-5


def test_equals_transformers_without_projection(tmp_path):
    model = upstream(G_LIKE, transformers.CLIPTextModel)
    model.save_pretrained(tmp_path)
    module = ported(tmp_path)
    assert module.cfg.projection is None
    ours = run(module, ids())
    with torch.no_grad():
        theirs = model(torch.tensor(ids()), output_hidden_states=True)
    assert error(ours.states, theirs.hidden_states[-2]) < 1e-5
    assert error(ours.projected, theirs.pooler_output) < 1e-5


def test_row_without_end_token_pools_as_upstream(tmp_path):
    model = upstream(G_LIKE)
    model.save_pretrained(tmp_path)
    tokens = np.where(ids() == 97, 5, ids())
    with torch.no_grad():
        assert error(run(ported(tmp_path), tokens).projected, model(torch.tensor(tokens)).text_embeds) < 1e-5


@pytest.mark.parametrize("settings", [L_LIKE, G_LIKE], ids=["L", "G"])
def test_bfloat16_is_as_good_as_torch(tmp_path, settings):
    settings = settings | dict(num_hidden_layers=8, hidden_size=96, intermediate_size=200)
    model = upstream(settings, seed=1)
    model.save_pretrained(tmp_path)
    ours = run(ported(tmp_path, "bfloat16"), ids())
    with torch.no_grad():
        exact = model(torch.tensor(ids()), output_hidden_states=True)
        half = model.bfloat16()(torch.tensor(ids()), output_hidden_states=True)
    assert ours.states.dtype == ours.projected.dtype == jnp.bfloat16
    for a, b, want in [
        (ours.states, half.hidden_states[-2], exact.hidden_states[-2]),
        (ours.projected, half.text_embeds, exact.text_embeds),
    ]:
        bound = error(b.detach().float().numpy(), want)
        assert bound > 1e-4 and error(a, want) <= 1.2 * bound


@pytest.mark.parametrize("cls", ["CLIPTextModelWithProjection", "CLIPTextModel"])
def test_written_back_in_the_published_naming(tmp_path, cls):
    cls = getattr(transformers, cls)
    model = upstream(L_LIKE, cls)
    model.save_pretrained(tmp_path)
    module = ported(tmp_path)
    back = tmp_path / "back"
    back.mkdir()
    tensors = write_back(module, clip.rules(module.cfg), back / "model.safetensors")
    assert all(k.startswith("text_model.") or k == "text_projection.weight" for k in names(back))
    (back / "config.json").write_text(json.dumps(clip.upstream_config(module.cfg)))
    again, info = cls.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = dict(model.named_parameters())
    assert len(want) == len(tensors)
    for name, value in again.named_parameters():
        assert torch.equal(value, want[name]), name
    with torch.no_grad():
        assert torch.equal(again.eval()(torch.tensor(ids()))[0], model(torch.tensor(ids()))[0])
    assert np.array_equal(run(ported(back), ids()).projected, run(module, ids()).projected)


def test_both_namings_and_buffers_load(tmp_path):
    model = upstream(L_LIKE, transformers.CLIPTextModel)
    model.save_pretrained(tmp_path)
    module = ported(tmp_path)
    bare = {k.removeprefix("text_model."): v.numpy() for k, v in model.state_dict().items()}
    for prefix in ("", "text_model."):
        tensors = {prefix + k: v for k, v in bare.items()}
        tensors[f"{prefix}embeddings.position_ids"] = np.arange(19)[None]
        got = load(tensors, lambda: CLIPText(module.cfg, rngs=nnx.Rngs(0)), clip.rules(module.cfg))
        assert np.array_equal(run(got, ids()).states, run(module, ids()).states)
    del tensors["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ConversionError, match=r"text_model.encoder.layers.1.self_attn.k_proj.bias: missing"):
        load(tensors, lambda: CLIPText(module.cfg, rngs=nnx.Rngs(0)), clip.rules(module.cfg))


@pytest.mark.parametrize("form", ["layer", "matrix", "outer matrix", "absent"])
def test_single_file_releases(tmp_path, form):
    model = upstream(G_LIKE)  # square projection
    prefix = "text_encoders.clip_g.transformer."
    tensors = {prefix + k: v.numpy() for k, v in model.state_dict().items()}
    tensors["text_encoders.clip_g.logit_scale"] = np.float32(4.6)
    projection = tensors.pop(f"{prefix}text_projection.weight")
    if form == "layer":
        tensors[f"{prefix}text_projection.weight"] = projection
    elif form != "absent":
        outer = "text_encoders.clip_g." if form == "outer matrix" else prefix
        tensors[f"{outer}text_projection"] = projection.T
    cfg = clip.config(G_LIKE)
    implied = clip.implied(cfg, tensors, prefix)
    assert bool(implied) == (form == "absent")
    module = load(tensors | implied, lambda: CLIPText(cfg, rngs=nnx.Rngs(0)), clip.original_rules(cfg, prefix))
    out = run(module, ids())
    with torch.no_grad():
        theirs = model(torch.tensor(ids())).text_embeds
    assert error(out.projected, out.pooled if form == "absent" else theirs) < 1e-5


def test_standalone_file_of_a_release():
    model = upstream(L_LIKE)
    cfg = clip.config(L_LIKE)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()} | {"logit_scale": np.float32(4.6)}
    module = load(tensors, lambda: CLIPText(cfg, rngs=nnx.Rngs(0)), clip.original_rules(cfg))
    with torch.no_grad():
        assert error(run(module, ids()).projected, model(torch.tensor(ids())).text_embeds) < 1e-5


@pytest.mark.parametrize("sparse", [{}, {"hidden_size": 32, "num_attention_heads": 4}])
def test_sparse_configs_take_the_class_defaults(sparse):
    want = transformers.CLIPTextConfig(**sparse)
    full = clip.config(want.to_dict() | {"architectures": ["CLIPTextModelWithProjection"]})
    assert clip.config(sparse) == full
    loaded = transformers.CLIPTextConfig(**clip.upstream_config(full))
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "eos_token_id", "hidden_act"):
        assert getattr(loaded, key) == getattr(want, key), key


def test_refusals():
    with pytest.raises(ValueError, match="'CLIPModel'; CLIP text encoders are"):
        clip.config({"architectures": ["CLIPModel"]})
    with pytest.raises(ValueError, match="'mish' is not known"):
        clip.config({"hidden_act": "mish"})
    module = CLIPText(clip.config(L_LIKE), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="20 tokens; this CLIP text encoder has 19 positions"):
        module(np.zeros((1, 20), np.int32))
    with pytest.raises(ValueError, match="skip=3; with 3 layers it can be 0 to 2"):
        module(ids(), skip=3)
