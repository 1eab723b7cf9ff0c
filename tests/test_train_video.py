"""Training of video: clips and captions, the vocabulary, and both stages to a folder that jdit and diffusers run."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("optax")

import jdit
from jdit.train import clips, config, data, loop, portable, stages, unigram
from jdit.train.recipes.fluent_video import prepare
from jdit.train.recipes.run import RECIPES
from jdit.train.sheet import film_strips

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", ["fluent-video/vae", "fluent-video/wan"])
def test_recipes_read(name):
    cfg = config.read(name)
    assert (cfg.data.folder, cfg.data.frames, cfg.data.size) == ("data/fluent_video", 17, 64)


def test_strips_animations_and_too_short_clips(tmp_path):
    frames = RNG.integers(0, 255, (6, 8, 8, 3), np.uint8)
    Image.fromarray(frames.reshape(-1, 8, 3)).save(tmp_path / "a.png")
    pictures = [Image.fromarray(f) for f in frames]
    pictures[0].save(tmp_path / "b.webp", save_all=True, append_images=pictures[1:], lossless=True, duration=100)
    for name in ("a.png", "b.webp"):
        assert np.array_equal(clips.load_clip(tmp_path / name, 3, 8), frames[::2])
    assert clips.load_clip(tmp_path / "a.png", 6, 4).shape == (6, 4, 4, 3)
    with pytest.raises(ValueError, match=r"a\.png: 6 frames, 7 are wanted"):
        clips.load_clip(tmp_path / "a.png", 7, 8)


def test_groups_are_drawn_evenly():
    item = lambda n, group: data.Item(Path(f"{n}.png"), "", ("",), "train", "", 0, 0, group)
    items = [*(item(n, "run") for n in range(6)), item(6, "jump"), item(7, "")]

    def counts(balance: float) -> np.ndarray:
        shares = clips.shares(items, balance)
        drawn = clips.draw(jax.random.key(0), 24_000, 8, None if shares is None else jnp.asarray(shares))
        return np.bincount(np.asarray(drawn), minlength=8) / 24_000

    assert clips.shares(items, 0.0) is None and np.abs(counts(0.0) - 1 / 8).max() < 0.01
    assert np.abs(counts(1.0) - [*[1 / 18] * 6, 1 / 3, 1 / 3]).max() < 0.01
    half = np.asarray([*[6**-0.5] * 6, 1, 1])
    assert np.abs(counts(0.5) - half / half.sum()).max() < 0.01


def test_captions_of_motions():
    got = prepare.captions("man running", "man running, dark skin tone")
    assert "a running man, dark skin tone" in got and got[0] == "man running, dark skin tone" and len(got) <= 8
    assert prepare.captions("three o'clock", "three o'clock")[1] == "three o'clock"
    assert prepare.motion("couple with heart, woman, man, medium-dark skin tone") == "couple with heart, woman, man"


def test_held_out_are_whole_pairs_and_single_tones():
    tones = ["", *(f", {t} skin tone" for t in ("light", "medium-light", "medium", "medium-dark", "dark"))]
    texts = [f"{w} {m}{t}" for w in ("man", "woman") for m in ("golfing", "surfing", "running") for t in tones]
    held = prepare.hold_out([*texts, "cat"])
    by_motion = [prepare.motion(t) for t in held]
    assert all(by_motion.count(pair) == 6 for pair in prepare.PAIRS)
    assert by_motion.count("man running") == 1 and "man running" not in held and "cat" not in held


def test_vocabulary_is_t5s(tmp_path):
    tokenizer = unigram.write_unigram(tmp_path, ["a running man", "a running woman"] * 5, 150, 512)
    assert tokenizer.encode([""], 4).tolist() == [[1, 0, 0, 0]]
    ids, lengths = tokenizer.encode_with_lengths(["a running man", "ü"], 16)
    assert tokenizer.decode(ids[0]) == "a running man" and ids[0, lengths[0] - 1] == 1 and 2 in ids[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Both stages, two steps each, on four clips of squares that move; the second is packed and unpacked."""
    root = tmp_path_factory.mktemp("video")
    (root / "data").mkdir()
    rows = []
    for n, name in enumerate(["red", "green", "blue", "black"]):
        strip = np.full((5, 16, 16, 3), 255, np.uint8)
        for t in range(5):
            strip[t, 4:9, 2 * t + n % 3 : 2 * t + n % 3 + 4] = (40 * n, 255 - 40 * n, 60)
        Image.fromarray(strip.reshape(-1, 16, 3)).save(root / "data" / f"{n}.png")
        rows.append({"file_name": f"{n}.png", "text": f"{name} square", "split": "val" if n > 1 else "train"})
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [f'data.folder="{root}/data"', "data.size=16", "data.frames=5", "data.batch=2", "run.chunk=1",
              "run.sheet=1e9", 'run.dtype="float32"', "run.devices=1"]  # fmt: skip
    settings = {
        "vae": ["model.width=4", "model.multipliers=[1, 1]", "model.temporal=[true]", "model.latent_channels=4"],
        "wan": [
            "model.layers=1", "model.heads=1", "model.head_dim=12", "model.mlp=16",
            "model.freq_dim=8", "encoder.vocab_size=130", "encoder.width=8", "encoder.kv=4", "encoder.mlp=8",
            "encoder.layers=1", "encoder.max_length=12", "run.sheet_steps=2", 'run.prompts=["a red square"]',
            "run.evaluate=1", "optim.rate=0.05", "optim.warmup=1", "optim.ema=0.0",
        ],
    }  # fmt: skip
    recipe, away = RECIPES["fluent-video"], root / "elsewhere" / "video"
    own = {n: [*common, *extra, "run.steps=2", "run.minutes=0.0"] for n, extra in settings.items()}
    assert stages.run_stages(recipe, root, ("vae",), overrides=own["vae"])
    assert not stages.run_stages(recipe, root, ("vae", "wan"), overrides=[*own["wan"], "run.stop_after=1e-9"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "PART", 20_000)
        parts = stages.pack(recipe, root, root / "packed")
    assert len(parts) > 1 and max(p.stat().st_size for p in parts) <= 20_000
    stages.unpack(recipe, root / "packed", away)
    assert (away / "wan" / portable.FILE).is_file() and not loop.checkpoints(away / "wan")
    assert stages.run_stages(recipe, away, recipe.stages, overrides=own["wan"])
    stages.finish(recipe, away, root / "model")
    return away


def test_stages_leave_sheets_and_figures(trained):
    assert [p.name for p in (trained / "vae" / "sheets").iterdir()] == ["vae_0000002.png"]
    assert [p.name for p in (trained / "wan" / "sheets").iterdir()] == ["flow_0000002.png"]
    assert "resumed at step 1" in (trained / "wan" / "log.txt").read_text()
    assert {"top1", "top5", "motion"} <= json.loads((trained / "wan" / loop.RESULT).read_text()).keys()
    vae = json.loads((trained / "vae" / "vae" / "config.json").read_text())
    assert len(set(vae["latents_mean"])) == 4 and (vae["scale_factor_temporal"], vae["scale_factor_spatial"]) == (2, 2)


@pytest.mark.torch
def test_sampler_jdit_and_diffusers_agree(trained):
    """Training counts one zero for all padding; the pipelines send 512 tokens."""
    torch = pytest.importorskip("torch")
    from diffusers import WanPipeline

    from jdit.train.nets import open_net
    from jdit.train.video_flow import NETS, VideoFlowTask

    noise = jax.random.normal(jax.random.key(0), (1, 3, 8, 8, 4))
    task = VideoFlowTask.__new__(VideoFlowTask)
    nets = {n: open_net(trained.parents[1] / "model" / n, c, "float32") for n, c in NETS.items()}
    task.nets = {n: net for n, (net, _) in nets.items()}
    weights = {f"{n}.{k}": v for n, (_, w) in nets.items() for k, v in w.items()}
    pipe = jdit.load(trained.parents[1] / "model", dtype="float32")
    call: dict[str, Any] = dict(height=16, width=16, num_frames=5)
    want = pipe(
        "a red square", negative_prompt="", steps=1, guidance=1.0, latents=np.asarray(noise), output="latents",
        solver="euler", shift=1.0, **call,
    ).latents  # fmt: skip
    tokens, lengths = unigram.tokenizer_files.load(trained.parents[1] / "model" / "tokenizer").encode_with_lengths(
        ["a red square"], 12
    )
    velocity = task._predict(weights, noise, jnp.full((1,), 1000.0), (jnp.asarray(tokens), jnp.asarray(lengths)))
    assert np.linalg.norm(velocity) > 0.1
    assert np.linalg.norm(noise - velocity - want) / np.linalg.norm(want) < 1e-4

    theirs = WanPipeline.from_pretrained(trained.parents[1] / "model", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.asarray(noise).transpose(0, 4, 1, 2, 3).copy())
    with torch.no_grad():
        frames = theirs("a red square", negative_prompt="", latents=latents, num_inference_steps=3,
                        guidance_scale=3.0, output_type="np", **call).frames  # fmt: skip
    got = pipe(
        "a red square", negative_prompt="", latents=np.asarray(noise), steps=3, guidance=3.0, output="float", **call
    )
    assert got.pixels is not None and got.pixels.shape == (1, 5, 16, 16, 3)
    assert np.linalg.norm(got.pixels - frames) / np.linalg.norm(frames) < 1e-4


def test_film_strips_go_from_first_to_last():
    frames = np.arange(17, dtype=np.uint8)[None, :, None, None, None] * np.ones((2, 1, 4, 3, 3), np.uint8)
    strip = film_strips(frames, 5)
    assert strip.shape == (2, 4, 15, 3) and strip[0, 0, ::3, 0].tolist() == [0, 4, 8, 12, 16]
