"""Wan-Animate's transformer and its conversion against diffusers' WanAnimateTransformer3DModel."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import util_wan
import util_wan_animate as util
from diffusers import WanAnimateTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.numpy import load_file
from util_sd3 import error, noise

from convert import registry, table, wan_animate, write
from convert.table import ConversionError
from jdit import sharding, zoo
from jdit.nn.wan_animate_config import WanAnimateConfig
from jdit.sharding import dotted

pytestmark = pytest.mark.torch

RELEASE = dict(image_dim=1280, added_kv_proj_dim=5120)
"""transformer/config.json of Wan2.2-Animate-14B, where it is not the class's default."""
call = jax.jit(lambda module, *args: module(*args))
frame_motion = jax.jit(lambda module, faces: module.motion.frames(faces))


@pytest.fixture(scope="module", params=util.KINDS, ids=util.KINDS.keys())
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate")
    model = util.saved(folder, **util.KINDS[request.param])
    return model, util_wan.ported(folder), folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate")
    model = util.saved(folder)
    return model, util_wan.ported(folder)


def test_velocity(both):
    model, module, _ = both
    given = util.inputs(model.config)
    want = util_wan.theirs(model, given)
    assert error(call(module, *util.ours(given)), want) < 1e-5
    for name in ("face_pixel_values", "pose_hidden_states"):  # each is seen
        assert error(util_wan.theirs(model, given | {name: given[name].flip(0)}), want) > 1e-2


def test_parts(pairs):
    """Motion of each frame, face tokens, an adapter, pose and picture, apart."""
    model, module = pairs
    frames, x = noise(1, 2, 3, 7, 16, 16), noise(2, 2, 3 * 35, 32)
    motion, tokens, pose, image = (
        noise(3, 2, 10, 18),
        noise(4, 2, 3, 4, 32),
        noise(5, 2, 5, 2, 6, 10),
        noise(6, 2, 7, 22),
    )

    @jax.jit
    def parts(module, frames, motion, x, tokens, pose, image):
        adapter = jax.tree.map(lambda a: a[1], module.adapters)
        adapted = adapter(x, adapter.keys(tokens))
        return module.motion.frames(frames), module.face(motion), adapted, module.embed_pose(pose), module.image(image)

    last = lambda a: np.moveaxis(a.numpy(), 1, -1)
    got = parts(module, last(frames), motion.numpy(), x.numpy(), tokens.numpy(), last(pose), image.numpy())
    with torch.no_grad():
        patches = model.pose_patch_embedding(pose).flatten(2).transpose(1, 2)
        want = (
            model.motion_encoder(frames.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 7)), model.face_encoder(motion),
            model.face_adapter[1](x, tokens), torch.cat([torch.zeros(2, 15, 32), patches], 1),
            model.condition_embedder.image_embedder(image),
        )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert a.shape == tuple(b.shape) and error(a, b) < 1e-5


def test_directions_are_what_torch_makes_of_them(pairs):
    model, module = pairs
    weight = model.motion_encoder.motion_synthesis_weight.detach()
    got = np.asarray(module.motion.directions())
    assert error(got, torch.linalg.qr(weight + 1e-8)[0]) < 1e-5
    assert np.allclose(got.T @ got, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_frames_in_chunks(pairs, chunk):
    module = pairs[1]
    faces = np.moveaxis(noise(7, 2, 3, 7, 16, 16).numpy(), 1, -1)
    cfg = dataclasses.replace(module.cfg, face_chunk=chunk)
    changed = sharding.assemble(registry.of_config(cfg).make(cfg), sharding.leaves(module))
    assert error(frame_motion(changed, faces), frame_motion(module, faces)) < 1e-6


def test_prepared_conditions_equal_the_plain_call(pairs):
    """Made once: modulation of all steps, the prompt, and a segment's pose and face."""
    model, module = pairs
    x, t, text, image, pose, face = util.ours(util.inputs(model.config))

    @jax.jit
    def prepare(module, t, text, image, pose, face):
        conditions = module.embed_context(text, image), module.embed_pose(pose), module.embed_face(face)
        return module.modulation_table(t), conditions

    rows, (context, tokens, keys) = prepare(module, t, text, image, pose, face)
    assert [a.shape for a in keys] == [(2, 2, 5, 4, 4, 8)] * 2
    velocity = jax.jit(lambda module, *args: module.velocity(*args))
    got = velocity(module, x, jax.tree.map(lambda a: a[1], rows), context, tokens, keys)
    assert error(got, call(module, x, np.full(2, t[1]), text, image, pose, face)) < 1e-6


def test_parameter_count_and_way_back(both, tmp_path):
    model, module, folder = both
    assert sharding.count(module) == sum(p.numel() for p in model.parameters())
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    write.write_back(tmp_path, leaves, wan_animate.rules(module.cfg), wan_animate.upstream_config(module.cfg))
    back, tensors = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (tmp_path, folder))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], tensors[k]) for k in tensors)
    again = WanAnimateTransformer3DModel.from_pretrained(tmp_path)
    given = util.inputs(model.config)
    assert np.array_equal(util_wan.theirs(again, given), util_wan.theirs(model, given))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Tensors in the original release's layout, those of diffusers, and the port; of eight levels of faces."""
    folder = tmp_path_factory.mktemp("animate")
    channels = {str(4 << n): 9 - n for n in range(8)}
    model = util.saved(folder, motion_encoder_size=512, motion_encoder_channel_sizes=channels)
    module = util_wan.ported(folder)
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    tensors = {t.key: t.load() for t in write.outputs(leaves, wan_animate.original_rules(module.cfg))}
    return tensors, {k: v.numpy() for k, v in model.state_dict().items()}, module


def test_diffusers_reads_our_original_names(original):
    tensors, want, _ = original
    found = convert_wan_transformer_to_diffusers({k: torch.from_numpy(v.copy()) for k, v in tensors.items()})
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[k].numpy(), want[k]) for k in want)


def test_original_layout(original):
    """The config off the shapes and config.json, the filters passed over, every leaf as diffusers' tensors fill it."""
    tensors, _, module = original
    net = "motion_encoder.enc.net_app.convs"
    filters = {f"{net}.{n}.{x}.0.kernel": np.zeros((4, 4), np.float32) for n in range(1, 8) for x in ("conv2", "skip")}
    tensors = tensors | filters
    release = {
        "_class_name": "WanAnimateModel", "dim": 32, "num_heads": 4, "num_layers": 4, "in_dim": 14, "text_len": 512,
        "motion_encoder_dim": 18, "use_img_emb": True, "use_context_parallel": False, "patch_size": [1, 2, 2],
    }  # fmt: skip
    shapes = {k: v.shape for k, v in tensors.items()}
    cfg = wan_animate.original_config(shapes, release)
    assert cfg == dataclasses.replace(module.cfg, face_chunk=8)
    targets = {dotted(p): s for p, s in registry.of_config(cfg).targets(cfg).items()}
    fills = table.plan(shapes, wan_animate.original_rules(cfg), targets)
    leaves = {dotted(p): np.asarray(v) for p, v in sharding.leaves(module).items()}
    assert all(np.array_equal(table.fill(f, tensors.__getitem__), leaves[f.path]) for f in fills)
    for fields, message in (
        ({"motion_encoder_dim": 7}, r"Wan-Animate transformer does not fit.*motion_encoder_dim=7 \(it is 18\)"),
        ({"use_img_emb": False}, r"use_img_emb=False \(it is True\)"),
        ({"mystery": 1}, r"mystery=1 \(not known\)"),
    ):
        with pytest.raises(ConversionError, match=message):
            wan_animate.original_config(shapes, release | fields)
    with pytest.raises(
        ConversionError, match=r"not a Wan-Animate transformer: tensor .*convs\.0\.0\.weight is missing"
    ):
        wan_animate.original_config({})


def test_bfloat16_is_as_close_as_torch(tmp_path):
    """Root mean square over three draws of weights, torch keeping in float32 what upstream keeps."""
    sizes = dict(num_layers=2, attention_head_dim=24, ffn_dim=128, added_kv_proj_dim=96, face_encoder_hidden_dim=40)
    errors = []
    for seed in range(3):
        model = util.saved(tmp_path, seed=seed, **sizes)
        given = util.inputs(model.config)
        module = util_wan.ported(tmp_path, "bfloat16")
        half = WanAnimateTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        kept = sum(p.numel() for p in half.parameters() if p.dtype == torch.float32)
        assert sum(v.size for v in sharding.leaves(module).values() if v.dtype == jnp.float32) == kept
        exact = util_wan.theirs(model, given)
        low = util_wan.theirs(half, {k: v if k == "timestep" else v.bfloat16() for k, v in given.items()})
        got = call(module, *util.ours(given))
        assert got.dtype == jnp.bfloat16
        frames = given["face_pixel_values"]
        motion = frame_motion(module, np.moveaxis(frames.numpy(), 1, -1))
        flat = frames.transpose(1, 2).flatten(0, 1)
        with torch.no_grad():
            want, rough = model.motion_encoder(flat), half.motion_encoder(flat.bfloat16()).float()
        motion = motion.astype(jnp.float32).reshape(want.shape)
        pairs = ((got.astype(jnp.float32), exact), (low, exact), (motion, want), (rough, want))
        errors.append([error(a, b) for a, b in pairs])
    got, bound, motion, motion_bound = np.linalg.norm(errors, axis=0)
    assert bound > 1e-3 and got <= 1.2 * bound
    assert motion_bound > 1e-3 and motion <= 1.2 * motion_bound


def test_full_size():
    """Shapes of a segment of 77 frames at 720 x 1280 and the parameter count, without weights."""
    variant = zoo.VARIANTS["wan2.2-animate-14b"]
    cfg, component = variant.components["transformer"], registry.COMPONENTS["WanAnimateTransformer3DModel"]
    assert component.config(RELEASE) == cfg and registry.of_config(cfg) is component
    assert zoo.recognise(variant.components) == "wan2.2-animate-14b"
    with torch.device("meta"):
        model = WanAnimateTransformer3DModel(**RELEASE)
    assert sharding.count(component.make(cfg)) == sum(p.numel() for p in model.parameters())
    theirs = dict(model.config) | {"patch_size": [1, 2, 2]}
    assert theirs.items() >= {k: v for k, v in wan_animate.upstream_config(cfg).items() if k != "_class_name"}.items()
    module = jax.eval_shape(component.make(cfg))
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    given = (spec(1, 21, 90, 160, 36), spec(1), spec(1, 512, 4096), spec(1, 257, 1280), spec(1, 20, 90, 160, 16))
    out = jax.eval_shape(lambda m, *a: m(*a), module, *given, spec(1, 77, 512, 512, 3))
    assert out.shape == (1, 21, 90, 160, 16)


def test_config_fields():
    signature = inspect.signature(WanAnimateTransformer3DModel.__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if k != "self"}
    read, written = wan_animate.config, wan_animate.upstream_config
    assert read({}) == read(defaults) == read({"in_channels": None}) == WanAnimateConfig()
    assert written(WanAnimateConfig()).keys() == defaults.keys() | {"_class_name"}
    assert {k: v for k, v in written(WanAnimateConfig()).items() if k in defaults} == defaults | {
        "patch_size": [1, 2, 2]
    }
    for config in [util.TINY | kind for kind in util.KINDS.values()]:
        assert read(written(read(config))) == read(config)
        assert registry.from_description(registry.describe(read(config))) == read(config)


REFUSED = (
    ({"mystery": 1}, r"WanAnimateTransformer3DModel: unknown config fields \['mystery'\]"),
    ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is not supported"),
    ({"added_kv_proj_dim": 7}, "added_kv_proj_dim=7 must equal the width 5120"),
    ({"in_channels": 38}, r"in_channels=38 must be 2 \* latent_channels \+ 4 \(latent_channels=16\)"),
    ({"in_channels": None, "latent_channels": None}, "in_channels=None must be"),
    ({"in_channels": 37, "latent_channels": None}, "in_channels 37 must be twice"),
    ({"motion_encoder_size": 48}, "motion_encoder_size=48 must be a power of two"),
    ({"motion_encoder_channel_sizes": {"512": 8}}, r"no channels for \[256, 128, 64, 32, 16, 8, 4\] of size 512"),
    ({"num_layers": 41}, "41 layers do not divide into groups of 5"),
    ({"inject_face_latents_blocks": 0}, "groups of 0"),
    ({"motion_dim": 600}, "600 directions of motion in a space of 512"),
    ({"motion_encoder_batch_size": 0}, "face_chunk 0"),
)


@pytest.mark.parametrize("fields, message", REFUSED)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        wan_animate.config(fields)


def test_upstream_has_no_adapter_for_a_shorter_group():
    """Why layers must divide: upstream makes one adapter fewer than it asks for."""
    model = util.transformer(num_layers=3)
    with pytest.raises(IndexError):
        util_wan.theirs(model, util.inputs(model.config))


def test_sizes_that_do_not_fit(pairs):
    model, module = pairs
    x, t, text, image, pose, face = util.ours(util.inputs(model.config))
    run = lambda **kw: jax.eval_shape(
        call, module, *(kw.get(n, v) for n, v in dict(x=x, t=t, text=text, image=image, pose=pose, face=face).items())
    )
    turned = np.swapaxes(pose, 2, 3)
    for given, message in (
        (dict(face=face[:, :, :8, :8]), r"a face of shape \(2, 13, 8, 8, 3\); it must be \(batch, frames, 16, 16, 3\)"),
        (dict(face=face[:, :0]), r"a face of shape \(2, 0, 16, 16, 3\)"),
        (dict(face=face[:, :12]), r"a face of 4 latent frames .* latents of \(5, 8, 14\)"),
        (dict(pose=pose[:, 1:]), r"a pose of \(3, 8, 14\) frames, rows and columns for latents of \(5, 8, 14\)"),
        (dict(pose=turned), r"a pose of \(4, 14, 8\)"),
        (dict(pose=pose[..., :4]), "a pose of 4 channels; it has the latents' 5"),
        (dict(x=x[:, :, :7], pose=pose[:, :, :7]), r"latents of \(.*7, 14\) do not divide into patches"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**given)
    prepare = lambda m: m.velocity(
        x, m.modulation(t), m.embed_context(text), m.embed_pose(pose[:, 1:]), m.embed_face(face)
    )
    with pytest.raises(ValueError, match=r"a pose of 112 tokens; the latents of \(5, 8, 14\) have 140"):
        jax.eval_shape(prepare, module)
