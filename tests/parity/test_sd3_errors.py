"""What a user gets wrong is said before work is done; what a checkpoint lacks is named; what goes out comes back."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusion3Pipeline
from util_sd3 import channels_last, error, noise, pipeline

import jdit
from convert.convert import convert
from convert.inspect import inspect
from convert.table import ConversionError
from jdit.cli import main
from jdit.load import open_model

pytestmark = pytest.mark.torch

CALL = dict(height=16, width=16, steps=2, guidance=2.0, output="latents")
PICTURE = np.zeros((20, 30, 3), np.uint8)
LONG = "a red cat on the moon " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    pipeline(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def pipe(folder):
    return jdit.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    dst = tmp_path_factory.mktemp("jdit") / "model"
    convert(folder, dst, check=True)
    return dst


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------- arguments

BAD = {
    "height=0 does not work, 8 would": dict(height=0),
    "height=-8 does not work, 8 would": dict(height=-8),
    "width=17 does not work, 16 or 24 would": dict(width=17),
    "height=1000 does not work, 96 would": dict(height=1000),
    "height='16'; it must be a whole number": dict(height="16"),
    "steps=2.5; it must be a whole number": dict(steps=2.5),
    "steps=0; it must be at least 1; num_outputs=0; it must be at least 1": dict(steps=0, num_outputs=0),
    "guidance=nan; it must be finite": dict(guidance=float("nan")),
    "guidance='4'; it must be a number": dict(guidance="4"),
    "shift=0: must be a positive number": dict(shift=0),
    "max_text_tokens=513; it may be 1 to 512": dict(max_text_tokens=513),
    "clip_skip=3; it may be 0 to 2": dict(clip_skip=3),
    "strength goes with image": dict(strength=0.5),
    "strength=2: must lie in [0, 1]": dict(strength=2, image=PICTURE),
    "skip_layers [4] do not exist; the transformer has layers 0 to 3": dict(skip_layers=[1, 4]),
    "skip_layers needs guidance above 1": dict(skip_layers=[1], guidance=1),
    "skip_layer_scale goes with skip_layers": dict(skip_layer_scale=2.0),
    "3 seeds for 1 outputs": dict(seed=[1, 2, 3]),
    "seed='7'; it must be a whole number": dict(seed="7"),
    "has more than 64 bits": dict(seed=2**63),
    "latents are (1, 4, 4, 15); this call needs (1, 4, 4, 16)": dict(latents=np.zeros((1, 4, 4, 15))),
    "2 texts in negative_prompt for 1 prompts": dict(negative_prompt=["a", "b"]),
    "negative_prompt must be a string or a list of strings, not 3": dict(negative_prompt=3),
    "sd3 does not take num_frames, tea; it takes": dict(num_frames=3, tea=1),
    "output='jpg'; there are uint8": dict(output="jpg"),
    "solver='heun' is unknown": dict(solver="heun"),
    "a picture is a uint8 array": dict(image=PICTURE.astype(float)),
}


@pytest.mark.parametrize("message", BAD)
def test_arguments(pipe, message):
    with pytest.raises(ValueError) as e:
        pipe("a cat", **(CALL | BAD[message]))
    assert message in str(e.value)


def test_prompts(pipe):
    for bad in (5, [], ["a", 5]):
        with pytest.raises(ValueError, match="prompt must be a string or a list of strings"):
            pipe(bad, **CALL)
    encoded = pipe.encode("a cat", negative_prompt=None)
    with pytest.raises(ValueError, match="needs a prompt encoded with a negative_prompt"):
        pipe(encoded, **CALL)
    with pytest.raises(ValueError, match="negative_prompt, max_text_tokens: the prompt is encoded already"):
        pipe(encoded, negative_prompt="x", max_text_tokens=9, **CALL)


def test_what_a_limit_cuts_off_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING, "jdit"):
        pipe.encode(LONG, max_text_tokens=9)
    assert caplog.text.count("75 fit; this was cut off: 'he moon a red cat") == 2  # both CLIP encoders
    assert "8 fit; this was cut off: 'cat on the moon a" in caplog.text


def test_stream_gives_the_one_result(pipe):
    (one,) = pipe.stream("a cat", **CALL)
    assert jnp.array_equal(one.latents, pipe("a cat", **CALL).latents)


def test_what_a_listener_raises_stops_the_run(pipe):
    seen = []

    def stop(step, steps):
        seen.append(step)
        if step == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pipe("a cat", **(CALL | dict(steps=200)), on_step=stop)
    assert len(seen) < 100
    seen.clear()
    pipe("a cat", **CALL, on_step=lambda step, steps: seen.append(step))
    assert seen == [1, 2]


def test_posterior_sample_is_not_the_noise_and_rows_do_not_depend_on_the_batch(pipe, monkeypatch):
    vae, calls = pipe.components["vae"], dict(image=PICTURE, strength=1.0, **CALL)
    both = pipe("a cat", seed=[5, 9], num_outputs=2, **calls).latents
    assert error(pipe("a cat", seed=9, **calls).latents, both[1:]) < 1e-5
    from jdit.pipeline import calls as pieces
    from jdit.pipeline import sd3

    drawn = sd3.encode_image(vae, jnp.asarray(PICTURE[None, :16, :16]), pieces.posterior_keys(5, 1), False)
    posterior = vae.encode(jnp.asarray(PICTURE[None, :16, :16], jnp.float32) / 127.5 - 1)
    sample = vae.denormalise(drawn) - posterior.mean
    correlation = np.corrcoef(np.ravel(sample), np.ravel(pieces.noise((1, 4, 4, 16), 5)))[0, 1]
    assert abs(correlation) < 0.3


def test_nan_weights_are_an_error_and_no_picture(folder, copy):
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(FloatingPointError, match="NaN"):
        jdit.load(copy, dtype="float32")("a cat", **CALL)


# -------------------------------------------------------------------------------------------------- checkpoints


def test_all_components_problems_come_before_any_is_read(copy, converted, tmp_path):
    from safetensors.torch import load_file, save_file

    for name, key in (("transformer", "proj_out.bias"), ("vae", "decoder.conv_out.bias")):
        path = copy / name / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors[key] = tensors[key][:-1].clone()
        save_file(tensors, path)
    with pytest.raises(ConversionError) as e:
        jdit.load(copy)
    assert "proj_out.bias: shape (63,)" in str(e.value) and "decoder.conv_out.bias: shape (2,)" in str(e.value)
    broken = shutil.copytree(converted, tmp_path / "broken")
    for name, leaf in (("transformer", "final.bias"), ("vae", "decoder.conv_in.bias")):
        next(p for p in (broken / name / leaf).iterdir() if p.name[0].isdigit()).unlink()
    with pytest.raises(ValueError) as e:
        jdit.load(broken)
    assert "final.bias/0: missing" in str(e.value) and "conv_in.bias/0: missing" in str(e.value)


def test_foreign_and_partial_pipelines(copy, folder):
    index = copy / "model_index.json"
    whole = index.read_text()
    edit(index, _class_name="StableDiffusionXLPipeline")
    with pytest.raises(ConversionError, match="'StableDiffusionXLPipeline' is not supported; supported:"):
        jdit.load(copy)
    index.write_text(whole)
    edit(index, transformer=["diffusers", "FluxTransformer2DModel"], image_encoder=["transformers", "CLIPVision"])
    with pytest.raises(ConversionError, match=r"transformer: 'FluxTransformer2DModel' is not supported; supported:"):
        jdit.load(copy)
    index.write_text(whole)
    shutil.move(copy / "text_encoder_3", copy.parent / "t5")
    with pytest.raises(ConversionError, match=r"text_encoder_3: the folder that model_index.json names is missing"):
        jdit.load(copy)
    opened = open_model(copy, parts={"text_encoder_3": copy.parent / "t5"})
    assert opened.parts.configs == open_model(folder).parts.configs
    shutil.rmtree(copy / "tokenizer_3")
    edit(index, tokenizer_3=[None, None])
    dry = open_model(copy, parts={"text_encoder_3": copy.parent / "t5"}).dry()
    with pytest.raises(ValueError, match="this model came without tokenizer_3: load it with parts"):
        dry.check(height=16, width=16)


def test_a_folder_with_a_json_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "x"}')
    with pytest.raises(ConversionError, match="no model here"):
        jdit.load(tmp_path)


def test_a_checkpoint_of_one_component(folder, tmp_path):
    convert(folder, tmp_path / "vae", only=["vae"])
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == ["jdit.json", "vae"]
    assert list(inspect(tmp_path / "vae")["components"]) == ["vae"]
    with pytest.raises(ValueError, match="transformer not found, only vae"):
        jdit.load(tmp_path / "vae")


def test_a_damaged_description(converted, tmp_path):
    broken = shutil.copytree(converted, tmp_path / "broken")
    meta = json.loads((broken / "jdit.json").read_text())
    for change, message in (({"family": "x"}, "family 'x' is not known"), ({"scheduler": None}, "jdit.json: ")):
        (broken / "jdit.json").write_text(json.dumps(meta | change))
        for do in (inspect, lambda src: convert(src, tmp_path / "back", to="diffusers")):
            with pytest.raises(ValueError, match=message):
                do(broken)
    del meta["configs"]
    (broken / "jdit.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"jdit.json: 'configs' is missing"):
        inspect(broken)
    assert not (tmp_path / "back").exists()


def test_parts_are_not_ignored_on_the_way_back(converted, folder, tmp_path):
    with pytest.raises(ConversionError, match="parts go with PyTorch checkpoints"):
        convert(converted, tmp_path / "back", to="diffusers", parts={"vae": folder / "vae"})


def test_the_original_layout_is_refused_where_it_loses_the_architecture(converted, tmp_path):
    with pytest.raises(ConversionError, match=r"cannot be read back from the original layout: .*32 norm groups"):
        convert(converted, tmp_path / "x.safetensors", to="original", only=["vae"])
    assert not list(tmp_path.iterdir())


def test_the_way_back_runs_in_diffusers(pipe, converted, tmp_path):
    line = convert(converted, tmp_path / "back", to="diffusers", check=True)
    assert "every tensor agrees" in line
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "back")
    theirs.set_progress_bar_config(disable=True)
    latents = noise(0, 1, 16, 4, 4)
    with torch.no_grad():
        want = theirs(
            "a cat", negative_prompt="two", latents=latents.clone(), height=16, width=16, num_inference_steps=2,
            guidance_scale=2.0, output_type="latent",
        ).images  # fmt: skip
    given = dict(negative_prompt="two", latents=channels_last(latents), **CALL)
    assert error(pipe("a cat", **given).latents, channels_last(want)) < 1e-4
    again = jdit.load(converted, dtype="float32")("a cat", **given)
    assert jnp.array_equal(again.latents, pipe("a cat", **given).latents)


# -------------------------------------------------------------------------------------------------- command line


def run(*arguments: str):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--height", "0"], "height=0 does not work, 8 would"),
        (["--guidance", "nan"], "guidance=nan; it must be finite"),
        (["--strength", "0"], "strength goes with image"),
        (["--max-text-tokens", "600"], "max_text_tokens=600; it may be 1 to 512"),
        (["--skip-layers", "99"], "skip_layers [99] do not exist"),
    ],
)
def test_generate_refuses_before_it_loads(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jdit.load.Opened.pipeline", lambda *a, **k: pytest.fail("weights were read"))
    result = run("generate", "a cat", "--model", folder, "--width", "16", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_a_run_at_once(folder, tmp_path):
    """The device would be busy for minutes: a step that ends hears of the signal."""
    command = [sys.executable, "-m", "jdit", "-v", "generate", "a cat", "--model", str(folder), "--steps", "20000"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    size = ["--height", "96", "--width", "96", "-o", str(tmp_path / "a.png")]
    with subprocess.Popen([*command, *size], stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stderr:  # the denoiser's attention is chosen when it is traced
            lines.append(line)
            if "attention:" in line:
                break
        process.send_signal(signal.SIGINT)
        try:
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, "".join(lines) + rest
    assert rest.strip().endswith("jdit: interrupted; nothing half-written is left behind")
    assert not (tmp_path / "a.png").exists()
