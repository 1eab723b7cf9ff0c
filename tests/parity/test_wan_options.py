"""Wan's further arguments, what it refuses and in which words, and the layouts that it loads from."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file
from test_wan_pipeline import LARGE, NEGATIVE, PICTURES, PROMPTS, SHAPE, SIZE
from util_sd3 import error, noise
from util_wan_pipeline import KINDS, channels_last, original_names, pipeline

import jdit
from convert import autoencoder_kl_wan, t5, wan
from convert.convert import convert
from jdit.cli import main
from jdit.load import open_model
from jdit.nn.vae.autoencoder_kl_wan_config import MEAN_21, MEAN_22, STD_21, STD_22
from jdit.pipeline import memory
from jdit.preprocess import ImageProcessor
from jdit.sharding import leaves, make_mesh

pytestmark = pytest.mark.torch

EXPERTS = {"denoise_high": "transformer", "denoise_low": "transformer_2"}
SHORT = dict(steps=2, guidance=3.0, max_text_tokens=9, output="latents")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a saved pipeline of that kind."""
    place, made = tmp_path_factory.mktemp("wan"), {}

    def get(kind: str):
        if kind not in made:
            made[kind] = pipeline(place / kind, kind)
        return place / kind

    return get


@pytest.fixture(scope="module")
def text(folders):
    return jdit.load(folders("t2v"), dtype="float32")


class TestOptions:
    """Text to video, told otherwise: the numbers stay."""

    @pytest.fixture(scope="class")
    def plain(self, text):
        return text(PROMPTS, negative_prompt=NEGATIVE, **SHORT, **SIZE).latents

    def test_two_passes(self, text, plain):
        got = text(PROMPTS, negative_prompt=NEGATIVE, two_passes=True, **SHORT, **SIZE).latents
        assert error(got, plain) < 1e-5

    def test_encoded_prompts_outputs_and_seeds(self, text, plain):
        settings = {k: v for k, v in SHORT.items() if k != "max_text_tokens"}
        prompt = text.encode(PROMPTS, negative_prompt=NEGATIVE, max_text_tokens=9)
        got = text(prompt, num_outputs=2, seed=[0, 5, 1, 6], **settings, **SIZE).latents
        assert error(got[::2], plain) < 1e-5 and error(got[1], got[0]) > 0.1
        with pytest.raises(ValueError, match="max_text_tokens: the prompt is encoded already"):
            text(prompt, **SHORT, **SIZE)
        with pytest.raises(ValueError, match="negative_prompt"):
            text(text.encode(PROMPTS, negative_prompt=None), **settings, **SIZE)

    def test_a_stochastic_solver_draws_from_the_seed(self, text):
        sde = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "flow_shift": 3.0,
               "prediction_type": "flow_prediction", "use_flow_sigmas": True}  # fmt: skip
        run = lambda seed: (
            text(PROMPTS, solver=sde, seed=seed, **SHORT, **SIZE, latents=np.zeros((2, 3, 6, 10, 4))).latents
        )
        first, still = run([3, 4]), run(None)
        assert error(run([3, 4]), first) == 0 and error(run([4, 3])[0], first[0]) > 0.1 and error(first, still) > 0.1

    def test_without_guidance_no_negative_is_encoded(self, text, monkeypatch):
        seen, tokenizer = [], text.parts.tokenizers["tokenizer"]
        spy = lambda texts, length: seen.append(texts) or type(tokenizer).encode_with_lengths(tokenizer, texts, length)
        stand_in = type("", (), {"encode_with_lengths": staticmethod(spy)})
        monkeypatch.setitem(text.parts.tokenizers, "tokenizer", stand_in)
        text("a  cat&amp;", **{**SHORT, "guidance": 1.0}, **SIZE)
        assert seen == [["a cat&"]]

    def test_decoding(self, text):
        call = {**SHORT, **SIZE, "output": "float"}
        want = text(PROMPTS, **call)
        assert want.fps == 16 and want.pixels.shape == (2, 9, 48, 80, 3) and want.pixels.dtype == np.float32
        told = []
        alone = text(PROMPTS, vae_slicing=True, on_frame=lambda *a: told.append(a), **call)
        assert error(alone.pixels, want.pixels) < 1e-5 and told == [(n, 18) for n in (1, 5, 9, 10, 14, 18)]
        told.clear()
        exact = text(PROMPTS, on_frame=lambda *a: told.append(a), **{**call, "output": "uint8"}).pixels
        assert exact.dtype == np.uint8 and np.mean(exact != np.round(want.pixels * 255)) < 1e-3
        assert told == [(1, 9), (5, 9), (9, 9)]

    def test_steps_are_told_across_experts(self, folders):
        pipe, told = jdit.load(folders("t2v-experts"), dtype="float32"), []
        out = pipe("a cat", on_step=lambda *a: told.append(a), **{**SHORT, "steps": 4}, **SIZE)
        assert told == [(i, 4) for i in range(1, 5)]
        assert {"denoise_high", "denoise_low"} <= out.timings.keys()


def test_tiles_as_upstream(folders):
    theirs, ours = pipeline_of(folders, "t2v"), jdit.load(folders("t2v"), dtype="float32")
    size, shape = dict(height=272, width=48, num_frames=5), (1, 4, 2, 34, 6)
    latents = noise(7, *shape)
    theirs.vae.enable_tiling()
    try:
        with torch.no_grad():
            want = theirs(prompt="two", latents=latents, num_inference_steps=1, guidance_scale=1.0, output_type="np",
                          max_sequence_length=9, **size).frames  # fmt: skip
    finally:
        theirs.vae.disable_tiling()
    call = dict(latents=channels_last(latents), steps=1, guidance=1.0, max_text_tokens=9, output="float", **size)
    assert error(ours("two", vae_tiling=True, **call).pixels, want) < 1e-4


def pipeline_of(folders, kind):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folders(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_bfloat16_is_as_close_as_torch(folders):
    from diffusers import WanPipeline

    theirs, latents = pipeline_of(folders, "t2v"), noise(8, *SHAPE)
    half = WanPipeline.from_pretrained(folders("t2v"), torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    call = lambda pipe: channels_last(pipe(
        prompt=PROMPTS, negative_prompt=NEGATIVE, latents=latents, num_inference_steps=4, guidance_scale=3.0,
        max_sequence_length=9, output_type="latent", **SIZE,
    ).frames)  # fmt: skip
    exact = call(theirs)
    got = jdit.load(folders("t2v"), dtype="bfloat16")(
        PROMPTS, negative_prompt=NEGATIVE, latents=channels_last(latents), **{**SHORT, "steps": 4}, **SIZE
    )
    assert error(np.asarray(got.latents), exact) < 1.2 * error(call(half), exact)


def test_sharded_equals_unsharded(folders):
    mesh = make_mesh(data=2, sequence=2, tensor=2)
    want = jdit.load(folders("t2v-experts"), dtype="float32")
    got = jdit.load(folders("t2v-experts"), dtype="float32", mesh=mesh)
    call = {**SHORT, **SIZE, "steps": 4}
    assert error(got(PROMPTS, **call).latents, want(PROMPTS, **call).latents) < 1e-5


# ------------------------------------------------------------------------------------------------ refusals

REFUSED = {
    "t2v": {
        "takes no image": dict(image=PICTURES[0]),
        "num_frames=8 does not work, 5 or 9 would (1 + 4 n": dict(num_frames=8),
        "num_frames=0; it must be at least 1": dict(num_frames=0),
        "height=50 does not work, 48 or 64 would": dict(height=50),
        "width=100000 does not work": dict(width=100000),
        "guidance_2 is the second expert's": dict(guidance_2=3.0),
        "does not take strength": dict(strength=0.5),
    },
    "i2v": {
        "needs image": {},
        "no last_image: its transformer sees one picture": dict(image=PICTURES[0], last_image=PICTURES[1]),
        "is not a picture that Pillow reads": dict(image=__file__),
    },
    "flf2v": {"needs last_image": dict(image=PICTURES[0]), "num_frames=1; a first": dict(
        image=PICTURES[0], last_image=PICTURES[1], num_frames=1)},
    "t2v-experts": {"guidance_2 needs guidance above 1": dict(guidance=1.0, guidance_2=2.0)},
    "5b": {"takes no last_image": dict(image=PICTURES[0], last_image=PICTURES[1]),
           "height=48 does not work, 32 or 64 would": dict(height=48)},
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_arguments_are_refused_before_loading(folders, kind):
    dry = open_model(folders(kind)).dry()
    for words, arguments in REFUSED[kind].items():
        with pytest.raises(ValueError) as e:
            dry.check(**arguments)
        assert words in str(e.value)
        with pytest.raises(ValueError):  # the call refuses it too, with no weights to run
            dry("a cat", **{**SIZE, **arguments})
    assert dry.frames(9) == 9


def test_a_model_that_does_not_take_the_usual_size(tmp_path, monkeypatch):
    """It is loaded all the same; a call says its size."""
    monkeypatch.setitem(KINDS, "patches", {"transformer": KINDS["t2v"]["transformer"] | {"patch_size": (2, 1, 3)}})
    pipeline(tmp_path / "x", "patches")
    pipe = jdit.load(tmp_path / "x", dtype="float32")
    with pytest.raises(ValueError, match="num_frames=81 does not work, 77 or 85 would"):
        pipe("a cat", height=48, width=72)
    pipe.check(height=48, width=72, num_frames=13)
    told = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path / "x"), "--json"]).stdout)
    assert told["problems"] == [] and told["memory"]["activations"] == 0


def edited(folders, tmp_path, kind, name, **fields):
    folder = shutil.copytree(folders(kind), tmp_path / kind)
    place = folder / name
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    "kind, name, fields, words",
    [
        ("t2v", "vae/config.json", dict(z_dim=5), "the vae has 5 latent channels: 5 or 14 in and 5 out would fit"),
        ("t2v", "transformer/config.json", dict(text_dim=21), "reads states of width 21"),
        ("t2v", "model_index.json", dict(boundary_ratio=0.5), "there is no transformer_2"),
        ("flf2v", "transformer/config.json", dict(pos_embed_seq_len=12), "positions for 12 tokens"),
        ("5b", "transformer/config.json", dict(patch_size=[2, 2, 2]), "expand_timesteps with patches of 2 frames"),
    ],
)
def test_parts_that_do_not_fit(folders, tmp_path, kind, name, fields, words):
    with pytest.raises(ValueError) as e:
        open_model(edited(folders, tmp_path, kind, name, **fields))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_inspect_tells_the_memory_plan_and_misfits(folders, tmp_path):
    run = lambda folder: CliRunner().invoke(main, ["inspect", str(folder), "--json"])
    told = json.loads(run(folders("t2v-experts")).stdout)
    stages = ["encode_text", "prepare", "modulate_high", "denoise_high", "modulate_low", "denoise_low"]
    assert [s["stage"] for s in told["memory"]["stages"]][:6] == stages
    assert told["memory"]["least"] < told["memory"]["peak"] and told["problems"] == []
    assert "denoise_low" in CliRunner().invoke(main, ["inspect", str(folders("t2v-experts"))]).stdout
    broken = run(edited(folders, tmp_path, "t2v", "model_index.json", boundary_ratio=0.5))
    assert broken.exit_code == 2 and "no transformer_2" in json.loads(broken.stdout)["problems"][0]


def test_experts_and_encoder_take_turns(folders, monkeypatch):
    """With little room the experts are read for their stages, and the numbers stay."""
    call = {**SHORT, **SIZE, "steps": 4, "on_step": lambda *told: None}
    want = jdit.load(folders("t2v-experts"), dtype="float32")("a cat", **call).latents
    opened = open_model(folders("t2v-experts"))
    monkeypatch.setattr(memory, "room", lambda *_: opened.memory(dtype="float32", room=0).least)
    pipe = opened.pipeline(dtype="float32")
    turns = [f"{n}/{part}" for n in EXPERTS.values() for part in ("modulation", "loop")]
    assert set(turns) <= pipe.weights.waiting.keys()
    seen, read = [], pipe.weights.waiting
    for name in turns:
        read[name] = lambda name=name, make=read[name]: (seen.append((name, set(pipe.weights.resident))), make())[1]
    assert np.array_equal(pipe("a cat", **call).latents, want)
    assert [name for name, _ in seen] == turns  # each made its table, let go, and its loop
    assert all(not set(turns) & here for _, here in seen)


# ------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("kind", ["flf2v", "t2v-experts"])
def test_converted_and_back(folders, tmp_path, kind):
    """A jdit checkpoint keeps what model_index.json says, and gives it back."""
    folder = folders(kind)
    convert(folder, tmp_path / "ours", check=True)
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers", check=True)
    index = [json.loads((f / "model_index.json").read_text()) for f in (folder, tmp_path / "back")]
    for field in ("_class_name", "boundary_ratio", "image_encoder", "image_processor", "transformer_2"):
        known = [i.get(field) for i in index]
        known = [v[0] if isinstance(v, list) else v for v in known]  # the library of a component
        assert known[0] == known[1], field
    want = jdit.load(folder, dtype="float32")
    for other in ("ours", "back"):
        got = jdit.load(tmp_path / other, dtype="float32")
        for part in ("configs", "scheduler", "plan"):
            assert getattr(got.parts, part) == getattr(want.parts, part), part
        assert ImageProcessor.from_config(got.parts.settings.get("image_processor", {})) == ImageProcessor.from_config(
            want.parts.settings.get("image_processor", {})
        )
        for name, module in want.components.items():
            ours = leaves(got.components[name])
            assert all(np.array_equal(ours[path], value) for path, value in leaves(module).items()), name


def originals(pipe) -> dict[str, dict[str, np.ndarray]]:
    """component -> its tensors under the names of Wan's own releases."""
    parts = pipe.components
    out = {n: original_names(m, wan.original_rules(m.cfg)) for n, m in parts.items() if n.startswith("transformer")}
    out["vae"] = original_names(parts["vae"], autoencoder_kl_wan.original_rules(parts["vae"].cfg))
    out["text_encoder"] = original_names(parts["text_encoder"], t5.umt5_rules(parts["text_encoder"].cfg))
    return out


def config_of(cfg) -> str:
    fields = dict(
        _class_name="WanModel", dim=cfg.width, eps=cfg.eps, ffn_dim=cfg.mlp, freq_dim=cfg.freq_dim,
        in_dim=cfg.in_channels, model_type="t2v", num_heads=cfg.heads, num_layers=cfg.layers, out_dim=cfg.out_channels,
        text_len=512,
    )  # fmt: skip
    return json.dumps(fields)


PUBLISHED_STATISTICS = {  # no file of a release carries them: they are known by the number of channels
    "t2v": dict(z_dim=16, latents_mean=list(MEAN_21), latents_std=list(STD_21)),
    "t2v-experts": dict(z_dim=16, latents_mean=list(MEAN_21), latents_std=list(STD_21)),
    "5b": dict(z_dim=48, latents_mean=list(MEAN_22), latents_std=list(STD_22)),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED_STATISTICS)
def test_original_releases(tmp_path, kind, monkeypatch):
    """A folder as Wan publishes it: experts in folders, .pth files, the tokenizer below google/."""
    own = PUBLISHED_STATISTICS[kind]
    channels = dict(in_channels=own["z_dim"], out_channels=own["z_dim"])
    monkeypatch.setitem(KINDS[kind], "transformer", channels)
    pipeline(tmp_path / "diffusers", kind, shift=5.0, **own)
    want = jdit.load(tmp_path / "diffusers", dtype="float32")
    folder = tmp_path / "release"
    places = {"transformer": folder, "transformer_2": folder / "low_noise_model"}
    if kind == "t2v-experts":
        places["transformer"] = folder / "high_noise_model"
    for name, tensors in originals(want).items():
        if name.startswith("transformer"):
            places[name].mkdir(parents=True, exist_ok=True)
            save_file(tensors, places[name] / "diffusion_pytorch_model.safetensors")
            (places[name] / "config.json").write_text(config_of(want.components[name].cfg))
        else:
            file = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}[name]
            torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / file)
    shutil.copytree(tmp_path / "diffusers" / "tokenizer", folder / "google" / "umt5-xxl")
    got = jdit.load(folder, dtype="float32")
    assert got.parts.settings == {k: v for k, v in want.parts.settings.items() if v and k != "image_processor"}
    assert got.components.keys() == want.components.keys()
    call = {**SHORT, **(LARGE if kind == "5b" else SIZE), "steps": 4}
    assert np.array_equal(got("a cat", **call).latents, want("a cat", **call).latents)
