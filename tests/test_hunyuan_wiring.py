"""Every full-size HunyuanVideo: its stages fit together (shapes by eval_shape); sizes, frames, tables and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import registry
from jdit import sharding, zoo
from jdit.nn import parts
from jdit.nn.hunyuan_video import HunyuanVideo
from jdit.pipeline import hunyuan_stages as stage
from jdit.pipeline import memory, modulation
from jdit.pipeline.base import Parts
from jdit.pipeline.executor import Weights, check_wiring
from jdit.pipeline.given import GivenFrames
from jdit.pipeline.hunyuan_video import HunyuanVideoGeneration
from jdit.structs import Text

pytestmark = pytest.mark.slow

NAMES = [n for n, v in zoo.VARIANTS.items() if v.family == "hunyuan-video"]
STATES, POOLED = (256, 4096), (768,)


def dry(name: str, dtype: str = "bfloat16", **plan) -> HunyuanVideoGeneration:
    v = zoo.VARIANTS[name]
    configs = {n: dataclasses.replace(c, dtype=dtype) for n, c in v.components.items()}
    parts = Parts(v.family, name, configs, {}, v.scheduler, dataclasses.replace(v.plan, **plan), {})
    assert not HunyuanVideoGeneration.misfits(parts)
    return HunyuanVideoGeneration(parts, Weights({}))


def module(cfg):
    return sharding.described(registry.of_config(cfg).make(cfg))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_full_size(name):
    """A guided call: two prompts, three outputs of each."""
    pipe = dry(name)
    modules = {n: module(c) for n, c in pipe.parts.configs.items()}
    frames, (height, width) = pipe.frames(), pipe.size()
    assert (frames, height, width) == (125 if name == "fasthunyuan" else 129, 720, 1280)
    ids = array(2, 95 + 256, dtype=jnp.int32)
    values = {
        "tokens": ids,
        "lengths": array(2, dtype=jnp.int32),
        "clip_ids": array(2, 77, dtype=jnp.int32),
        "drop": 95,
    }
    text: Text = check_wiring([stage.ENCODE_TEXT], modules, values)["encoded"]
    assert text.states.shape == (2, *STATES) and text.pooled.shape == (2, *POOLED) and text.lengths.shape == (2,)
    latents = 6, (frames - 1) // 4 + 1, 90, 160, 16
    values = {
        "positive": text, "negative": text, "table": pipe.table(pipe.plan.steps), "noise": array(*latents),
        "embedded": array(), "guidance": array(), "keys": None, "two_passes": False, "report": False,
        "output": "uint8", "vae_tiling": True, "vae_slicing": True, "report_frames": False,
        "picture": GivenFrames(),
    }  # fmt: skip
    out = check_wiring(pipe.usual_stages()[1:], modules, values)
    assert out["latents"].shape == latents
    assert out["pixels"].shape == (6, frames, 720, 1280, 3) and out["pixels"].dtype == jnp.uint8


def test_tables_and_memory():
    """All is resident on a device of 80 GB; on a smaller one the language model waits."""
    pipe, cfg = dry("hunyuan-video"), dry("hunyuan-video").parts.configs["transformer"]
    d, steps = 3072, 50
    rows = 20 * 12 + 40 * 3 + 2
    assert pipe.tables() == {"modulation": steps * (4 * d * rows + 2 * 256 * d)}  # modulation and refined text
    assert [s.name for s in pipe.usual_stages()] == ["encode_text", "prepare", "modulate", "denoise", "decode"]
    sizes = {f"transformer/{p}": modulation.weight_bytes(HunyuanVideo, cfg, p) for p in (parts.MODULATION, parts.LOOP)}
    others = {n: sharding.tree_bytes(module(pipe.parts.configs[n])) for n in ("vae", "text_encoder", "text_encoder_2")}
    assert 12.6e9 < sum(sizes.values()) / 2 < 13.0e9 and 14.9e9 < others["text_encoder"] < 15.1e9
    at = lambda room: memory.plan(pipe.usual_stages(), sizes | others, room, pipe.tables())
    assert 8e9 < pipe.activations() < 16e9 and at(80e9 - pipe.activations()).waiting == ()
    assert at(30e9).fits and "text_encoder" in at(30e9).waiting
    assert "modulate" not in [s.name for s in dry("hunyuan-video", steps=3000).usual_stages()]


def test_schedule():
    """Upstream's sigmas, one to zero before the shift."""
    for name, shift in (("hunyuan-video", 7.0), ("fasthunyuan", 17.0)):
        pipe = dry(name)
        plain = np.linspace(1, 0, pipe.plan.steps + 1)[:-1]
        want = shift * plain / (1 + (shift - 1) * plain)
        assert np.allclose(np.asarray(pipe.table(pipe.plan.steps).timestep), 1000 * want, rtol=1e-6)
    assert zoo.recognise(zoo.VARIANTS["hunyuan-video"].components, "FastVideo/FastHunyuan-diffusers") == "fasthunyuan"
    assert zoo.recognise(zoo.VARIANTS["fasthunyuan"].components, "/data/HunyuanVideo") == "hunyuan-video"


SIZES = {  # what does not work -> what is said
    (728, 1280): "height=728 does not work, 720 or 736 would",
    (720, 8): "width=8 does not work, 16 would",
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    with pytest.raises(ValueError, match=SIZES[size]):
        dry("hunyuan-video").size(*size)


def test_frames():
    pipe = dry("hunyuan-video")
    assert [pipe.frames(n) for n in (1, 5, 129, 257)] == [1, 5, 129, 257]
    with pytest.raises(ValueError, match=r"num_frames=130 does not work, 129 or 133 would \(1 \+ 4 n"):
        pipe.frames(130)
