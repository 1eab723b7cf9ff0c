"""Training Wan-Animate: who drives whom, what a driving video shows, and the stage to a folder that jdit runs."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("optax")

import jdit
from jdit.load import ASSETS
from jdit.nn.text.t5 import T5Config
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig
from jdit.train import config, drive, loop, stages, unigram, video_animate
from jdit.train.nets import Net
from jdit.train.recipes.fluent_animate import prepare
from jdit.train.recipes.run import RECIPES
from jdit.train.video_animate import AnimateTask

pytestmark = pytest.mark.slow

LOOP, SEGMENT, SIZE, FACE = 10, 9, 16, 8


def test_recipe_reads():
    cfg = config.read("fluent-animate/animate")
    assert (cfg.data.folder, cfg.data.frames, cfg.data.segment) == ("data/fluent_animate", 34, 17)


def test_the_bundled_model_stands_for_runs_that_are_not_there(tmp_path):
    recipe, work = RECIPES["fluent-animate"], tmp_path / "fluent-animate"
    assert recipe.folder(work, "fluent-video/vae") == ASSETS / "fluent-video"
    assert recipe.folder(work, "animate") == work / "animate"
    (tmp_path / "fluent-video" / "vae").mkdir(parents=True)
    assert recipe.folder(work, "fluent-video/vae") == tmp_path / "fluent-video" / "vae"
    with pytest.raises(
        ValueError, match=r"fluent-animate/animate needs fluent-video/vae first: .*result\.json is missing"
    ):
        stages.train_stage(recipe, "animate", work, [], None, 0.0)


def test_motions_join_figures_that_move_together():
    tones = ["", ", dark skin tone", ", light skin tone"]
    groups = ["man running", "woman running", "woman dancing", "man dancing", "cat"]
    rows = [{"group": g, "text": g + t} for g in groups for t in (tones if g != "cat" else [""])]
    mask = lambda at: np.pad(np.ones((2, 4, 4), bool), ((0, 0), (at, 8 - at), (4, 4)))
    masks = {g: mask({"man dancing": 6}.get(g, 1)) for g in groups}
    found = prepare.motions(rows, masks)
    assert {name: len(clips) for name, clips in found.items()} == {"someone running": 6}


def test_drawing_says_shape_and_not_shade():
    """Half the light of a surface moves its logarithm, not the differences within it."""
    body = np.full((1, 16, 16, 3), 255.0)
    body[:, 3:13, 3:13] = np.linspace(120, 240, 10)[:, None, None]
    dark = body.copy()
    dark[:, 3:13, 3:13] *= 0.5
    bright, dim = (drive.drawing(a.astype(np.uint8)).astype(int) for a in (body, dark))
    assert np.abs(bright - dim)[:, 4:12, 4:12].max() <= 8
    assert bright[0, 2, 4:12].max() < 250 and dim[0, 2, 4:12].max() < 100 and bright[0, 0].min() == 255


def test_heads_are_at_the_top_and_grey():
    frames = np.full((2, 32, 32, 3), 255, np.uint8)
    frames[:, 2:30, 14:18] = (0, 0, 255)  # a post with
    frames[:, 2:8, 12:20] = (255, 0, 0)  # a red head
    got = drive.heads(frames, 14)
    assert got.shape == (2, 14, 14, 3) and (got[..., 0] == got[..., 2]).all()
    assert (got[0, 3, 5:9, 0] == 76).all() and (got[0, 3, [0, 13], 0] == 255).all()  # 0.299 of 255
    assert (drive.heads(np.full_like(frames, 255), 8) == 255).all()


def test_pairs_of_held_out_clips():
    groups = ["run", "run", "wave", "run", "jump", "jump", "alone"]
    pairs = video_animate.held_out_pairs(groups, 3, 10)
    assert list(zip(*pairs)) == [(3, 0), (4, 5), (5, 4)]
    assert len(video_animate.held_out_pairs(groups, 3, 2).target) == 2
    others, counts = video_animate._others(groups[:4])
    assert counts.tolist() == [2, 2, 1, 2] and others.tolist() == [[1, 3], [0, 3], [2, 2], [0, 1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two steps on squares that move alike, beside an autoencoder and a text encoder of random weights."""
    root = tmp_path_factory.mktemp("animate")
    (root / "data").mkdir()
    rows = []
    for n, name in enumerate(["red", "green", "blue", "black", "grey", "pink"]):
        strip = np.full((LOOP, SIZE, SIZE, 3), 255, np.uint8)
        for t in range(LOOP):
            strip[t, 4:9, t : t + 4] = (40 * n, 255 - 40 * n, 60)
        Image.fromarray(strip.reshape(-1, SIZE, 3)).save(root / "data" / f"{n}.png")
        group, split = ("roll", "val" if n == 3 else "train") if n < 4 else ("new", "val")
        rows.append({"file_name": f"{n}.png", "text": f"{name} square", "group": group, "split": split})
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    video = root / "runs" / "fluent-video"
    tokenizer = unigram.write_unigram(video / "wan" / "tokenizer", [r["text"] for r in rows], 130, 512)
    nets = {
        "vae/vae": Net("AutoencoderKLWan", AutoencoderKLWanConfig(
            width=4, multipliers=(1, 1, 1), temporal=(True, True), layers=1, latent_channels=4, mean=(0.1,) * 4,
            std=(0.9,) * 4, time_factor=4, space_factor=4), "float32"),
        "wan/text_encoder": Net("UMT5EncoderModel", T5Config(
            vocab_size=tokenizer.vocab_size, width=8, kv=4, heads=2, mlp=8, layers=1, shared_bias=False), "float32"),
    }  # fmt: skip
    for name, net in nets.items():
        net.write(video / name, net.init(0), "float32")
        (video / Path(name).parent / loop.RESULT).write_text("{}")
    own = [
        f'data.folder="{root}/data"', f"data.size={SIZE}", f"data.frames={LOOP}", f"data.segment={SEGMENT}",
        "data.batch=2", "run.chunk=1", 'run.dtype="float32"', "run.devices=1", "run.steps=2", "run.minutes=0.0",
        "model.layers=2", "model.heads=1", "model.head_dim=12", "model.mlp=16", "model.freq_dim=8", "model.group=2",
        "model.face_channels=[4, 4]", "model.motion_features=8", "model.motion_directions=3", "model.motion_width=6",
        "model.face_width=8", "model.face_tokens=2", "model.face_chunk=4", "encoder.width=8", "encoder.mlp=8",
        "encoder.heads=1", "encoder.patch=8", "run.sheet_steps=2", "run.sheet=1e9", "run.evaluate=0", "optim.rate=0.05",
        "optim.warmup=1", "optim.ema=0.0",
    ]  # fmt: skip
    work = root / "runs" / "fluent-animate"
    assert stages.run_stages(RECIPES["fluent-animate"], work, ("animate",), overrides=own)
    stages.finish(RECIPES["fluent-animate"], work, root / "model")
    (root / "settings.json").write_text(json.dumps(own))
    return root


def test_segments_of_training_are_those_of_the_pipeline(trained, tmp_path):
    """Masks, channels, the reference's frame, the tail, text padding, the picture; figures of held-out clips."""
    settings = json.loads((trained / "settings.json").read_text())
    video = trained / "runs" / "fluent-video"
    cfg = config.read(
        "fluent-animate/animate",
        [*settings, f'vae="{video}/vae"', f'text="{video}/wan"', 'run.folder="x"', "run.evaluate=8"],
    )
    task = AnimateTask(cfg)
    weights = {f"{n}.{k}": v for n, net in task.nets.items() for k, v in net.read(trained / "model" / n).items()}
    kernels = [a for k, a in task.init().items() if ".motion." in k and k.endswith(".kernel")]
    assert len(kernels) == 7 and all(0.6 < float(np.std(a)) < 1.4 for a in kernels)
    figures = task.sheet(weights, tmp_path, 2)
    kinds = [f"{n}{k}" for n in ("made", "still", "other") for k in ("", "_new_motion")]
    assert figures["pairs"] == 3 and all(figures[k] > 0 for k in kinds)
    assert (tmp_path / "animate_0000002.png").is_file()
    rows = np.arange(2 * SEGMENT - 5) % LOOP
    target, driver = task.train.frames[0], task.train.frames[1]
    pose, face = drive.drawing(driver)[rows], drive.heads(driver, FACE)[rows]
    text = task.train.items[0].text
    three = lambda a: np.stack([a] * 3)  # as many as the sheet made: one program
    got = task.generate(weights, three(target[3]), three(pose), three(face), [text] * 3, segments=2, overlap=5)[:1]
    noise = [jax.random.normal(jax.random.fold_in(jax.random.key(0), n), (3, 4, 4, 4, 4))[:1] for n in range(2)]
    pipe = jdit.load(trained / "model", dtype="float32")
    want = pipe(
        text, image=target[3], pose_video=pose, face_video=face, height=SIZE, width=SIZE, segment_frames=SEGMENT,
        overlap_frames=5, steps=2, guidance=1.0, shift=1.0, solver="euler", latents=np.concatenate(noise, 1),
    ).pixels  # fmt: skip
    assert got.shape == np.asarray(want).shape == (1, len(rows), SIZE, SIZE, 3)
    assert np.ptp(got) > 50 and np.abs(got.astype(int) - np.asarray(want).astype(int)).max() <= 1
