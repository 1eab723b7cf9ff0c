"""HunyuanVideo's transformer in the layout of the original releases, and every published size."""

import jax
import numpy as np
import pytest
import torch
import util_hunyuan_video
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from transformers import CLIPTextConfig, CLIPTextModel

from convert import hunyuan_video, registry, stream, write
from convert.readers import open_weights
from convert.table import ConversionError, back
from jdit import sharding, zoo
from jdit.nn.hunyuan_video import HunyuanVideoConfig
from jdit.sharding import dotted

pytestmark = pytest.mark.torch

PUBLISHED = {  # variant -> what differs between the releases: transformer/config.json
    "hunyuan-video": {},
    "fasthunyuan": {},
    "hunyuan-video-i2v": dict(image_condition_type="token_replace"),
    "hunyuan-video-i2v-33ch": dict(
        in_channels=33, image_condition_type="latent_concat", guidance_embeds=False
    ),
}  # fmt: skip
BASE = dict(
    attention_head_dim=128, guidance_embeds=True, in_channels=16, mlp_ratio=4.0, num_attention_heads=24, num_layers=20,
    num_refiner_layers=2, num_single_layers=40, out_channels=16, patch_size=2, patch_size_t=1,
    pooled_projection_dim=768, qk_norm="rms_norm", rope_axes_dim=(16, 56, 56), rope_theta=256.0, text_embed_dim=4096,
)  # fmt: skip


def originals(cfg: HunyuanVideoConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the original layout, as the table has them."""
    leaves = {dotted(p): v for p, v in registry.of_config(cfg).targets(cfg).items()}
    whole = lambda leaf, index: np.broadcast_to(np.int8(0), leaf.shape)[index]
    table = back(hunyuan_video.original_rules(cfg), leaves)
    return {key: op.inverse(whole(leaves[path], index)).shape for key, path, index, op in table}


@pytest.mark.parametrize("release", PUBLISHED)
def test_releases_at_full_size(release):
    published = BASE | PUBLISHED[release]
    cfg, component = hunyuan_video.config(published), registry.COMPONENTS[util_hunyuan_video.CLASS]
    assert published.items() <= component.upstream_config(cfg).items()
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(**published)
    assert sharding.count(component.make(cfg)) == sum(p.numel() for p in model.parameters())
    assert zoo.VARIANTS[release].components["transformer"] == cfg
    batch = lambda *shape: jax.ShapeDtypeStruct((2, *shape), np.float32)
    x, inputs = batch(33, 90, 160, cfg.in_channels), (batch(), batch(256, 4096), batch(768))
    guidance = 6e3 if cfg.guidance else None
    out = jax.eval_shape(lambda *a: component.make(cfg)()(*a, guidance, text_lengths=np.array([256, 9])), x, *inputs)
    assert out.shape == (*x.shape[:-1], 16)


def test_names_and_order():
    """Tensors of the published width, and a few columns each, through diffusers' converter: the same leaves."""
    cfg = HunyuanVideoConfig(layers=1, single_layers=1, refiner_layers=1)
    generator = np.random.default_rng(0)
    short = lambda shape: (shape[0], 5) if len(shape) == 2 else shape
    given = {k: generator.standard_normal(short(s)).astype(np.float32) for k, s in originals(cfg).items()}
    upstream = convert_hunyuan_video_transformer_to_diffusers({k: torch.from_numpy(v) for k, v in given.items()})
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1)
    assert upstream.keys() == model.state_dict().keys()
    targets = {dotted(p): v for p, v in registry.of_config(cfg).targets(cfg).items()}
    want = {path: op.forward(given[k]) for k, path, _, op in back(hunyuan_video.original_rules(cfg), targets)}
    got = {path: np.full_like(v, np.nan) for path, v in want.items()}
    stacked = ("blocks.", "singles.", "refiner.blocks.")
    for key, path, index, op in back(hunyuan_video.rules(cfg), targets):
        got[path][(*index[path.startswith(stacked) :], ...)] = op.forward(upstream[key].numpy())
    assert want.keys() == targets.keys()
    assert all(np.array_equal(got[path], want[path]) for path in want)


@pytest.mark.parametrize("kind", ["text", "token_replace", "latent_concat"])
def test_a_release_file(kind, tmp_path):
    kw = util_hunyuan_video.KINDS[kind] | dict(attention_head_dim=32, rope_axes_dim=(4, 14, 14))
    util_hunyuan_video.saved(tmp_path, **kw)
    module = util_hunyuan_video.ported(tmp_path)
    want = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    tensors = {t.key: t.load() for t in write.outputs(want, hunyuan_video.original_rules(module.cfg))}
    state = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    torch.save({"module": state}, tmp_path / "mp_rank_00_model_states.pt")
    told = "token_replace" if kind == "token_replace" else None
    with open_weights(tmp_path / "mp_rank_00_model_states.pt") as reader:
        cfg = hunyuan_video.original_config(reader.keys(), condition=told)
        assert cfg == module.cfg
        targets = registry.of_config(cfg).targets(cfg)
        leaves = stream.load_leaves(reader, hunyuan_video.original_rules(cfg), targets)
    got = {dotted(p): np.asarray(v) for p, v in leaves.items()}
    assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)


def test_another_file():
    shapes = originals(HunyuanVideoConfig(layers=1, single_layers=1, refiner_layers=1, heads=1))
    del shapes["img_in.proj.weight"]
    with pytest.raises(
        ConversionError, match=r"not a HunyuanVideo transformer: tensor img_in\.proj\.weight is missing"
    ):
        hunyuan_video.original_config(shapes)


def test_autoencoder_and_pooled_text_at_full_size():
    parts = zoo.VARIANTS["hunyuan-video"].components
    clip = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        models = {"vae": AutoencoderKLHunyuanVideo(), "text_encoder_2": CLIPTextModel(CLIPTextConfig(**clip))}
    for name, model in models.items():
        make = registry.of_config(parts[name]).make(parts[name])
        assert sharding.count(make) == sum(p.numel() for p in model.parameters()), name
    assert registry.COMPONENTS["AutoencoderKLHunyuanVideo"].config({}) == parts["vae"]
    assert registry.COMPONENTS["CLIPTextModel"].config(clip | {"eos_token_id": 2}) == parts["text_encoder_2"]
