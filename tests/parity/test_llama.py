"""Llama as a text encoder against transformers' LlamaModel and LlamaForCausalLM: states, configs, keys and way back."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from util_text import error, randomise

from convert import llama, registry, single, stream, write
from convert.readers import open_folder
from convert.table import ConversionError
from jdit import sharding, zoo
from jdit.nn.text.decoder import DecoderConfig, RopeScaling
from jdit.sharding import dotted

pytestmark = pytest.mark.torch

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SMALL = dict(
    vocab_size=70, hidden_size=24, intermediate_size=28, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=1, rms_norm_eps=1e-3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
KINDS = {
    "plain": SMALL | dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "stretched": SMALL | dict(
        head_dim=12, num_key_value_heads=3, max_position_embeddings=24, hidden_act="gelu",
        rope_parameters=LLAMA_3 | dict(rope_theta=100.0, original_max_position_embeddings=20),
    ),
}  # fmt: skip
PUBLISHED = {  # text_encoder/config.json of HunyuanVideo
    "architectures": ["LlamaModel"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 128258,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "vocab_size": 128320,
}  # fmt: skip
IDS, LENGTHS = np.random.default_rng(0).integers(3, 70, (2, 29)), (29, 12)


def opened(folder, name: str = llama.CLASS):
    component = registry.COMPONENTS[name]
    cfg = component.config(json.loads((folder / "config.json").read_text()))
    with open_folder(folder) as reader:
        leaves = stream.load_leaves(reader, component.rules(cfg), component.targets(cfg))
    return sharding.assemble(component.make(cfg), leaves)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(upstream's model, ours, its folder); the second as a language model, whose output layer is passed over."""
    folder, config = tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**KINDS[request.param])
    if request.param == "plain":
        whole = theirs = randomise(transformers.LlamaModel(config))
    else:
        whole = randomise(transformers.LlamaForCausalLM(config))
        theirs = whole.model
    whole.save_pretrained(folder)
    return theirs, opened(folder, type(whole).__name__), folder


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_states(pair, skip):
    """`hidden_states` from the end, of right-padded prompts whose mask upstream is given."""
    theirs, ours, _ = pair
    mask = (np.arange(29) < np.array(LENGTHS)[:, None]).astype(int)
    with torch.no_grad():
        want = theirs(torch.tensor(IDS), attention_mask=torch.tensor(mask), output_hidden_states=True).hidden_states
    got = jax.jit(lambda m, ids: m(ids, skip=skip))(ours, IDS)
    for ours_, theirs_, n in zip(got, want[-1 - skip], LENGTHS):
        assert error(ours_[:n], theirs_[:n]) < 1e-5


def test_way_back(pair, tmp_path):
    theirs, ours, _ = pair
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(ours).items()}
    write.write_back(tmp_path, leaves, llama.rules(ours.cfg), llama.upstream_config(ours.cfg), stem="model")
    back, want = load_file(tmp_path / "model.safetensors"), theirs.state_dict()
    assert back.keys() == want.keys() and all(torch.equal(back[k], want[k]) for k in want)
    again = transformers.LlamaModel.from_pretrained(tmp_path)
    assert again.config.rope_parameters == theirs.config.rope_parameters
    with torch.no_grad():
        two = [m(torch.tensor(IDS)).last_hidden_state for m in (again, theirs)]
    assert torch.equal(*two)
    assert registry.from_description(json.loads(json.dumps(registry.describe(ours.cfg)))) == ours.cfg


def test_forms_of_a_config():
    """Of older releases, of transformers 5, sparse, and as published."""
    full = transformers.LlamaConfig(**KINDS["stretched"])
    older = {k: v for k, v in full.to_dict().items() if k != "rope_parameters"} | dict(
        rope_theta=100.0, rope_scaling=LLAMA_3 | dict(original_max_position_embeddings=20)
    )
    assert llama.config(full.to_dict()) == llama.config(older)
    assert llama.config(older).scaling == RopeScaling(8, 1, 4, 20)
    del older["rope_scaling"]["original_max_position_embeddings"]
    assert llama.config(older).scaling == RopeScaling(8, 1, 4, 24)
    plain = lambda cfg: (cfg.head, {**vars(cfg), "head_dim": None})
    assert plain(llama.config({})) == plain(llama.config(transformers.LlamaConfig().to_dict()))
    assert plain(llama.config(PUBLISHED)) == plain(zoo.VARIANTS["hunyuan-video"].components["text_encoder"])
    assert registry.COMPONENTS[llama.CLASS].module is zoo.MODULES[DecoderConfig]


def test_full_size():
    cfg, component = zoo.VARIANTS["hunyuan-video"].components["text_encoder"], registry.COMPONENTS[llama.CLASS]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**PUBLISHED))
    assert sharding.count(component.make(cfg)) == sum(p.numel() for p in model.model.parameters())
    for shapes in (model.state_dict(), model.model.state_dict()):
        assert single.llama_config({k: tuple(v.shape) for k, v in shapes.items()}) == cfg
    with pytest.raises(ConversionError, match=r"not a Llama encoder: tensor embed_tokens\.weight is missing"):
        single.llama_config({})


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mistral"}, "model_type 'mistral'; 'llama' is wanted"),
    ({"attention_bias": True, "mlp_bias": True}, "attention_bias=True is not supported; mlp_bias=True is not"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear' is not supported; 'default' and 'll"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "without low_freq_factor; .* without high_freq_factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported; 1 is"),
    ({"hidden_act": "mish"}, "'mish' is not known"),
    ({"num_key_value_heads": 5}, "heads=32 is not a multiple of kv_heads=5"),
])  # fmt: skip
def test_refused_configs(change, message):
    with pytest.raises(ValueError, match=message):
        llama.config(PUBLISHED | change)
