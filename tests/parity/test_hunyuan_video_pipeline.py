"""The whole HunyuanVideo pipeline against diffusers: load, prompts, both kinds of guidance, decoding by tiles."""

import pytest
import torch
from util_hunyuan_pipeline import LATENTS, SIZE, Z, channels_last, pipeline
from util_sd3 import error, noise

import jdit
from jdit.pipeline import modulation
from jdit.sharding import make_mesh

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on the moon, two apples", "two"]
NEGATIVE = ["", "blue apple, sat on {it}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(upstream's pipeline, ours, the folder) of a transformer that is told its guidance."""
    folder = tmp_path_factory.mktemp("hunyuan")
    return pipeline(folder), jdit.load(folder / "model", dtype="float32"), folder / "model"


def both(theirs, ours, *, output="latents", true=None, size=SIZE, latents=LATENTS, told=6.0, **kw):
    """(ours, upstream's) latents or float frames, from the same noise."""
    start, batch = noise(0, 2, Z, *latents), dict(true_cfg_scale=true or 1.0, negative_prompt=NEGATIVE)
    with torch.no_grad():
        want = theirs(
            prompt=PROMPTS, latents=start.clone(), num_inference_steps=4, guidance_scale=told, **batch, **size,
            output_type={"latents": "latent", "float": "np"}[output],
        ).frames  # fmt: skip
    scales = (
        dict(guidance=told, true_guidance=true) if ours.parts.configs["transformer"].guidance else {"guidance": true}
    )
    got = ours(
        PROMPTS, negative_prompt=NEGATIVE, latents=channels_last(start), steps=4, output=output, **scales, **size, **kw
    )
    return (got.latents, channels_last(want)) if output == "latents" else (got.pixels, want)


def test_text_to_video(made):
    """By tiles of frames."""
    size = dict(height=32, width=48, num_frames=21)
    got, want = both(*made[:2], output="float", size=size, latents=(6, 4, 6), told=3.3)
    assert got.shape == (2, 21, 32, 48, 3) and error(got, want) < 1e-4


@pytest.mark.parametrize("two_passes", [False, True])
def test_true_guidance(made, two_passes):
    got, want = both(*made[:2], true=3.5, told=1.0, two_passes=two_passes)
    assert error(got, want) < 1e-4


def test_a_transformer_that_is_told_no_guidance(tmp_path):
    """Its classifier-free scale is `guidance`; patches of two frames."""
    theirs = pipeline(tmp_path, guidance_embeds=False, qk_norm=None, patch_size_t=2, num_layers=1)
    ours = jdit.load(tmp_path / "model", dtype="float32")
    size = dict(height=48, width=80, num_frames=13)
    got, want = both(theirs, ours, true=3.5, size=size, latents=(4, 6, 10))
    assert error(got, want) < 1e-4
    with pytest.raises(ValueError, match="this transformer is told no guidance: its classifier-free scale is guidance"):
        ours("a cat", true_guidance=2.0, **size)
    with pytest.raises(ValueError, match="num_frames=9 does not work, 5 or 13 would"):
        ours("a cat", num_frames=9)


def test_tiles_of_rows_and_columns(made):
    """As the original release decodes unless it is told not to; diffusers' class where they are switched on."""
    theirs, ours, _ = made
    size, latents = dict(height=16, width=272, num_frames=5), (2, 2, 34)
    plain, want = both(theirs, ours, output="float", size=size, latents=latents, vae_tiling=False)
    assert error(plain, want) < 1e-4
    theirs.vae.enable_tiling()
    try:
        tiled, want = both(theirs, ours, output="float", size=size, latents=latents)
    finally:
        theirs.vae.use_tiling = False
    assert error(tiled, want) < 1e-4 < error(tiled, plain)


QUICK = dict(steps=2, guidance=3.0, true_guidance=2.0, negative_prompt=NEGATIVE, output="latents", **SIZE)


class TestOptions:
    """Told otherwise: the numbers stay."""

    @pytest.fixture(scope="class")
    def plain(self, made):
        return made[1](PROMPTS, **QUICK).latents

    def test_batches_seeds_and_encoded_prompts(self, made, plain):
        encoded = made[1].encode(PROMPTS[1], negative_prompt=NEGATIVE[1])
        given = {k: v for k, v in QUICK.items() if k != "negative_prompt"}
        several = made[1](encoded, num_outputs=2, seed=[1, 7], **given).latents
        assert error(several[:1], plain[1:]) < 1e-5 < 1e-2 < error(several[1:], plain[1:])

    def test_tables_that_are_not_made(self, made, plain, monkeypatch):
        monkeypatch.setattr(modulation, "tabled", lambda *a, **kw: False)
        out = made[1](PROMPTS, **QUICK)
        assert "modulate" not in out.timings and error(out.latents, plain) < 1e-6

    def test_a_mesh(self, made, plain):
        mesh = make_mesh(data=2, sequence=2, tensor=2)
        sharded = jdit.load(made[2], dtype="float32", mesh=mesh)
        assert error(sharded(PROMPTS, **QUICK).latents, plain) < 1e-5
