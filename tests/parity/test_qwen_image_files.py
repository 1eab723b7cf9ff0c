"""Qwen-Image's transformer in single files, prefixed and in scaled float8; its releases at full size."""

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import util_qwen_image
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from util_qwen_image import Inputs
from util_sd3 import error

from convert import qwen_image, registry, stream
from convert.readers import open_weights
from convert.table import ConversionError
from jdit import sharding

pytestmark = pytest.mark.torch

PUBLISHED = {  # what transformer/config.json of a release adds to BASE; 2512, Edit and Edit-2509 are as the first
    "Qwen-Image": {},
    "Qwen-Image-Edit-2511": dict(zero_cond_t=True),
    "Qwen-Image-Layered": dict(zero_cond_t=False, use_additional_t_cond=True, use_layer3d_rope=True),
}
BASE = dict(
    attention_head_dim=128, axes_dims_rope=[16, 56, 56], guidance_embeds=False, in_channels=64,
    joint_attention_dim=3584, num_attention_heads=24, num_layers=60, out_channels=16, patch_size=2,
)  # fmt: skip


@pytest.mark.parametrize("release", PUBLISHED)
def test_releases_at_full_size(release):
    published = BASE | PUBLISHED[release]
    cfg, component = qwen_image.config(published), registry.COMPONENTS[util_qwen_image.CLASS]
    back = component.upstream_config(cfg) | {"axes_dims_rope": list(cfg.rope_dims)}
    assert published.items() <= back.items()
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**published)
    assert sharding.count(component.make(cfg)) == sum(p.numel() for p in model.parameters())
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert qwen_image.original_config(shapes | ({qwen_image.ZERO_COND_T: (0,)} if cfg.zero_cond_t else {})) == cfg
    batch = lambda *shape: jax.ShapeDtypeStruct((2, *shape), np.float32)
    x = batch(5, 80, 80, 16) if cfg.layered else batch(166, 166, 16)
    pictures = () if release == "Qwen-Image" else (batch(80, 80, 16),)
    call = lambda x, t, text, n, given: component.make(cfg)()(x, t, text, text_lengths=n, pictures=given)
    out = jax.eval_shape(call, x, batch(), batch(300, 3584), jax.ShapeDtypeStruct((2,), np.int32), pictures)
    assert out.shape == x.shape


@pytest.fixture(scope="module")
def model():
    """Heads that are split as the releases' are, which a file does not tell."""
    kw = dict(zero_cond_t=True, attention_head_dim=32, axes_dims_rope=(4, 14, 14), num_layers=2)
    return util_qwen_image.transformer(**kw)


def opened(file, prefix: str, dtype: str = "float32"):
    """The transformer of a single file."""
    with open_weights(file) as whole, whole.sub(prefix) as reader:
        cfg = qwen_image.original_config(reader.keys(), dtype=dtype)
        component = registry.of_config(cfg)
        leaves = stream.load_leaves(reader, qwen_image.original_rules(cfg), component.targets(cfg))
    return sharding.assemble(component.make(cfg), leaves)


def named(tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Under ComfyUI's mark of Edit-2511 and a prefix."""
    return {prefix + k: v.contiguous() for k, v in [*tensors.items(), (qwen_image.ZERO_COND_T, torch.empty(0))]}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_single_file(model, prefix, tmp_path):
    save_file(named(model.state_dict(), prefix), tmp_path / "x.safetensors")
    module = opened(tmp_path / "x.safetensors", prefix)
    assert module.cfg == qwen_image.config(dict(model.config))
    got = {sharding.dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    want = model.transformer_blocks[1].attn.add_k_proj.weight.detach().numpy()
    assert np.array_equal(got["blocks.context.attn.qkv.kernel"][1, :, 1], want.T)


def quantised(
    tensors: dict[str, torch.Tensor], rows: bool, blocks: tuple[str, ...] = ("transformer_blocks",)
) -> tuple[dict, dict]:
    """Matrices of blocks in float8 with what goes with them, by tensor or by row; and what all of it stands for."""
    out, exact = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if not rows else {}, dict(tensors)
    for key, w in tensors.items():
        out[key] = w
        if not key.startswith(blocks) or w.ndim < 2:
            continue
        base = key.removesuffix(".weight")
        scale = (w.abs().amax(1, keepdim=True) if rows else w.abs().max()) / 448
        scale = scale.to(torch.bfloat16 if rows else torch.float32)
        out[key] = (w / scale.float()).to(torch.float8_e4m3fn)
        exact[key] = out[key].float() * scale.float()
        out[f"{base}.{'weight_scale' if rows else 'scale_weight'}"] = scale
        out[f"{base}.{'input_scale' if rows else 'scale_input'}"] = torch.ones(())
        if rows:
            form = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
            out[f"{base}.comfy_quant"] = torch.tensor(list(form), dtype=torch.uint8)
    return out, exact


@pytest.mark.parametrize("rows", [False, True], ids=["a scale a tensor", "a scale a row"])
def test_scaled_float8(model, rows, tmp_path):
    """The numbers of a torch model that holds the products; the float8 of a tensor is rounded once."""
    tensors, exact = quantised(model.state_dict(), rows)
    save_file(named(tensors, "model.diffusion_model."), tmp_path / "x.safetensors")
    module = opened(tmp_path / "x.safetensors", "model.diffusion_model.")
    theirs = QwenImageTransformer2DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(exact)
    inputs = Inputs(model.config, given=1)
    want = inputs.theirs(theirs)
    call = jax.jit(lambda module, *args, **kw: module(*args, **kw))
    assert error(inputs.ours(call, module), want) < 2e-6
    assert 1e-3 < error(want, inputs.theirs(model)) < 0.2
    half = opened(tmp_path / "x.safetensors", "model.diffusion_model.", "bfloat16")
    kernel = np.asarray(half.blocks.image.mlp.up.kernel.get_value()[0])
    value = exact["transformer_blocks.0.img_mlp.net.0.proj.weight"].numpy().T
    assert np.array_equal(kernel, value.astype(ml_dtypes.bfloat16))


def test_files_that_are_something_else(model, tmp_path):
    tensors = dict(model.state_dict())
    key = "transformer_blocks.0.attn.to_q.weight"
    for change, message in (
        ({key: tensors[key].to(torch.int8)}, f"{key}: int8 for a floating-point parameter"),
        ({f"{key}.absmax": torch.ones(4)}, f"{key}.absmax: no rule takes it"),
        ({"transformer_blocks.0.attn.to_q.bias": None}, "to_q.bias: missing"),
        ({"img_in.weight": None}, "not a Qwen-Image transformer: tensor img_in.weight is missing"),
    ):
        odd = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(named(odd, ""), tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match=message):
            opened(tmp_path / "x.safetensors", "")
