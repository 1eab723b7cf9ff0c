"""UMT5 as Wan uses it: Wan's prompt rules, the original release's naming, configs. The encoder itself: test_t5.py."""

import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from util_text import error, load, randomise  # noqa: E402
from util_tokenizers import t5_folder  # noqa: E402
from util_wan_original import needs_original, original  # noqa: E402

from convert import registry, single, t5, table, tokenizers  # noqa: E402
from jdit import sharding  # noqa: E402
from jdit.nn.text.clean import clean  # noqa: E402
from jdit.nn.text.t5 import T5  # noqa: E402

pytestmark = pytest.mark.torch

SETTINGS = dict(
    vocab_size=90, d_model=40, d_kv=12, d_ff=56, num_layers=3, num_heads=3, relative_attention_num_buckets=12,
    relative_attention_max_distance=20, layer_norm_epsilon=1e-5, model_type="umt5",
)  # fmt: skip
PUBLISHED = dict(
    architectures=["UMT5EncoderModel"], classifier_dropout=0.0, d_ff=10240, d_kv=64, d_model=4096,
    decoder_start_token_id=0, dense_act_fn="gelu_new", dropout_rate=0.1, eos_token_id=1, feed_forward_proj="gated-gelu",
    initializer_factor=1.0, is_encoder_decoder=True, is_gated_act=True, layer_norm_epsilon=1e-06, model_type="umt5",
    num_decoder_layers=24, num_heads=64, num_layers=24, output_past=True, pad_token_id=0,
    relative_attention_max_distance=128, relative_attention_num_buckets=32, scalable_attention=True,
    tie_word_embeddings=False, tokenizer_class="T5Tokenizer", torch_dtype="bfloat16", use_cache=True,
    vocab_size=256384,
)  # fmt: skip
"""text_encoder/config.json of the Wan checkpoints."""


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def upstream(settings=SETTINGS):
    settings = {k: v for k, v in settings.items() if k != "model_type"}
    model = randomise(transformers.UMT5EncoderModel(transformers.UMT5Config(**settings)))
    for name, p in model.named_parameters():
        if name.endswith("SelfAttention.q.weight"):
            p.data *= 12**-0.5
    return model


def make(cfg):
    return lambda: T5(cfg, rngs=nnx.Rngs(0))


def test_prompts_as_wan_encodes_them(tmp_path):
    """Cleaned, padded, masked, cut to length and filled up with zeros, by the pipeline's own method."""
    from diffusers import WanPipeline

    model, folder = upstream(), t5_folder(tmp_path)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)
    pipe = types.SimpleNamespace(text_encoder=model, tokenizer=tokenizer, _execution_device=torch.device("cpu"))
    prompts = ["a  photo of\n a cat ", "", "two &amp;amp; dogs <pad> surfing" + " and dogs" * 40, "fish"]
    with torch.no_grad():
        want = WanPipeline._get_t5_prompt_embeds(pipe, prompts, max_sequence_length=23)
    ids, lengths = tokenizers.load(folder).encode_with_lengths([clean(p) for p in prompts], 23)
    cfg = t5.config(SETTINGS)
    module = load(tensors_of(model), make(cfg), t5.rules(cfg))
    got = jax.jit(lambda m, *a: m.padded(*a))(module, ids, lengths)
    assert lengths[1] == 1 and lengths[2] == 23 and 1 < lengths[0] < 23
    assert error(got, want) < 1e-5
    assert not np.any(got[1, 1:]) and not np.any(want[1, 1:].numpy())


@needs_original
@pytest.mark.parametrize("shared", [False, True])
def test_original_release(shared):
    """models_t5_umt5-xxl-enc-bf16.pth: names, and a config read off the shapes."""
    wan = original("wan_text_encoder").WanTextEncoder(90, 40, 36, 56, 3, 3, 32, shared, device="cpu")
    wan = randomise(wan)
    for name, p in wan.named_parameters():
        if name.endswith("attn.q.weight"):
            p.data *= 12**-0.5
    tensors = tensors_of(wan)
    cfg = single.umt5_config({k: v.shape for k, v in tensors.items()})
    assert (cfg.kv, cfg.layers, cfg.shared_bias, cfg.act) == (12, 3, shared, "gelu_new")
    module = load(tensors, make(cfg), t5.umt5_rules(cfg))
    ids = np.random.default_rng(0).integers(2, 90, (2, 29))
    lengths = np.array([29, 11])
    mask = torch.arange(29)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        want = wan(torch.tensor(ids), mask)
    got = jax.jit(lambda m, *a: m(*a))(module, ids, lengths)
    assert error(got[0], want[0]) < 1e-5 and error(got[1, :11], want[1, :11]) < 1e-5
    leaves = {sharding.dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    again = {key: op.inverse(leaves[p][i]) for key, p, i, op in table.back(t5.umt5_rules(cfg), leaves)}
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[k], v) for k, v in tensors.items())


def test_single_file_in_transformers_names():
    """As repackaged for other programs: names of transformers, no config, the tokenizer as bytes."""
    model = upstream(SETTINGS | dict(relative_attention_max_distance=128, layer_norm_epsilon=1e-6))
    tensors = tensors_of(model) | {"spiece_model": np.zeros(9, np.uint8)}
    del tensors["encoder.embed_tokens.weight"]
    cfg = single.umt5_config({k: v.shape for k, v in tensors.items()})
    module = load(tensors, make(cfg), t5.umt5_rules(cfg))
    ids = np.random.default_rng(0).integers(2, 90, (2, 9))
    with torch.no_grad():
        assert error(jax.jit(lambda m, t: m(t))(module, ids), model(torch.tensor(ids))[0]) < 1e-5


def test_original_release_without_a_tensor():
    with pytest.raises(table.ConversionError, match=r"not a Wan UMT5 encoder: tensor blocks.0.pos_embedding"):
        single.umt5_config({"token_embedding.weight": (9, 4)})


def test_published_config_and_size():
    component = registry.COMPONENTS["UMT5EncoderModel"]
    cfg = component.config(PUBLISHED)
    kept = component.upstream_config(cfg)
    assert {k: PUBLISHED[k] for k in kept} == kept
    with torch.device("meta"):
        theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**PUBLISHED))
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items() if k != "encoder.embed_tokens.weight"}
    assert sharding.count(component.make(cfg)) == sum(int(np.prod(s)) for s in shapes.values())
    targets = {sharding.dotted(p): leaf for p, leaf in component.targets(cfg).items()}
    assert not table.match(shapes, component.rules(cfg), targets)[1]
    original_names = {k for r in t5.umt5_rules(cfg) if not r.alias for k, _, _ in table.expand(r, targets)}
    assert len(original_names) == 24 * 10 + 2


@pytest.mark.parametrize("kind", ["t5", "umt5"])
@pytest.mark.parametrize(
    "given",
    [
        dict(hidden_size=32, num_hidden_layers=3, head_dim=5, num_attention_heads=2),
        dict(feed_forward_proj="gated-gelu", dense_act_fn="relu", is_gated_act=False),
    ],
    ids=["second names", "activation"],
)
def test_config_keys_that_upstream_takes_too(kind, given):
    theirs = {"t5": transformers.T5Config, "umt5": transformers.UMT5Config}[kind].from_dict(dict(given))
    assert t5.config(given | {"model_type": kind}) == t5.config(theirs.to_dict())
    assert t5.config(given, architecture=f"{kind.upper()}EncoderModel") == t5.config(theirs.to_dict())


def test_refuses_a_decoder():
    with pytest.raises(ValueError, match="is_decoder=True is not supported"):
        t5.config({"is_decoder": True})
