"""What one block of a network sends when its tokens are spread, and how its activations are laid out: read from the
compiled programs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import Collective, collectives, counts
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdit import sharding
from jdit.nn import context_parallel, hunyuan_video, joint, layers, wan
from jdit.nn.cogvideox import CogVideoXBlock, CogVideoXConfig
from jdit.nn.hunyuan_video import HunyuanVideoConfig, SingleBlock
from jdit.nn.joint import JointBlock
from jdit.nn.mmdit import MMDiTConfig
from jdit.nn.rope import Rope
from jdit.nn.wan import Context, WanBlock, WanConfig
from jdit.nn.wan_animate import FaceAdapter
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.pipeline import executor
from jdit.sharding import Rules, make_mesh, shard

B, HEADS, K = 2, 8, 8
D = HEADS * K
ODD, EVEN = (61, 13), (64, 16)  # tokens of picture or video, and of text


def block_of(name, rules, tokens):
    """(constructor, call(block, x, c, *rest) -> streams, shapes of `rest`) of a block."""
    n, m = tokens
    rope = lambda n: Rope((n, K // 2), (n, K // 2))
    if name == "wan":
        cfg = WanConfig(heads=HEADS, head_dim=K, mlp=4 * D, text_dim=16, rules=rules)
        rest = (B, 1, 6, D), rope(n), (B, m, HEADS, K), (B, m, HEADS, K)
        return lambda: WanBlock(cfg, rngs=nnx.Rngs(0)), lambda b, x, c, rows, rope, k, v: [
            b(x, rows, rope, Context((k, v), None))
        ], rest  # fmt: skip
    if name in ("sd3", "sd3 dual"):
        cfg, dual = MMDiTConfig(heads=HEADS, head_dim=K, qk_norm="rms_norm", rules=rules), name == "sd3 dual"
        make = lambda: JointBlock(cfg, dual, rngs=nnx.Rngs(0))
        return make, lambda b, x, c, mx, mc: b(x, c, mx, mc), ((B, 1, 9 if dual else 6, D), (B, 1, 6, D))
    if name == "cogvideox":
        cfg = CogVideoXConfig(heads=HEADS, head_dim=16, time_dim=8, rules=rules)
        make = lambda: CogVideoXBlock(cfg, rngs=nnx.Rngs(0))
        return make, lambda b, x, c, rows: [b(x, rows, None, m)], ((B, 2, 2, 3, 2 * D),)
    if name == "face":
        cfg = WanAnimateConfig(heads=HEADS, head_dim=K, rules=rules)
        return lambda: FaceAdapter(cfg, rngs=nnx.Rngs(0)), lambda b, x, c, k, v: [b(x, (k, v))], (
            (B, 4 if n % 4 == 0 else 1, 3, HEADS, K),) * 2  # fmt: skip
    cfg = HunyuanVideoConfig(heads=HEADS, head_dim=K, rope_dims=(2, 2, 4), rules=rules)
    if name == "hunyuan double":  # the first frame has rows of its own; text is cut by lengths
        call = lambda b, x, c, mx, mc, rope, n: b(x, c, mx, mc, first=5, rope=rope, kv_lengths=n.astype(jnp.int32))
        return lambda: JointBlock(cfg, rngs=nnx.Rngs(0)), call, ((B, 2, 6, D), (B, 1, 6, D), rope(n + m), (B,))
    call = lambda b, x, c, rows, rope, n: [b(x, rows, first=5, rope=rope, kv_lengths=n.astype(jnp.int32))]
    return lambda: SingleBlock(cfg, rngs=nnx.Rngs(0)), call, ((B, 2, 3, D), rope(n), (B,))


def compiled(name, sizes, rules=Rules(), tokens=ODD):
    """A block's program, whose tokens come and go spread; padded where they do not divide, as outputs must."""
    mesh = make_mesh(**sizes)
    make, call, rest = block_of(name, rules, tokens)
    graph_leaves = sharding.abstract(make, mesh, rules)[1]
    spread = lambda a: shard(a, "batch", "seq", "width", rules=rules)
    width = 2 * D if name == "cogvideox" else D

    def program(block, x, c, rest):
        out = call(block, spread(x), spread(c), *rest)
        return [spread(jnp.pad(a, ((0, 0), (0, -a.shape[1] % 8), (0, 0)))) for a in out]

    place = lambda s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P()))
    is_shape = lambda s: type(s) is tuple and all(isinstance(n, int) for n in s)
    args = jax.tree.map(place, ((B, tokens[0], width), (B, tokens[1], width), rest), is_leaf=is_shape)
    with jax.set_mesh(mesh):
        return jax.jit(program).lower(sharding.assemble(make, graph_leaves), *args).compile()


def slices(tokens, *parts):
    """Bytes of a device's slices: of each part that many arrays (B, tokens / 8, D), float32."""
    return sum(4 * B * D * math.ceil(tokens[i] / 8) * times for i, times in enumerate(parts))


@pytest.mark.parametrize(
    "name, sent",
    [
        ("wan", [slices(ODD, 3), slices(ODD, 1)]),  # and nothing for text
        ("sd3", [slices(ODD, 3, 3), slices(ODD, 1, 1)]),
        ("sd3 dual", [slices(ODD, 3, 3), slices(ODD, 3), slices(ODD, 1, 1), slices(ODD, 1)]),
        ("hunyuan double", [slices(ODD, 3, 3), slices(ODD, 1, 1)]),
        ("hunyuan single", [slices(ODD, 3), slices(ODD, 1)]),
        ("cogvideox", [2 * slices(ODD, 3), 2 * slices(ODD, 1)]),
        ("face", []),
    ],
)
def test_a_block_sends_heads_and_tokens_and_nothing_else(name, sent):
    """Queries, keys and values in one all-to-all, results in another: of slices, whose padding is one token."""
    found = collectives(compiled(name, dict(sequence=8)).as_text())
    assert {c.kind for c in found} <= {"all-to-all"}, found
    assert sorted(c.bytes for c in found) == sorted(sent) and len(found) <= 4
    assert {c.devices for c in found} <= {8}


@pytest.mark.parametrize("name, text", [("wan", 0), ("hunyuan single", 0), ("hunyuan double", 1)])
def test_a_long_sequence_sends_queries_keys_and_values_apart(name, text, monkeypatch):
    """Text, which is short, travels with the values."""
    monkeypatch.setattr("jdit.nn.exchange.LONG", ODD[0])
    found = collectives(compiled(name, dict(sequence=8)).as_text())
    sent = [slices(ODD, 1), slices(ODD, 1), slices(ODD, 1, 3 * text), slices(ODD, 1, text)]
    assert {c.kind for c in found} == {"all-to-all"} and sorted(c.bytes for c in found) == sorted(sent)


@pytest.mark.parametrize("name", ["wan", "hunyuan double"])
def test_a_ring_sends_keys_and_values_round(name):
    found = collectives(compiled(name, dict(sequence=8), Rules(exchange="ring")).as_text())
    assert counts(found) == {"collective-permute": 14}
    assert {c.bytes for c in found} == {slices(ODD, 1, 1 * (name != "wan"))}


@pytest.mark.parametrize("name", ["wan", "hunyuan single", "hunyuan double", "cogvideox"])
def test_keys_and_values_are_gathered(name):
    """They, and nothing else."""
    found = collectives(compiled(name, dict(sequence=8), Rules(exchange="gather")).as_text())
    width = 2 if name == "cogvideox" else 1
    both = [8 * width * slices(ODD, 1), 8 * slices(ODD, 0, 1)][: 1 + (name == "hunyuan double")]
    assert {c.kind for c in found} == {"all-gather"} and sorted(c.bytes for c in found) == sorted(2 * both)


def test_heads_are_exchanged_among_four_and_keys_between_two():
    found = collectives(compiled("sd3", dict(sequence=8), Rules(exchange="ulysses_ring")).as_text())
    assert counts(found) == {"all-to-all": 2, "collective-permute": 2}
    assert {c.devices for c in found} == {4, 2}


@pytest.mark.parametrize("name", ["wan", "sd3", "hunyuan single"])
def test_tensor_and_sequence_together(name):
    """Tensor parallel products are summed over pairs of devices, as slices; nothing is gathered."""
    found = collectives(compiled(name, dict(data=2, sequence=2, tensor=2), tokens=EVEN).as_text())
    assert set(counts(found)) == {"all-to-all", "all-reduce"} and counts(found)["all-to-all"] == 2
    assert {c.devices for c in found} == {2}
    whole = 4 * B * D * sum(EVEN)
    assert max(c.bytes for c in found if c.kind == "all-reduce") <= whole / 4


@pytest.mark.parametrize("sizes", [dict(sequence=8), dict(data=2, sequence=2, tensor=2)], ids=["sequence8", "2x2x2"])
@pytest.mark.parametrize("name", ["wan", "sd3", "hunyuan single"])
def test_layout_of_activations(name, sizes, monkeypatch):
    """The residual streams, the MLP's inside, and queries, keys and values on their way into attention."""
    seen = {}

    def watch(what, fn):
        def watched(x, *args, **kw):
            leaf = jax.tree.leaves(x)[0]
            jax.debug.inspect_array_sharding(leaf, callback=lambda s: seen.setdefault(what, []).append((leaf.ndim, s)))
            return fn(x, *args, **kw)

        return watched

    monkeypatch.setattr(layers, "gelu_tanh", watch("mlp", layers.gelu_tanh))
    for module, called in ((wan, "attend"), (hunyuan_video, "attend"), (joint, "attend_parts")):
        monkeypatch.setattr(module, called, watch("attention", getattr(context_parallel, called)))
    program = compiled(name, sizes, tokens=EVEN)
    mesh = make_mesh(**sizes)
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    assert all(s.is_equivalent_to(at("data", "sequence", None), 3) for s in jax.tree.leaves(program.output_shardings))
    inside = {"mlp": (None,) * (name == "hunyuan single") + ("tensor",), "attention": ("tensor", None)}
    for what, rest in inside.items():
        assert seen[what], what
        for ndim, s in seen[what]:
            assert s.is_equivalent_to(at("data", "sequence", *rest), ndim), (what, s)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_a_network_gathers_its_output_alone(name):
    """Layers run in loops, in which there are all-to-alls only. Outside of them the streams of HunyuanVideo are joined
    once, and the result is put in order."""
    mesh, rules, (frames, rows, columns) = make_mesh(sequence=8), Rules(), (3, 6, 10)
    place = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P()))
    x = place(B, frames, rows, columns, 4)
    small: dict = dict(heads=HEADS, head_dim=K, in_channels=4, out_channels=4, text_dim=16, rules=rules)
    if name == "wan":
        cfg = WanConfig(layers=3, mlp=4 * D, **small)
        make = lambda: wan.Wan(cfg, rngs=nnx.Rngs(0))
        keys = place(3, B, 13, HEADS, K)
        args = wan.Modulation(place(B, frames, 6, D), place(B, frames, 2, D)), Context((keys, keys), None)
    else:
        cfg = HunyuanVideoConfig(layers=3, single_layers=3, rope_dims=(2, 2, 4), **small)
        make = lambda: hunyuan_video.HunyuanVideo(cfg, rngs=nnx.Rngs(0))
        rows_of = (place(3, B, 1, n, D) for n in (6, 6, 3))
        args = hunyuan_video.Modulation(*rows_of, place(B, 2, D)), place(B, 13, D)
    with jax.set_mesh(mesh):
        net = sharding.assemble(make, sharding.abstract(make, mesh, rules)[1])
        found = collectives(jax.jit(lambda net, *a: net.velocity(*a)).lower(net, x, *args).compile().as_text())
    inside, once = ([c for c in found if (c.times == 3) == loop] for loop in (True, False))
    assert counts(inside) == {"all-to-all": 2 if name == "wan" else 4}
    latents = 4 * B * 48 * 2 * 2 * 4  # 45 tokens, padded
    assert sum(c.bytes for c in once if c.kind == "all-gather") == latents
    assert {c.times for c in once} == {1} and all(c.bytes < 4 * B * D * 45 for c in once if c.kind != "all-gather")


HLO = """
HloModule example, num_partitions=8

%body.1 (p: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %p = (s32[], bf16[2,8]{1,0}) parameter(0)
  %x = bf16[2,8]{1,0} get-tuple-element(%p), index=1
  %all-to-all.1 = (bf16[1,8]{1,0}, bf16[1,8]{1,0}) all-to-all(%x, %x), channel_id=1, replica_groups={{0,1},{2,3}}
  ROOT %t = (s32[], bf16[2,8]{1,0}) tuple(%p, %x)
}

%async_computation.2 (q: f32[4]) -> f32[8] {
  %q = f32[4]{0} parameter(0)
  ROOT %all-gather.2 = f32[8]{0} all-gather(%q), replica_groups=[4,2]<=[8], dimensions={0}
}

%unused.3 (r: f32[4]) -> f32[4] {
  ROOT %all-reduce.9 = f32[4]{0} all-reduce(%r), replica_groups={}, to_apply=%add
}

ENTRY %main.4 (a: bf16[2,8], b: f32[4]) -> f32[8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %while.1 = (s32[], bf16[2,8]) while(%a), condition=%c.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %start = ((f32[4]{0}), f32[8]{0}) async-start(%b), calls=%async_computation.2
  %done = f32[8]{0} async-done(%start)
  %permute = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
  %permuted = f32[4]{0} collective-permute-done(%permute)
  ROOT %sum = f32[8]{0:T(128)} all-reduce(%done), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}
"""


def test_what_is_read_from_a_program():
    """An async form is counted once, a loop's body as often as it runs, and a function that nobody calls not at all."""
    assert collectives(HLO) == [
        Collective("all-to-all", 32, ("bf16[1,8]", "bf16[1,8]"), 2, 5),
        Collective("all-gather", 32, ("f32[8]",), 2, 1),
        Collective("collective-permute", 16, ("f32[4]",), 2, 1),
        Collective("all-reduce", 32, ("f32[8]",), 4, 1),
    ]


def test_loops_of_real_programs_are_counted():
    """Seven layers, each of which is summed over eight devices once."""
    mesh = make_mesh(tensor=8)
    sizes = dict(x=((4, 16), P()), w=((7, 16, 16), P(None, "tensor", None)))
    x, w = (jax.ShapeDtypeStruct(s, np.float32, sharding=NamedSharding(mesh, spec)) for s, spec in sizes.values())
    program = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).lower(x, w).compile()
    assert [(c.kind, c.devices, c.times) for c in collectives(program.as_text())] == [("all-reduce", 8, 7)]


@pytest.mark.parametrize("processes", [1, 2])
def test_xla_knows_the_options_of_gpu_programs(processes, monkeypatch):
    """Names and values: it takes those of GPUs on the CPU, too, and refuses others."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    options = executor.compiler_options()
    assert options is not None and ("xla_gpu_collective_permute_mode" in options) == (processes == 1)
    lowered = jax.jit(jnp.sin).lower(1.0)
    lowered.compile(options)
    for wrong in ({"xla_gpu_no_such_option": 1}, {"xla_gpu_collective_permute_mode": "COLLECTIVES_BY_PIGEON"}):
        with pytest.raises(jax.errors.JaxRuntimeError):
            lowered.compile(options | wrong)


def test_options_of_gpu_programs_are_those_of_the_mesh(monkeypatch):
    """And so are the compiled functions, of which there is one for each set of options."""
    mode, fn = "xla_gpu_command_buffer_scheduling_mode", lambda x: x
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = lambda: executor.compiler_options() or {}
    alone = executor.compiled(fn)
    assert mode not in options()
    with jax.set_mesh(make_mesh(data=8)):
        assert options()[mode] == "CONCURRENT"
        jax.jit(jnp.sin).lower(1.0).compile(options())
        assert executor.compiled(fn) is executor.compiled(fn) is not alone
    for sizes in (dict(data=4, sequence=2), dict(tensor=8), dict(data=1)):
        with jax.set_mesh(make_mesh(**sizes)):
            assert mode not in options() and executor.compiled(fn) is alone
