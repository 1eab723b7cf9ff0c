"""Every family's transformer and every autoencoder: eight devices give the numbers of one, on each kind of mesh."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import util_random
from flax import nnx

from convert import registry
from jdit import sharding, zoo
from jdit.nn.cogvideox import CogVideoX, CogVideoXConfig
from jdit.nn.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from jdit.nn.mmdit import MMDiT, MMDiTConfig
from jdit.nn.qwen_image import QwenImage, QwenImageConfig
from jdit.nn.vae.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jdit.nn.vae.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from jdit.nn.vae.autoencoder_kl_cogvideox_config import AutoencoderKLCogVideoXConfig
from jdit.nn.vae.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from jdit.nn.vae.autoencoder_kl_hunyuan_video_config import AutoencoderKLHunyuanVideoConfig
from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.nn.wan import Wan, WanConfig
from jdit.nn.wan_animate import WanAnimate
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.sharding import Rules, make_mesh, planned_mesh
from jdit.target import Target, compiling_for

PLACES = {
    "data8": (dict(data=8), Rules()),
    "sequence8": (dict(sequence=8), Rules()),
    "tensor8": (dict(tensor=8), Rules()),
    "2x2x2": (dict(data=2, sequence=2, tensor=2), Rules()),
    "fsdp": (dict(data=2, sequence=4), Rules(embed=("data", "sequence"))),
}
BATCH = 8


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Case(NamedTuple):
    """A network, and what it is called with. `spread`: a kernel, and the mesh axes of its last two dims."""

    module: type[Any]
    cfg: Any
    call: Callable[..., Any]
    inputs: tuple[Any, ...]
    spread: str | None = None


def transformer(module: type[Any], cfg: Any, spread: str, *inputs: Any, **named: Any) -> Case:
    return Case(module, cfg, lambda m, a, k: m(*a, **k), (inputs, named), spread)


def autoencoder(module: type[Any], cfg: Any, latents: tuple[int, ...], pixels: tuple[int, ...]) -> Case:
    moments = lambda vae, x: (p := vae.encode(x)) and (p.mean, p.logvar)
    call = lambda vae, z, x: (vae.decode(z), moments(vae, x))
    return Case(module, cfg, call, (noise(BATCH, *latents) * 0.3, noise(BATCH, *pixels)))


T = np.linspace(10, 990, BATCH, dtype=np.float32)
TEXT = noise(BATCH, 8, 24, seed=2)
UNEQUAL = np.array([8, 3, 5, 8, 1, 7, 8, 2], np.int32)
WAN = dict(heads=8, head_dim=8, in_channels=14, out_channels=5, text_dim=24, freq_dim=16, mlp=40, layers=2)
CASES = {
    "sd3": transformer(
        MMDiT,
        MMDiTConfig(
            sample_size=16, layers=3, heads=8, head_dim=8, joint_dim=24, pooled_dim=16, pos_size=8, dual_layers=(0,),
            qk_norm="rms_norm",
        ),
        "blocks.1.image.attn.qkv.kernel",
        noise(BATCH, 16, 6, 16), T, TEXT, noise(BATCH, 16),
    ),
    "wan": transformer(
        Wan, WanConfig(**WAN, image_dim=12, image_keys=True), "blocks.attn.qkv.kernel",
        noise(BATCH, 2, 8, 8, 14), np.repeat(T[:, None], 32, 1), TEXT, noise(BATCH, 5, 12),
    ),
    "wan-animate": transformer(
        WanAnimate,
        WanAnimateConfig(
            **WAN, image_dim=12, image_keys=True, group=2, face_channels=(4, 6, 8), motion_features=10,
            motion_directions=4, motion_width=12, face_width=8, face_tokens=3,
        ),
        "blocks.attn.qkv.kernel",
        noise(BATCH, 4, 2, 6, 14), T, TEXT, noise(BATCH, 5, 12), noise(BATCH, 3, 2, 6, 5), noise(BATCH, 9, 16, 16, 3),
    ),
    "cogvideox": transformer(
        CogVideoX,
        CogVideoXConfig(
            heads=8, head_dim=16, in_channels=6, out_channels=4, time_dim=16, text_dim=24, layers=2, sample_width=8,
            sample_height=8, sample_frames=9, text_tokens=8, rotary=True,
        ),
        "blocks.attn.qkv.kernel",
        noise(BATCH, 3, 8, 8, 6), T, TEXT,
    ),
    "qwen-image": transformer(
        QwenImage,
        QwenImageConfig(
            in_channels=4, out_channels=4, layers=2, heads=8, head_dim=12, text_dim=24, rope_dims=(4, 4, 4),
            zero_cond_t=True,
        ),
        "blocks.image.attn.qkv.kernel",
        noise(BATCH, 8, 8, 4), T, TEXT, text_lengths=UNEQUAL, pictures=(noise(BATCH, 4, 8, 4),),
    ),
    "hunyuan-video": transformer(
        HunyuanVideo,
        HunyuanVideoConfig(
            in_channels=4, out_channels=4, layers=2, single_layers=2, refiner_layers=1, heads=8, head_dim=12,
            text_dim=24, pooled_dim=16, rope_dims=(4, 4, 4), condition="token_replace",
        ),
        "singles.attn.qkv.kernel",
        noise(BATCH, 3, 4, 6, 4), T, TEXT, noise(BATCH, 16), T * 6, text_lengths=UNEQUAL,
    ),
    "autoencoder of sd3": autoencoder(
        AutoencoderKL, AutoencoderKLConfig(channels=(4, 8), latent_channels=3, layers=1, groups=2),
        (16, 7, 3), (32, 14, 3),
    ),
    "autoencoder of wan 2.1": autoencoder(
        AutoencoderKLWan,
        AutoencoderKLWanConfig(
            width=4, latent_channels=3, multipliers=(1, 2), layers=1, temporal=(True,), space_factor=2, time_factor=2,
        ),
        (3, 16, 5, 3), (5, 32, 10, 3),
    ),
    "autoencoder of wan 2.2": autoencoder(
        AutoencoderKLWan,
        AutoencoderKLWanConfig(
            width=4, decoder_width=8, latent_channels=3, multipliers=(1, 1), layers=1, temporal=(True,), residual=True,
            in_channels=12, out_channels=12, patch=2, space_factor=4, time_factor=2,
        ),
        (3, 16, 3, 3), (5, 64, 12, 3),
    ),
    "autoencoder of cogvideox": autoencoder(
        AutoencoderKLCogVideoX, AutoencoderKLCogVideoXConfig(channels=(4, 8), latent_channels=3, layers=1, groups=2),
        (3, 16, 3, 3), (9, 32, 6, 3),
    ),
    "autoencoder of hunyuan-video": autoencoder(
        AutoencoderKLHunyuanVideo,
        AutoencoderKLHunyuanVideoConfig(channels=(2, 4, 4), latent_channels=3, layers=1, groups=2, space_factor=4),
        (3, 8, 3, 3), (9, 32, 12, 3),
    ),
}  # fmt: skip


def make(case: Case, rules: Rules) -> Callable[[], nnx.Module]:
    cfg = dataclasses.replace(case.cfg, rules=rules)
    return sharding.Make(case.module, cfg)


# on newer versions of Python and jax the transformers are enough
@pytest.fixture(
    scope="module",
    params=[pytest.param(c, id=n, marks=[] if c.spread else pytest.mark.slow) for n, c in CASES.items()],
)
def alone(request):
    """A case, its random leaves (norms and biases too), and what one device makes of them."""
    case = request.param
    values = util_random.values(make(case, Rules()))
    module = sharding.assemble(make(case, Rules()), values)
    return case, values, jax.tree.map(np.asarray, jax.jit(case.call)(module, *case.inputs))


# on newer versions of Python and jax one mesh of all axes is enough
@pytest.mark.parametrize(
    "sizes, rules",
    [pytest.param(*p, id=n, marks=[] if n == "2x2x2" else pytest.mark.slow) for n, p in PLACES.items()],
)
def test_eight_devices_equal_one(alone, sizes, rules):
    case, values, want = alone
    mesh = make_mesh(**sizes)
    leaves = sharding.abstract(make(case, rules), mesh, rules)[1]
    placed = sharding.assemble(make(case, rules), {p: jax.device_put(v, leaves[p].sharding) for p, v in values.items()})
    with jax.set_mesh(mesh):
        got = jax.block_until_ready(jax.jit(case.call)(placed, *case.inputs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b)
    if not case.spread and "sequence" in sizes:
        assert "sequence" in got[0].sharding.spec  # rows of the decoded picture are apart
    if case.spread:
        kernel = {sharding.dotted(p): leaf for p, leaf in leaves.items()}[case.spread]
        ways = (8 if rules.embed else 1) * sizes.get("tensor", 1)
        assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * ways == np.prod(kernel.shape)


TRANSFORMERS = {name: case for name, case in CASES.items() if case.spread}


@pytest.mark.slow
@pytest.mark.parametrize("alone", TRANSFORMERS.values(), ids=TRANSFORMERS, indirect=True)
@pytest.mark.parametrize(
    "sizes, exchange",
    [({}, "auto"), (dict(data=2, sequence=2, tensor=2), "auto"), (dict(data=2, sequence=2, tensor=2), "gather")],
    ids=["one", "2x2x2", "gathered"],
)
def test_padding_on_a_gpu(alone, sizes, exchange):
    """There, tokens are padded to whole tiles on each device, which no result shows."""
    case, values, want = alone
    mesh, rules = make_mesh(**sizes) if sizes else None, Rules(exchange=exchange)
    leaves = sharding.abstract(make(case, rules), mesh, rules)[1]
    place = lambda p, v: v if mesh is None else jax.device_put(v, leaves[p].sharding)
    module = sharding.assemble(make(case, rules), {p: place(p, v) for p, v in values.items()})
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext(), compiling_for(Target("gpu")):
        got = jax.jit(case.call)(module, *case.inputs)
    assert np.linalg.norm(np.asarray(got) - want) <= 1e-5 * np.linalg.norm(want)


WIDTH, TENSOR = ("data", "sequence"), "tensor"
SPECS = {  # what a parameter is called -> how its last dimensions are spread under FSDP, on a mesh of all axes
    r"(q|k|v|up)\.kernel": (WIDTH, TENSOR),
    r"(qkv|kv|image_kv|mod|time_mod|final_mod)\.kernel": (WIDTH, None, TENSOR),
    r"(qkv|kv|image_kv|q|up|mod|time_mod|final_mod)\.bias": (TENSOR,),
    r"(down|out)\.kernel": (TENSOR, WIDTH),
    r"(down|out|patch|text|context|pose|proj)\.bias": (WIDTH,),
    r"(patch|text|context|pose|proj)\.kernel": (None, WIDTH),
    r"pos": (WIDTH,),
    r"final\.kernel": (WIDTH, None),
    r"(final|token|basis|.*norm.*|conv.*|linear.*|skip|.*table)(\.(kernel|bias|scale))?": (None,),
}
OTHERS = {  # their inputs are of another width than the model's
    r"(time|guidance|pooled|refiner\.time|refiner\.pooled|ofs)\.up\.kernel": (None, TENSOR),
    r"motion\.out\.kernel|face\.out\.kernel": (None, WIDTH),
}


@pytest.mark.parametrize("case", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_specs_of_parameters(case):
    rules = Rules.fsdp()
    leaves = sharding.abstract(make(case, rules), planned_mesh(data=2, sequence=2, tensor=2), rules)[1]
    for path, leaf in leaves.items():
        whole, last = sharding.dotted(path), [p for p in map(str, path) if not p.isdigit()]
        near = ".".join(last[-2:]) if last[-1] in ("kernel", "bias", "scale") else last[-1]
        want = next((v for n, v in OTHERS.items() if re.search(rf"(^|\.)({n})$", whole)), None)
        want = want or next(v for n, v in SPECS.items() if re.fullmatch(n, near))
        spec = tuple(leaf.sharding.spec) + (None,) * (len(leaf.shape) - len(leaf.sharding.spec))
        assert spec[-len(want) :] == want and not any(spec[: -len(want)]), whole


FULL = {
    cfg: f"{name} {part}"
    for name, variant in reversed(zoo.VARIANTS.items())
    for part, cfg in variant.components.items()
    if part != "vae"  # autoencoders are small, and whole on every device
}


@pytest.mark.slow
@pytest.mark.parametrize("cfg", FULL, ids=FULL.values())
def test_full_size_weights_are_spread(cfg):
    """Of 8 devices each has an eighth of the weights under FSDP, but for 3%, and of a transformer's two eighths at most
    by heads and MLPs alone. What is whole on a device is small."""

    def held(rules, **sizes):
        targets = registry.of_config(cfg).targets(registry.placed(cfg, "bfloat16", rules), planned_mesh(**sizes), rules)
        return {sharding.dotted(p): sharding.bytes_a_device(leaf) for p, leaf in targets.items()}

    alone, spread = held(Rules()), held(Rules.fsdp(), data=2, sequence=4)
    assert 8 * sum(spread.values()) < 1.03 * sum(alone.values())
    assert max(n for p, n in spread.items() if n == alone[p]) < 2e-3 * sum(alone.values())
    if "transformer" in FULL[cfg]:
        assert 8 * sum(held(Rules.tensor(), tensor=8).values()) < 2 * sum(alone.values())
