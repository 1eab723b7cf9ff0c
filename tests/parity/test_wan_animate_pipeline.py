"""Wan-Animate against diffusers: whole videos of several segments, animated and replaced."""

import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from util_sd3 import error, noise
from util_wan_animate_pipeline import clip, pictures, pipeline, run_upstream
from util_wan_pipeline import Z, channels_last, original_names

import jdit
from convert import registry, stream, t5
from convert import wan_animate as wan_animate_table
from convert.convert import convert
from convert.source import open_source
from jdit.load import open_model
from jdit.pipeline import executor, wan_animate
from jdit.sharding import leaves

pytestmark = pytest.mark.torch

PROMPTS = ["a red cat on  the moon &amp; two apples", "two"]
NEGATIVE = ["", "blue apple, sat"]
REFERENCE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 47, 3), np.uint8))
SIZE = dict(height=48, width=80)
CASES = {  # (frames, segment_frames, overlap_frames, replace, guidance)
    "two segments, uneven": (15, 9, 1, False, 1.0),
    "three segments, guided": (25, 9, 1, False, 3.0),
    "five frames over, guided": (20, 13, 5, False, 2.5),
    "replaced": (15, 9, 1, True, 1.0),
    "replaced, three segments, five frames over, guided": (24, 13, 5, True, 3.0),
    "shorter than a segment": (6, 9, 1, False, 1.0),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate") / "x"
    theirs = pipeline(folder)
    return theirs, jdit.load(folder, dtype="float32"), folder


def driven(frames: int, replace: bool) -> dict[str, np.ndarray]:
    out = {"pose_video": clip(1, frames, 40, 70), "face_video": clip(2, frames, 20, 18)}
    if replace:
        out |= {"background_video": clip(3, frames, 48, 80), "mask_video": clip(4, frames, 31, 50)}
    return out


def called(frames: int, length: int, overlap: int, replace: bool, guidance: float):
    """(arguments of ours, of upstream's, the noise of each segment)."""
    videos = driven(frames, replace)
    count = jdit.sampling.segments.plan(frames, length, overlap).count
    noises = [noise(i, 2, Z, (length - 1) // 4 + 2, 6, 10) for i in range(count)]
    ours = dict(
        image=REFERENCE, negative_prompt=NEGATIVE, steps=4, guidance=guidance, segment_frames=length,
        overlap_frames=overlap, latents=np.concatenate([channels_last(n) for n in noises], 1), **SIZE, **videos,
    )  # fmt: skip
    theirs = dict(
        image=REFERENCE, prompt=PROMPTS, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=guidance,
        segment_frame_length=length, prev_segment_conditioning_frames=overlap,
        mode="replace" if replace else "animate", output_type="np", **SIZE,
        **{name: pictures(video) for name, video in videos.items()},
    )  # fmt: skip
    return ours, theirs, noises


@pytest.mark.parametrize("case", CASES)
def test_whole_videos(both, case):
    upstream, pipe, _ = both
    ours, theirs, noises = called(*CASES[case])
    want = run_upstream(upstream, noises, **theirs)
    got = pipe(PROMPTS, output="float", **ours)
    assert got.pixels.shape == want.shape == (2, CASES[case][0], 48, 80, 3)
    assert error(got.pixels, want) < 1e-4
    assert got.fps == 30 and got.latents.shape == ours["latents"].shape


class TestForms:
    """The same segments as a loop of programs, as one program, and as a stream."""

    CALL: ClassVar = dict(steps=2, output="float", seed=[3, 8], segment_frames=9, overlap_frames=1)

    @pytest.fixture(scope="class")
    def whole(self, both):
        return both[1](PROMPTS, image=REFERENCE, **SIZE, **driven(22, False), **self.CALL)

    def test_scanned(self, both, whole):
        told = []
        call = self.CALL | driven(22, False)
        got = both[1](
            PROMPTS, image=REFERENCE, scan_segments=True, on_segment=lambda *a: told.append(a), **SIZE, **call
        )
        assert error(got.pixels, whole.pixels) < 1e-6 and error(got.latents, whole.latents) < 1e-6
        assert got.timings.keys() == whole.timings.keys() and told == [(1, 3), (2, 3), (3, 3)]
        segment = ("encode_segment", "encode_face", "denoise", "decode")
        assert {f"{name}[{i}]" for name in segment for i in range(3)} <= got.timings.keys()

    def test_streamed(self, both, whole):
        steps, made = [], []
        call = self.CALL | driven(22, False)
        stream = both[1].stream(PROMPTS, image=REFERENCE, on_step=lambda *a: steps.append(a), **SIZE, **call)
        for out in stream:
            made.append(out)
            assert steps == [(i + 1, 6) for i in range(2 * len(made))]
        assert [m.pixels.shape[1] for m in made] == [9, 8, 5]
        assert np.array_equal(np.concatenate([m.pixels for m in made], 1), whole.pixels)
        assert np.array_equal(np.concatenate([m.latents for m in made], 1), whole.latents)
        with pytest.raises(ValueError, match="not with stream"):
            next(both[1].stream(PROMPTS, image=REFERENCE, scan_segments=True, **SIZE, **call))
        assert "prepare" in made[0].timings and "denoise[2]" in made[2].timings and "prepare" not in made[2].timings

    def test_any_number_of_segments_is_compiled_once(self, both, whole):
        programs = [executor.compiled(s.fn, executor._static(s)) for s in wan_animate.stages() if not s.host]
        before = [p._cache_size() for p in programs]
        for frames in (9, 41):
            for _ in both[1].stream(PROMPTS, image=REFERENCE, **SIZE, **self.CALL, **driven(frames, False)):
                pass
        assert [p._cache_size() for p in programs] == before

    def test_a_row_does_not_depend_on_the_others(self, both, whole):
        call = self.CALL | driven(22, False) | {"seed": 8}
        alone = both[1](PROMPTS[1], image=REFERENCE, **SIZE, **call)
        assert error(alone.pixels[0], whole.pixels[1]) < 1e-5 and error(alone.pixels[0], whole.pixels[0]) > 0.1

    def test_colours_are_held(self, both, whole):
        call = self.CALL | driven(22, False)
        held = both[1](PROMPTS, image=REFERENCE, colour_match=1.0, **SIZE, **call).pixels
        assert np.array_equal(held[:, :9], whole.pixels[:, :9]) and error(held[:, 9:], whole.pixels[:, 9:]) > 1e-3


def test_videos_of_other_lengths_go_back_and_forth(both):
    upstream, pipe, _ = both
    ours, theirs, noises = called(15, 9, 1, False, 1.0)
    short = clip(2, 6, 20, 18)
    want = run_upstream(upstream, noises, **theirs | {"face_video": pictures(short)})
    assert error(pipe(PROMPTS, output="float", **ours | {"face_video": short}).pixels, want) < 1e-4


REFUSED = {
    "it needs image": dict(image=None),
    "it needs face_video": dict(face_video=None),
    "background_video goes with mask_video": dict(background_video=clip(0, 9, 48, 80)),
    "overlap_frames=3; it may be 1 or 5": dict(overlap_frames=3),
    "segment_frames=8 does not work, 5 or 9 would": dict(segment_frames=8),
    "segment_frames=9.5; it must be a whole number": dict(segment_frames=9.5),
    "colour_match=2; it must be between": dict(colour_match=2),
    "height=40 does not work": dict(height=40),
    "does not take last_image": dict(last_image=REFERENCE),
    "face has 4 frames, pose has 9": dict(face_video=clip(2, 4, 20, 18)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_arguments_are_refused(both, words):
    given = dict(image=REFERENCE, **SIZE, **driven(9, False)) | REFUSED[words]
    with pytest.raises(ValueError) as e:
        both[1].check(**given)
    assert words in str(e.value)


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("vae/config.json", dict(z_dim=5), "with the vae's 5 latent channels they would be 14, 5 and 5"),
        ("transformer/config.json", dict(text_dim=21), "reads states of width 21"),
    ],
)
def test_parts_that_do_not_fit(both, tmp_path, name, fields, words):
    folder = shutil.copytree(both[2], tmp_path / "x")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))
    with pytest.raises(ValueError, match=words):
        open_model(folder)


def test_converted_and_back(both, tmp_path):
    convert(both[2], tmp_path / "ours", check=True)
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers", check=True)
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["_class_name"] == "WanAnimatePipeline"
    for other in ("ours", "back"):
        got = jdit.load(tmp_path / other, dtype="float32")
        for name, module in both[1].components.items():
            ours = leaves(got.components[name])
            assert all(np.array_equal(ours[path], value) for path, value in leaves(module).items()), name


def test_original_release(both, tmp_path):
    """The folder as Wan publishes it, other models' folders among it."""
    parts, folder = both[1].components, tmp_path / "release"
    folder.mkdir()
    save_file(original_names(parts["transformer"], wan_animate_table.original_rules(parts["transformer"].cfg)),
              folder / "diffusion_pytorch_model.safetensors")  # fmt: skip
    cfg = parts["transformer"].cfg
    release = dict(_class_name="WanAnimateModel", dim=cfg.width, num_heads=cfg.heads, num_layers=cfg.layers)
    (folder / "config.json").write_text(json.dumps(release))
    text = original_names(parts["text_encoder"], t5.umt5_rules(parts["text_encoder"].cfg))
    torch.save({k: torch.from_numpy(v) for k, v in text.items()}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (folder / "relighting_lora").mkdir()
    save_file({"lora.down": np.zeros(2, np.float32)}, folder / "relighting_lora" / "adapter_model.safetensors")
    (folder / "process_checkpoint" / "sam2").mkdir(parents=True)
    torch.save({"x": torch.zeros(1)}, folder / "process_checkpoint" / "sam2" / "sam2_hiera_large.pt")
    opened = open_source(folder)
    assert opened.family == "wan-animate" and opened.parts.keys() == {"transformer", "text_encoder"}
    part = opened.parts["transformer"]
    got = stream.load_leaves(part.reader, part.rules, registry.of_config(part.cfg).targets(part.cfg))
    assert all(np.array_equal(got[path], value) for path, value in leaves(parts["transformer"]).items())
