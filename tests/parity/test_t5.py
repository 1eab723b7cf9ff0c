"""T5 and UMT5 encoders against transformers."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402
from util_text import error, load, names, randomise, run, write_back  # noqa: E402

from convert import t5  # noqa: E402
from jdit.nn.text.t5 import T5, relative_buckets  # noqa: E402

pytestmark = pytest.mark.torch

V1_1 = dict(
    vocab_size=90, d_model=40, d_kv=12, d_ff=56, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=12, relative_attention_max_distance=20, layer_norm_epsilon=1e-5,
    tie_word_embeddings=False,
)  # fmt: skip
V1_0 = V1_1 | dict(feed_forward_proj="relu", layer_norm_epsilon=1e-6)
CASES = {"v1.1": (V1_1, "T5"), "v1.0": (V1_0, "T5"), "silu": (V1_1 | {"feed_forward_proj": "gated-silu"}, "T5"),
         "umt5": (V1_1, "UMT5")}  # fmt: skip
LENGTHS = np.array([29, 11])


def upstream(settings, family, seed=0):
    """Random weights; queries as small as T5's own init has them, since its scores are not divided by sqrt(kv)."""
    config = getattr(transformers, f"{family}Config")(**settings)
    model = randomise(getattr(transformers, f"{family}EncoderModel")(config), seed)
    for name, p in model.named_parameters():
        if name.endswith("SelfAttention.q.weight"):
            p.data *= settings["d_kv"] ** -0.5
    return model


def ids(n=29):
    out = np.random.default_rng(0).integers(2, 90, (2, n))
    out[1, 10:] = [1] + [0] * (n - 11)
    return out


def ported(folder, dtype="float32"):
    cfg = t5.config(json.loads((folder / "config.json").read_text()), dtype=dtype)
    cast = {"bfloat16": ml_dtypes.bfloat16}.get(dtype)
    return load(folder, lambda: T5(cfg, rngs=nnx.Rngs(0)), t5.rules(cfg), cast)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(tmp_path, case):
    model = upstream(*CASES[case])
    model.save_pretrained(tmp_path)
    module = ported(tmp_path)
    tokens = torch.tensor(ids())
    mask = torch.arange(29)[None] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        open_, masked = model(tokens)[0], model(tokens, attention_mask=mask)[0]
    assert error(run(module, ids()), open_) < 1e-5
    assert error(run(module, ids(), LENGTHS), masked) < 1e-5
    assert error(open_.numpy(), masked) > 1e-3  # the mask matters


@pytest.mark.parametrize("case", ["v1.1", "v1.0", "umt5"])
def test_bfloat16_is_as_good_as_torch(tmp_path, case):
    """Root mean square over four draws of weights: single draws scatter by a third either way."""
    settings, family = CASES[case]
    errors = []
    for seed in range(4):
        model = upstream(settings | dict(num_layers=8, d_model=96, d_ff=160), family, seed)
        model.save_pretrained(tmp_path)
        ours = run(ported(tmp_path, "bfloat16"), ids())
        assert ours.dtype == jnp.bfloat16
        half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}  # wo too: only float16 keeps it in float32
        with torch.no_grad():
            exact, rough = model(torch.tensor(ids()))[0], half(torch.tensor(ids()))[0]
        errors.append((error(ours, exact), error(rough.float().numpy(), exact)))
    got, bound = np.linalg.norm(errors, axis=0)
    assert bound > 1e-3 and got <= 1.2 * bound


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (12, 20), (64, 300)])
def test_buckets(buckets, distance):
    n = 700
    offsets = torch.arange(1 - n, n)
    want = T5Attention._relative_position_bucket(offsets, True, buckets, distance)
    assert np.array_equal(relative_buckets(n, buckets, distance), want.numpy())


@pytest.mark.parametrize("case", CASES)
def test_written_back(tmp_path, case):
    settings, family = CASES[case]
    model = upstream(settings, family)
    model.save_pretrained(tmp_path)
    module = ported(tmp_path)
    back = tmp_path / "back"
    back.mkdir()
    write_back(module, t5.rules(module.cfg), back / "model.safetensors")
    assert sorted(names(back)) == sorted(names(tmp_path))
    (back / "config.json").write_text(json.dumps(t5.upstream_config(module.cfg)))
    again, info = type(model).from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(torch.tensor(ids()))[0], model(torch.tensor(ids()))[0])
    assert t5.config(again.config.to_dict()) == module.cfg


@pytest.mark.parametrize("which", ["shared.weight", "encoder.embed_tokens.weight", "both"])
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_single_file_releases(which, prefix):
    model = upstream(V1_1, "T5")
    tensors = {prefix + k: v.numpy() for k, v in model.state_dict().items()}
    table = tensors[f"{prefix}shared.weight"]
    for key in ("shared.weight", "encoder.embed_tokens.weight"):
        tensors.pop(prefix + key, None)
        if which in (key, "both"):
            tensors[prefix + key] = table
    tensors[prefix.removesuffix("transformer.") + "logit_scale"] = np.float32(4.6)
    tensors[f"{prefix}spiece_model"] = np.zeros(9, np.uint8)
    cfg = t5.config(V1_1)
    module = load(tensors, lambda: T5(cfg, rngs=nnx.Rngs(0)), t5.original_rules(cfg, prefix))
    with torch.no_grad():
        assert error(run(module, ids()), model(torch.tensor(ids()))[0]) < 1e-5


@pytest.mark.parametrize("family", ["T5", "UMT5"])
def test_sparse_configs_take_the_class_defaults(family):
    sparse = {"model_type": family.lower()}
    full = getattr(transformers, f"{family}Config")().to_dict()
    assert t5.config(sparse) == t5.config(full)
    assert full["feed_forward_proj"] == t5.upstream_config(t5.config(sparse))["feed_forward_proj"]


def test_refusals():
    with pytest.raises(ValueError, match="model_type 'mt5x'; T5 encoders are"):
        t5.config({"model_type": "mt5x"})
    with pytest.raises(ValueError, match="'mish' is not known"):
        t5.config({"feed_forward_proj": "gated-mish"})
