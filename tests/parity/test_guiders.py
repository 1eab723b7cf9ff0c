"""Guidance against diffusers: its functions, its guiders step by step, and what its pipelines hand their schedulers."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util_optimised import optimised

from jdit import sampling
from jdit.sampling import (
    away_from,
    dynamic_scale,
    embedded_scale,
    guided,
    keep_norm,
    linear,
    one_batch,
    projected,
    rescaled,
    scan,
    separate,
    step_range,
    zero_init,
    zero_star,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch
from diffusers import guiders  # noqa: E402

SHAPE, STEPS = (2, 3, 6, 8, 4), 10  # B T H W C
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
draw = lambda seed, shape=SHAPE: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
# predictions of every step: parallel in part, as those of a network are
COND = draw(1, (STEPS, *SHAPE))
UNCOND = COND + 0.4 * draw(2, (STEPS, *SHAPE))
SKIPPED = COND + 0.3 * draw(3, (STEPS, *SHAPE))


def first(a):
    """Channels last -> first, as diffusers lays videos out."""
    return torch.tensor(np.moveaxis(np.asarray(a), -1, 1))


def last(a):
    return np.moveaxis(a.numpy(), 1, -1)


def assert_close(a, b, tolerance=1e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def upstream(guider):
    """What a guider gives on every step."""
    out = []
    for i in range(STEPS):
        guider.set_state(i, STEPS, torch.tensor(1000 - i))
        guider.prepare_inputs({})
        skip = {"pred_cond_skip": first(SKIPPED[i])} if "pred_cond_skip" in guider._input_predictions else {}
        out.append(last(guider.forward(first(COND[i]), first(UNCOND[i]), **skip).pred))
    return np.stack(out)


def ours(*terms, flags=None, zeros=None, layers=None):
    """What a guided model gives on every step, through the scan."""
    seen = []
    flags, zeros = (np.full(STEPS, d) if f is None else f for f, d in ((flags, True), (zeros, False)))
    if layers is not None:
        terms = (terms[0], away_from(lambda x, t, row: row["skip"], layers[0], lambda row: row["layers"]), *terms[1:])
    batch = lambda x, t, row: jnp.concatenate([row["uncond"], row["cond"]])
    model = zero_init(guided(one_batch(batch), *terms, active=lambda row: row["on"]), lambda row: row["zero"])

    def spied(carry, x, t, row):
        out, carry = scan.call(model, carry, x, t, row)
        jax.debug.callback(lambda i, o: seen.append((int(i), o)), row["i"], out)
        return out, carry

    rows = {
        "uncond": UNCOND, "cond": COND, "skip": SKIPPED, "on": flags, "zero": zeros, "i": np.arange(STEPS),
        "layers": np.zeros(STEPS, bool) if layers is None else layers[1],
    }  # fmt: skip
    stateful = sampling.Stateful(lambda x: scan.begin(model, x), spied)
    solve = lambda rows: sampling.solve(stateful, jnp.zeros(SHAPE), sampling.from_config(EULER, STEPS), per_step=rows)
    optimised(solve)(rows)
    jax.effects_barrier()
    return np.stack([o for _, o in sorted(seen, key=lambda p: p[0])])


@pytest.mark.parametrize("phi", [0.0, 0.35, 1.0])
def test_rescale(phi):
    from diffusers.guiders.guider_utils import rescale_noise_cfg
    from diffusers.pipelines.ltx.pipeline_ltx import rescale_noise_cfg as of_a_pipeline

    value = UNCOND[0] + 7 * (COND[0] - UNCOND[0])
    for function in (rescale_noise_cfg, of_a_pipeline):
        expected = last(function(first(value), first(COND[0]), phi))
        assert_close(rescaled(phi)(jnp.asarray(value), jnp.asarray(COND[0]), None, None), expected)


def test_sums_of_a_full_size_video():
    """A million numbers a sample: float32 sums must not drift from torch's."""
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    c = draw(1, (1, 13, 60, 90, 16)) + 0.1
    u = c + 0.4 * draw(2, c.shape)
    cond, uncond = jnp.asarray(c), jnp.asarray(u)
    expected = last(rescale_noise_cfg(first(u), first(c), 0.7))
    assert_close(rescaled(0.7)(uncond, cond, None, None), expected)
    expected = last(normalized_guidance(first(c), first(u), 5.0, None, 0.2, 15.0))
    assert_close(projected(5.0, eta=0.2, threshold=15.0)(uncond, cond, None, None), expected)
    alpha = cfg_zero_star_scale(torch.tensor(c).flatten(1), torch.tensor(u).flatten(1)).numpy()
    assert_close(zero_star()(uncond, cond, None, None), u * alpha)


@pytest.mark.parametrize(
    "arguments,terms",
    [
        ({"guidance_scale": 7.5}, (linear(7.5),)),
        ({"guidance_scale": 4.0, "guidance_rescale": 0.7, "start": 0.15, "stop": 0.75}, (linear(4.0), rescaled(0.7))),
        ({"guidance_scale": 3.0, "use_original_formulation": True}, (linear(4.0),)),
        ({"guidance_scale": 1.0}, (linear(1.0),)),
    ],
    ids=["plain", "interval", "original", "one"],
)
def test_classifier_free(arguments, terms):
    flags = step_range(STEPS, arguments.get("start", 0.0), arguments.get("stop", 1.0))
    assert_close(ours(*terms, flags=flags), upstream(guiders.ClassifierFreeGuidance(**arguments)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": 5.0, "zero_init_steps": 1},
        {"guidance_scale": 2.5, "zero_init_steps": 3, "start": 0.1, "stop": 0.8},
        {"guidance_scale": 5.0, "zero_init_steps": 0, "guidance_rescale": 0.5},
        {"guidance_scale": 4.0, "zero_init_steps": 1, "use_original_formulation": True},
    ],
    ids=str,
)
def test_zero_star(arguments):
    scale = arguments["guidance_scale"] + arguments.get("use_original_formulation", False)
    terms = (zero_star(), linear(scale), rescaled(arguments.get("guidance_rescale", 0.0)))
    flags = step_range(STEPS, arguments.get("start", 0.0), arguments.get("stop", 1.0))
    zeros = np.arange(STEPS) < arguments["zero_init_steps"]
    expected = upstream(guiders.ClassifierFreeZeroStarGuidance(**arguments))
    assert_close(ours(*terms, flags=flags, zeros=zeros), expected)


NAMES = {"eta": "eta", "threshold": "adaptive_projected_guidance_rescale",
         "momentum": "adaptive_projected_guidance_momentum"}  # fmt: skip


@pytest.mark.parametrize(
    "strengths,others,axes",
    [
        ({"eta": 1.0, "threshold": 15.0}, {}, None),
        ({"eta": 0.0, "threshold": 2.0, "momentum": -0.5}, {}, None),
        ({"eta": 0.3, "threshold": 0.0, "momentum": 0.6}, {"guidance_rescale": 0.4}, None),
        ({"eta": 0.3, "threshold": 1.5, "momentum": -0.75}, {"use_original_formulation": True}, None),
        ({"eta": 0.0, "threshold": 1.5, "momentum": -0.5}, {"start": 0.2, "stop": 0.8}, None),
        ({"eta": 0.5, "threshold": 0.7}, {"adaptive_projected_guidance_norm_dim": (-1, -2)}, (2, 3)),
        ({"eta": 0.5, "threshold": 0.7, "momentum": 0.0}, {"adaptive_projected_guidance_norm_dim": 1}, (-1,)),
    ],
    ids=str,
)
def test_projected(strengths, others, axes):
    term = projected(6.0, axes=axes, from_cond=others.get("use_original_formulation", False), **strengths)
    flags = step_range(STEPS, others.get("start", 0.0), others.get("stop", 1.0))
    arguments = {NAMES[name]: value for name, value in strengths.items()}
    guider = guiders.AdaptiveProjectedGuidance(guidance_scale=6.0, **arguments, **others)
    assert_close(ours(term, rescaled(others.get("guidance_rescale", 0.0)), flags=flags), upstream(guider))


def test_skip_layer():
    guider = guiders.SkipLayerGuidance(
        guidance_scale=4.0, skip_layer_guidance_scale=2.5, skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.5,
        skip_layer_guidance_layers=[0], guidance_rescale=0.3,
    )  # fmt: skip
    layers = (2.5, sampling.active_steps(STEPS, 0.1, 0.5))
    assert_close(ours(linear(4.0), rescaled(0.3), layers=layers), upstream(guider))


# Pipelines, with networks that were told what to predict and a scheduler that notes what it is given


class Network(torch.nn.Module):
    """Predicts outputs(number of the call, x), and notes its guidance."""

    def __init__(self, outputs, dtype=torch.float32, **config):
        super().__init__()
        self.outputs, self.guidance, self.dtype = outputs, [], dtype
        self.config, self.device = SimpleNamespace(guidance_embeds=True, **config), torch.device("cpu")

    def cache_context(self, name):
        return contextlib.nullcontext()

    def forward(self, hidden_states, guidance=None, **others):
        self.guidance.append(guidance)
        return (self.outputs(len(self.guidance) - 1, hidden_states),)


@pytest.fixture
def handed(monkeypatch):
    """What schedulers are given."""
    seen = []
    for name in ("FlowMatchEulerDiscreteScheduler", "CogVideoXDDIMScheduler"):
        step = lambda self, out, t, sample, *rest, **others: seen.append(out) or (sample,)
        monkeypatch.setattr(getattr(diffusers, name), "step", step)
    return seen


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scale", [4.0, 9.5])
def test_qwen_image(handed, scale):
    """On packed latents, and on (B, H, W, C) with patches of 2."""
    b, h, w, c = 2, 6, 10, 16
    cond, uncond = draw(1, (b, h, w, c)), draw(2, (b, h, w, c))
    pack = lambda a: diffusers.QwenImagePipeline._pack_latents(first(a), b, c, h, w)
    net = Network(lambda i, x: pack((cond, uncond)[i % 2]), in_channels=4 * c)
    pipeline = quiet(diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, net
    ))  # fmt: skip
    text = torch.zeros(b, 3, 8)
    pipeline(
        prompt_embeds=text, negative_prompt_embeds=text, true_cfg_scale=scale, guidance_scale=3.0, height=8 * h,
        width=8 * w, num_inference_steps=2, latents=pack(cond), output_type="latent",
    )  # fmt: skip
    x = jnp.zeros((b, h, w, c))
    found = guided(separate(lambda x, t: uncond, lambda x, t: cond), linear(scale), keep_norm(2))(x, 0.0)
    assert_close(pack(found), handed[0])
    tokens = guided(separate(lambda x, t: pack(uncond).numpy(), lambda x, t: pack(cond).numpy()), linear(scale),
                    keep_norm())(x, 0.0)  # fmt: skip
    assert_close(tokens, handed[0])


@pytest.mark.parametrize("steps,spacing", [(2, "trailing"), (13, "linspace"), (50, "trailing"), (50, "leading")])
def test_cogvideox_dynamic_guidance(handed, steps, spacing):
    b, f, h, w, c = 1, 2, 4, 6, 16
    cond, uncond = draw(1, (b, f, h, w, c)), draw(2, (b, f, h, w, c))
    videos = lambda a: torch.tensor(np.moveaxis(a, -1, 2))  # B T C H W
    net = Network(
        lambda i, x: videos(np.concatenate([uncond, cond])), in_channels=c, patch_size_t=None,
        use_rotary_positional_embeddings=False, sample_height=h, sample_width=w, sample_frames=5,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing=spacing)
    pipeline = quiet(diffusers.CogVideoXPipeline(None, None, None, net, scheduler))
    scales, text = [], torch.zeros(b, 3, 8)
    pipeline(
        prompt_embeds=text, negative_prompt_embeds=text, guidance_scale=6.0, use_dynamic_cfg=True, height=8 * h,
        width=8 * w, num_frames=5, num_inference_steps=steps, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: scales.append(pipe.guidance_scale) or {},
    )  # fmt: skip
    column = dynamic_scale(6.0, scheduler.timesteps.numpy().astype(np.float32), steps)
    assert column.tolist() == scales  # to the last bit: the angle is up to millions of turns
    model = guided(separate(lambda x, t, row: uncond, lambda x, t, row: cond), linear(lambda row: row))
    for scale, out in zip(jnp.asarray(column, jnp.float32), handed, strict=True):
        assert_close(videos(np.asarray(model(jnp.zeros(cond.shape), 0.0, scale))), out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hunyuan_video_embedded_and_true_guidance(handed, dtype):
    b, f, h, w, c = 2, 2, 4, 6, 16
    cond, uncond = draw(1, (b, f, h, w, c)), draw(2, (b, f, h, w, c))
    net = Network(lambda i, x: first((cond, uncond)[i % 2]), getattr(torch, dtype), in_channels=c)
    pipeline = quiet(diffusers.HunyuanVideoPipeline(
        None, None, net, None, diffusers.FlowMatchEulerDiscreteScheduler(), None, None
    ))  # fmt: skip
    text, pooled, mask = torch.zeros(b, 3, 8), torch.zeros(b, 8), torch.ones(b, 3)
    pipeline(
        prompt_embeds=text, pooled_prompt_embeds=pooled, prompt_attention_mask=mask, negative_prompt_embeds=text,
        negative_pooled_prompt_embeds=pooled, negative_prompt_attention_mask=mask, true_cfg_scale=2.5,
        guidance_scale=6.1, height=8 * h, width=8 * w, num_frames=5, num_inference_steps=1, output_type="latent",
    )  # fmt: skip
    seen = []

    def network(out):
        return sampling.embedded(lambda x, t, guidance: seen.append(guidance) or out, 6.1, dtype)

    found = sampling.two_passes(network(uncond), network(cond), 2.5)(jnp.zeros(cond.shape), 0.0)
    assert_close(first(found), handed[0])
    for a, b in zip(net.guidance, seen, strict=True):
        np.testing.assert_array_equal(b, a.float().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flux_embedded_guidance(dtype):
    """What Flux' transformer gives its embedding."""
    seen = []
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ).to(getattr(torch, dtype))  # fmt: skip
    net.time_text_embed.register_forward_hook(lambda m, inputs, out: seen.append(inputs[1]))
    fill = lambda *shape: torch.zeros(*shape, dtype=getattr(torch, dtype))
    scales = np.array([3.51, 0.3, 30.7], np.float32)
    with torch.no_grad():
        net(fill(3, 2, 4), fill(3, 2, 8), fill(3, 8), torch.ones(3), torch.zeros(2, 3), torch.zeros(2, 3),
            torch.tensor(scales))  # fmt: skip
    np.testing.assert_array_equal(jax.jit(lambda g: embedded_scale(g, 3, dtype))(scales), seen[0].float().numpy())
