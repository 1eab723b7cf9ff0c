"""Every family at full size lowers for TPUs, kernels included, on a machine that has none."""

import contextlib
import dataclasses
import re

import jax
import programs
import pytest

from jdit import sharding, zoo
from jdit.sharding import make_mesh
from jdit.target import Target, compiling_for

CHIP = Target("tpu", "TPU v6 lite")
KERNEL = re.compile(r"@tpu_custom_call\(.*?\) .*?: \(tensor<([\dx]+)x\w+>, tensor<([\dx]+)x\w+>", re.DOTALL)


def component(variant: str, name: str = "transformer"):
    return dataclasses.replace(zoo.VARIANTS[variant].components[name], dtype="bfloat16")


# latents, and heads and tokens of the longest attention
STEPS = {
    "sd3.5-medium": ((128, 128), 24, 4096 + 333),
    "wan2.1-i2v-14b-480p": ((21, 60, 104), 40, 32760),
    "wan2.2-ti2v-5b": ((31, 44, 80), 24, 27280),
    "wan2.2-animate-14b": ((21, 60, 104), 40, 32760),
    "cogvideox-5b": ((13, 60, 90), 48, 17550 + 226),
    "qwen-image": ((166, 166), 24, 6889 + 128),
    "hunyuan-video": ((33, 90, 160), 24, 118800 + 256),
}


def lowered(fn, *args, mesh=None):
    """The program for TPUs and, of each of its kernels, the shapes of queries and keys (batch where it is not 1, heads,
    tokens, head dim)."""
    with compiling_for(CHIP), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        done = jax.export.export(jax.jit(fn), platforms=["tpu"])(*args)
    assert done.platforms == ("tpu",) and done.nr_devices == (1 if mesh is None else mesh.size)
    shapes = [[tuple(map(int, s.split("x"))) for s in found] for found in KERNEL.findall(done.mlir_module())]
    return done, shapes


@pytest.mark.parametrize("case", STEPS)
def test_steps_on_a_mesh(case):
    """Each of 2 x 4 devices has one of two rows, and all tokens of a quarter of the heads."""
    size, heads, tokens = STEPS[case]
    cfg = component(case)
    program, mesh = programs.of(cfg, size, rows=2), make_mesh(data=2, sequence=4)
    done, kernels = lowered(program.whole, *program.abstract(mesh), mesh=mesh)
    assert done.out_avals[0].shape == (2, *size, cfg.out_channels)
    q, k = max(kernels, key=lambda shapes: shapes[0][-2] * shapes[1][-2])
    assert q[:-2] == k[:-2] == (heads // 4,) and q[-1] == cfg.head_dim
    assert all(tokens <= n < 1.1 * tokens for n in (q[-2], k[-2]))


def test_a_step_on_one_chip():
    cfg = component("cogvideox-5b")
    program = programs.of(cfg, STEPS["cogvideox-5b"][0], rows=2)
    _, kernels = lowered(program.whole, *program.abstract())
    assert [q[:2] for q, _ in kernels] == [(2, 48)]  # the scanned layers have one


def test_heads_that_do_not_divide():
    """38 heads on 4 devices: a ring, whose parts are merged by their log-sum-exp, and no kernel."""
    program, mesh = programs.of(component("sd3.5-large"), (128, 128), rows=2), make_mesh(data=2, sequence=4)
    done, kernels = lowered(program.whole, *program.abstract(mesh), mesh=mesh)
    assert not kernels and "collective_permute" in done.mlir_module()


def module(cfg):
    make = sharding.Make(zoo.MODULES[type(cfg)], cfg)
    _, leaves = sharding.abstract(make)
    return sharding.assemble(make, leaves)


DECODERS = {  # latents, and tokens of its attention, None where it has none
    "sd3.5-large": ((1, 128, 128, 16), 16384),
    "wan2.1-t2v-14b": ((1, 21, 60, 104, 16), 6240),
    "cogvideox-5b": ((1, 2, 60, 90, 16), None),
    "qwen-image": ((1, 1, 166, 166, 16), 27556),
    "hunyuan-video": ((1, 4, 32, 32, 16), 4096),
}


@pytest.mark.slow  # on newer versions steps are enough
@pytest.mark.parametrize("case", DECODERS)
def test_decoders(case):
    size, tokens = DECODERS[case]
    cfg = component(case, "vae")
    z = jax.ShapeDtypeStruct(size, "float32")
    done, kernels = lowered(lambda vae, z: vae.decode(z), module(cfg), z)
    assert done.out_avals[0].shape[-1] == 3
    keys = [k[-2] for _, k in kernels]
    assert not keys if tokens is None else tokens <= max(keys) < 1.1 * tokens


@pytest.mark.parametrize("variant, name, shape", [
    ("sd3.5-large", "text_encoder", (2, 77)), ("sd3.5-large", "text_encoder_2", (2, 77)),
    ("sd3.5-large", "text_encoder_3", (2, 256)), ("wan2.1-t2v-14b", "text_encoder", (2, 512)),
    ("qwen-image", "text_encoder", (2, 1024)), ("wan2.1-i2v-14b-480p", "image_encoder", (1, 224, 224, 3)),
])  # fmt: skip
def test_encoders(variant, name, shape):
    given = jax.ShapeDtypeStruct(shape, "int32" if len(shape) == 2 else "float32")
    done, kernels = lowered(lambda encoder, given: encoder(given), module(component(variant, name)), given)
    assert done.out_avals[0].shape[0] == shape[0]
    assert len(kernels) == (variant == "qwen-image")  # the longest prompts; plain products for the others
