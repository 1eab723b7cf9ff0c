"""Training: configs, data, colours, the loop's exact resume, and all three stages end to end."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("optax")

import jdit
from jdit import train
from jdit.train import colour, config, data, export, loop, portable, text, vae
from jdit.train import examples as ex
from jdit.train.flow import noise_levels
from jdit.train.sheet import recall

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------- configs


def write_config(folder: Path, **sections) -> Path:
    lines = ['stage = "vae"']
    for name, values in {"data": {"folder": "d"}, "run": {"folder": "r"}, **sections}.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    path = folder / "c.toml"
    path.write_text("\n".join(lines))
    return path


def test_config_overrides_and_types(tmp_path):
    path = write_config(tmp_path, optim={"rate": 1})
    cfg = config.read(path, ["optim.warmup=7", "data.folder=some/where", "data.mix=[1, 0, 0, 0]", "model.layers=2"])
    assert cfg.optim.rate == 1.0 and isinstance(cfg.optim.rate, float)
    assert (cfg.optim.warmup, cfg.data.folder, cfg.model) == (7, "some/where", {"layers": 2})


def test_config_names_all_problems(tmp_path):
    path = write_config(tmp_path, optim={"rat": 1.0, "warmup": "long"}, extra={"a": 1})
    with pytest.raises(ValueError) as e:
        config.read(path)
    for part in ("optim.rat", "optim.warmup", "unknown key extra", str(path)):
        assert part in str(e.value)


@pytest.mark.parametrize("name", ["fluent-image/vae", "fluent-image/text", "fluent-image/mmdit"])
def test_recipes_read(name):
    cfg = config.read(name)
    assert cfg.data.folder == "data/fluent"
    if cfg.data.held_out:
        assert len(ex.read_held_out(cfg.data.held_out, cfg.path)) >= 128


def test_unknown_recipe_lists_recipes():
    with pytest.raises(ValueError, match="fluent-image/mmdit"):
        config.read("fluent-image/nothing")


# ------------------------------------------------------------------------------------------- data


def picture(size=32, rgb=(220, 30, 30)) -> Image.Image:
    a = np.zeros((size, size, 4), np.uint8)
    a[size // 4 : -size // 4, size // 4 : -size // 4] = (*rgb, 255)
    return Image.fromarray(a)


def test_text_files_beside_pictures(tmp_path):
    picture().save(tmp_path / "a.png")
    picture(48).resize((60, 40)).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("first\nsecond\n")
    (tmp_path / "b.txt").write_text("other")
    got, val = data.read(tmp_path, 32)
    assert [i.captions for i in got.items] == [("first", "second"), ("other",)]
    assert got.rgba.shape == (2, 32, 32, 4) and not val.items
    assert np.array_equal(got.rgba[0], np.asarray(picture()))


@pytest.mark.parametrize(
    "rows, message",
    [
        (['{"file_name": "no.png", "text": "x"}'], "no.png"),
        (['{"file_name": "a.png"}'], "line 1 of metadata.jsonl"),
        (["{"], "line 1 of metadata.jsonl"),
    ],
)
def test_data_problems_are_named(tmp_path, rows, message):
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=message):
        data.read(tmp_path, 32)


def test_missing_folder_and_missing_caption(tmp_path):
    with pytest.raises(ValueError, match="no such data folder"):
        data.read(tmp_path / "x", 32)
    picture().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no caption in a\.txt"):
        data.read(tmp_path, 32)


def item(name, noun="", captions=None) -> data.Item:
    return data.Item(Path(f"{name}.png"), name, tuple(captions or (name,)), "train", noun, 0.0, 0.9)


def test_held_out_pairs_are_in_no_caption():
    items = [item("banana", "banana"), item("red apple", "apple"), item("face")]
    held = frozenset({"blue banana", "green apple"})
    e = ex.build(items, held_out=held, backgrounds=3)
    assert not any(pair in t for pair in held for t in e.texts)
    assert "a purple banana" in e.texts and "a red apple on a" not in e.texts
    assert e.size.tolist() == [3, 6 + 5, 9, 3 * 11]  # "red apple" exists already, so apple has 7 - 1 - 1 colours
    assert e.texts[0] == ""


def test_draw_follows_the_mix():
    e = ex.build([item("banana", "banana"), item("face")], backgrounds=2)
    d = ex.drawable(e, (0.5, 0.25, 0.25, 0.0))
    example, caption = ex.draw(d, jax.random.key(0), 20000)
    group = np.searchsorted(e.start, np.asarray(example), side="right") - 1
    share = np.bincount(group, minlength=4) / len(group)
    assert np.abs(share - (0.5, 0.25, 0.25, 0)).max() < 0.02
    assert all(c in e.caption[x] for x, c in zip(np.asarray(example[:200]), np.asarray(caption[:200])))


@pytest.mark.parametrize(
    "text, want",
    [
        ("apple", "an apple"),
        ("cat", "a cat"),
        ("unicorn", "a unicorn"),
        ("glasses", "glasses"),
        ("cactus", "a cactus"),
        ("bowl of beans", "a bowl of beans"),
    ],
)
def test_article(text, want):
    assert ex.article(text) == want


# ------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("name", list(colour.COLOURS))
@pytest.mark.parametrize("own", [(220, 30, 30), (60, 90, 230), (250, 200, 40), (120, 80, 60)])
def test_recoloured_objects_have_their_colour(name, own):
    shade = np.linspace(0.5, 1.0, 32)[:, None, None]
    rgba = np.asarray(picture(32, own), np.float32) / 255
    rgba[..., :3] *= shade
    main = colour.dominant(rgba)
    assert main.share > 0.9
    table = colour.colour_table()[list(colour.COLOURS).index(name)]
    new = colour.recolour(jnp.asarray(rgba), jnp.float32(main.hue), jnp.float32(main.value), jnp.asarray(table))
    for background in colour.background_table()[[0, -2]]:
        got, shares = colour.name_colour(np.asarray(colour.composite(new, jnp.asarray(background))))
        assert got == name, shares


def test_no_colour_without_saturation():
    assert colour.name_colour(np.full((16, 16, 3), 0.5, np.float32))[0] == "none"


# ------------------------------------------------------------------------------------------- losses


def test_noise_levels_are_logit_normal():
    s = np.asarray(noise_levels(jax.random.key(0), 4096, 0.3, 0.8))
    logit = np.log(s / (1 - s))
    assert abs(logit.mean() - 0.3) < 0.01 and abs(logit.std() - 0.8) < 0.01


def test_edge_loss_is_blind_to_a_constant():
    x = jnp.asarray(RNG.random((2, 16, 16, 3)), jnp.float32)
    assert float(vae.edge_loss(x, x + 0.25)) < 1e-6
    assert float(vae.edge_loss(x, 0.5 * x)) > 0.01


def test_contrastive_matches_a_formula():
    a, b = RNG.normal(size=(2, 5, 7)).astype(np.float32)
    loss, _ = text.contrastive(jnp.asarray(a), jnp.asarray(b), 3.0, jnp.eye(5, dtype=bool))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    z = 3.0 * u @ v.T
    rows = -np.diag(z - np.log(np.exp(z).sum(1))[:, None]).mean()
    columns = -np.diag(z - np.log(np.exp(z).sum(0))[None]).mean()
    assert abs(float(loss) - (rows + columns) / 2) < 1e-4
    assert float(text.contrastive(jnp.asarray(a), jnp.asarray(a), 9.0, jnp.eye(5, dtype=bool))[1]) == 1


def test_recall_counts_ranks():
    known = np.arange(10.0).reshape(10, 1, 1, 1)
    assert recall(known[[3, 7]] + 0.1, known, np.array([3, 7])) == {"top1": 1.0, "top5": 1.0}
    assert recall(known[[3, 7]] + 1.1, known, np.array([3, 7])) == {"top1": 0.0, "top5": 1.0}


def test_vocabulary_is_clips():
    vocabulary, merges = text.train_vocabulary(["a red apple", "a red car", "red red red"] * 5, 530)
    assert vocabulary["!"] == 0 and vocabulary[text.END] == len(vocabulary) - 1
    assert vocabulary[text.START] == len(vocabulary) - 2
    assert "red</w>" in vocabulary and len(vocabulary) == 512 + len(merges) + 2


# ------------------------------------------------------------------------------------------- the loop


class Line:
    """Fit y = 2 x with noise from the key."""

    examples = 8

    def __init__(self, cfg, poison=None):
        self.data, self.poison = jnp.linspace(-1, 1, 64), poison

    def init(self):
        return {"a.kernel": jnp.full((3, 1), 0.1), "b.bias": jnp.zeros(1)}

    def loss(self, params, data, key):
        x = data[jax.random.randint(key, (8,), 0, 64)][:, None] ** jnp.arange(1, 4)
        y = x @ params["a.kernel"] + params["b.bias"]
        loss = jnp.square(y[:, 0] - 2 * x[:, 0]).mean()
        return loss * (jnp.nan if self.poison else 1.0), {"x": x.mean()}

    def sheet(self, ema, folder, step):
        return {}

    def finish(self, ema, folder):
        np.save(folder / "ema.npy", np.concatenate([np.ravel(v) for v in ema.values()]))
        return {}


def line_config(folder, **run) -> config.Config:
    return config.Config(
        "flow", config.Data("d", batch=8), config.Optim(rate=0.05, warmup=2), config.Run(str(folder), **run)
    )


def final_state(folder: Path) -> dict[str, np.ndarray]:
    like = loop.init_state(Line(None).init(), config.Optim(), 1)
    return {k: np.asarray(v) for k, v in loop._flat(loop.restore(loop.checkpoints(folder)[-1], like)).items()}


def test_resume_is_exact(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = loop.train(Line, line_config(tmp_path / "a", steps=6, chunk=6))
    assert whole.finished and json.loads((tmp_path / "a" / loop.RESULT).read_text())["steps"] == 6
    part = loop.train(Line, line_config(tmp_path / "b", steps=6, chunk=3, stop_after=1e-9))
    assert not part.finished and part.step == 3
    assert loop.train(Line, line_config(tmp_path / "b", steps=6, chunk=3), resume=True).step == 6
    a, b = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    for key in a:
        if "seconds" not in key:
            assert np.array_equal(a[key], b[key]), key
    assert np.array_equal(np.load(tmp_path / "a" / "ema.npy"), np.load(tmp_path / "b" / "ema.npy"))


def test_portable_checkpoint_goes_on_elsewhere(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    whole = loop.train(Line, line_config(tmp_path / "a", steps=60, chunk=20))
    here = loop.train(Line, line_config(tmp_path / "b", steps=60, chunk=20, stop_after=1e-9, portable=True))
    shutil.copy(tmp_path / "b" / portable.FILE, tmp_path / "c")
    part = final_state(tmp_path / "b")
    state = loop.init_state(Line(None).init(), config.Optim(), 1)
    copy = dict(zip(part, jax.tree.leaves(loop.unpacked(tmp_path / "c", state))))
    assert here.step == 20 and len(copy) == len(part)
    for key, value in copy.items():
        want = 0 * part[key] if "_mu_" in key else part[key]
        assert value.dtype == want.dtype and ("_ema_" in key or np.allclose(value, want, rtol=2**-8, atol=0)), key
    ema, params = (np.concatenate([np.ravel(v) for k, v in part.items() if f"_{n}_" in k]) for n in ("ema", "params"))
    got = np.concatenate([np.ravel(v) for k, v in copy.items() if "_ema_" in k])
    assert np.abs(got - ema).max() <= 2**-8 * np.abs(ema - params).max() + 2**-16 * np.abs(params).max()
    end = loop.train(Line, line_config(tmp_path / "c", steps=60, chunk=20), resume=True)
    assert end.step == 60 and end.figures["loss"] < 1.5 * whole.figures["loss"] + 1e-3
    assert not (tmp_path / "c" / portable.FILE).exists()
    with pytest.raises(ValueError, match="does not fit"):
        loop.unpacked(tmp_path / "b", loop.init_state({"w": jnp.zeros(3)}, config.Optim(), 1))


def test_it_learns_and_devices_do_not_matter(tmp_path):
    ends = []
    for n in sorted({1, min(2, jax.device_count())}):
        folder = tmp_path / str(n)
        folder.mkdir()
        ends.append(loop.train(Line, line_config(folder, steps=300, chunk=50, devices=n)).figures["loss"])
    assert max(ends) < 1e-2  # the mean of the last chunk; the first step has about 1
    assert max(ends) - min(ends) < 1e-5


def test_minutes_fit_the_schedule(tmp_path):
    result = loop.train(Line, line_config(tmp_path, minutes=0.02, chunk=10))
    assert result.finished
    state = final_state(tmp_path)
    step, total = (next(v for k, v in state.items() if k.endswith(n)) for n in ("step", "total"))
    assert step == total < 2**30


def test_schedule_ends_at_its_floor():
    o = config.Optim(rate=1.0, floor=0.1, warmup=10)
    rate = lambda s: float(loop.learning_rate(jnp.int32(s), jnp.int32(110), o))
    assert rate(0) == pytest.approx(0.1) and rate(9) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.55) and rate(110) == pytest.approx(0.1)


def test_loop_errors(tmp_path):
    with pytest.raises(ValueError, match="length"):
        loop.train(Line, line_config(tmp_path))
    with pytest.raises(FloatingPointError, match=r"optim\.rate"):
        loop.train(lambda c: Line(c, poison=True), line_config(tmp_path, steps=2, chunk=1))
    assert not loop.checkpoints(tmp_path)
    loop.train(Line, line_config(tmp_path, steps=2))
    with pytest.raises(ValueError, match="--resume"):
        loop.train(Line, line_config(tmp_path, steps=2))


# ------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """All three stages, two steps each, on a folder of eight pictures."""
    root = tmp_path_factory.mktemp("train")
    (root / "data").mkdir()
    rows = []
    for n, (name, noun) in enumerate([("tomato", "tomato"), ("ball", "ball"), *((f"thing {i}", "") for i in range(6))]):
        picture(32, ((30 * n + 60) % 256, 40, 200 - 20 * n)).save(root / "data" / f"{n}.png")
        rows.append({"file_name": f"{n}.png", "text": name, "captions": [name, f"a {name}"], "noun": noun, "hue": 0.9,
                     "value": 0.8, "split": "val" if n == 7 else "train"})  # fmt: skip
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "held.txt").write_text("blue tomato\n")
    common = [f'data.folder="{root}/data"', "data.size=16", "data.batch=8", "data.backgrounds=2", "run.chunk=1",
              "run.sheet=1e9"]  # fmt: skip
    held = [f'data.held_out="{root}/held.txt"']
    tiny_clip = ["model.width=8", "model.mlp=16", "model.projection=8", "model.tower=2", "model.vocab_size=540"]
    tiny_flow = [
        "model.layers=2", "model.heads=1", "model.head_dim=8", "model.pos_size=4", f'vae="{root}/vae"',
        f'text="{root}/text"', "run.sheet_steps=2", 'run.prompts=["a tomato", "ball"]', "run.evaluate=4",
        "optim.rate=0.05", "optim.warmup=1", "optim.ema=0.0",  # far from the zeros that it starts with
    ]  # fmt: skip
    stages = {
        "vae": ["model.channels=[8, 8]", "model.groups=4", "model.latent_channels=4", "run.devices=1"],
        "text": [*tiny_clip, *held, "run.devices=1"],
        "mmdit": [*tiny_flow, *held, "run.devices=2"],
    }
    for stage, extra in stages.items():
        train.run(f"fluent-image/{stage}", [*common, *extra, f'run.folder="{root / stage}"'], steps=2)
    export.export({s: root / s for s in stages}, root / "model")
    return root


@pytest.mark.slow
def test_stages_leave_sheets_logs_and_figures(trained):
    assert [p.name for p in (trained / "vae" / "sheets").iterdir()] == ["vae_0000002.png"]
    assert [p.name for p in (trained / "mmdit" / "sheets").iterdir()] == ["flow_0000002.png"]
    for stage in ("vae", "text", "mmdit"):
        assert "step 2/2" in (trained / stage / "log.txt").read_text()
    assert {"top1", "top5", "colour"} <= json.loads((trained / "mmdit" / loop.RESULT).read_text()).keys()


@pytest.mark.slow
def test_latents_are_normalised(trained):
    written = json.loads((trained / "vae" / "vae" / "config.json").read_text())
    figures = json.loads((trained / "vae" / loop.RESULT).read_text())
    assert written["scaling_factor"] == figures["latent_scale"] and written["shift_factor"] == figures["latent_shift"]


@pytest.mark.slow
def test_export_loads_and_generates(trained, caplog):
    with caplog.at_level(logging.WARNING, "jdit"):
        pipe = jdit.load(trained / "model", dtype="float32")
    out = pipe("a tomato", steps=2, guidance=2.0, seed=0, height=16, width=16)
    assert np.asarray(out.pixels).shape == (1, 16, 16, 3)
    assert pipe.components["text_encoder"].cfg.act == "quick_gelu"
    assert pipe.components["text_encoder_2"].cfg.act == "gelu"


@pytest.mark.slow
def test_sampler_agrees_with_the_pipeline(trained):
    """The training's context (one zero token for 256) and times are those of inference."""
    from jdit.train.flow import FlowTask

    cfg = config.read("fluent-image/mmdit", _flow_overrides(trained))
    task = FlowTask(cfg)
    states, pooled = task.encode(["", "a tomato"])
    weights = task.net.read(trained / "model" / "transformer")
    noise = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    both = lambda a: jnp.concatenate([a[:1], a[1:]])
    got = task.sampler._denoise(weights, noise, (both(states), both(pooled)), task.sampler.table, jnp.float32(3.0))
    pipe = jdit.load(trained / "model", dtype="float32")
    want = pipe(
        "a tomato", steps=2, guidance=3.0, height=16, width=16, latents=np.asarray(noise), output="latents",
        solver="euler",
    ).latents  # fmt: skip
    assert np.linalg.norm(got - noise) / np.linalg.norm(noise) > 0.1  # the network has something to say
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2  # the task's text states are rounded to bfloat16


def _flow_overrides(root: Path) -> list[str]:
    return [f'data.folder="{root}/data"', "data.size=16", "data.batch=8", "data.backgrounds=2", "model.layers=2",
            "model.heads=1", "model.head_dim=8", "model.pos_size=4", f'vae="{root}/vae"', f'text="{root}/text"',
            "run.sheet_steps=2", 'data.held_out=""', 'run.dtype="float32"']  # fmt: skip
