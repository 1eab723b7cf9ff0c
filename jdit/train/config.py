"""Training configs: TOML files into dataclasses. An unknown key is an error that lists the known ones."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("vae", "text", "flow", "video_vae", "video_flow", "video_animate")


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        folder: pictures with captions, see `jdit.train.data.read`, or clips, see `jdit.train.clips`.
        size: side of the training pictures, in pixels. frames: of a clip (video stages only).
        segment: how many of these frames, which are one loop, "video_animate" makes at once.
        batch: pictures a step, over all devices.
        flip: mirror half of the pictures (autoencoder only; flow training would learn mirrored writing).
        mix: shares of a batch: plain pictures, recoloured, on a coloured background, both. Without transparency and
            `noun` in the metadata there is only the first.
        backgrounds: coloured backgrounds a picture (of those in jdit.train.colour), the plain one not counted.
        held_out: file of "colour noun" lines that are never trained, beside the config or a path; "" for none.
        empty: share of empty captions (guidance dropout).
        balance: 0 draws clips evenly, 1 the groups that the metadata name (video stages); between, a group of n clips
            has n ** (1 - balance) shares.
    """

    folder: str = ""
    size: int = 128
    frames: int = 17
    segment: int = 17
    batch: int = 256
    flip: bool = False
    mix: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)
    backgrounds: int = 9
    held_out: str = ""
    empty: float = 0.1
    balance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW (arXiv 1711.05101) with warm-up and cosine decay, and an average of the weights.

    Attributes:
        rate: learning rate at its height. floor: what is left of it at the end, as a share.
        warmup: steps. decay: weight decay of matrices. clip: largest norm of the gradient.
        ema: decay of the average; it is min(ema, (1 + step) / (10 + step)), so that early weights are forgotten.
    """

    rate: float = 1e-3
    floor: float = 0.02
    warmup: int = 500
    decay: float = 0.01
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.99
    ema: float = 0.9995


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how long.

    Attributes:
        folder: checkpoints, sample sheets, the log and the result are written here.
        steps: length of the run and of its schedule; 0: `minutes` decides.
        minutes: length by the clock: the speed is measured, the schedule fitted to it. Parts of a resumed run count.
        stop_after: minutes after which this call saves and stops, finished or not; 0: never.
        chunk: steps a dispatch; the host looks in between. log, save, sheet: seconds from one to the next.
        devices: 0 takes all. attention: backend to try first (jdit.nn.attention).
        remat: "dots" recomputes all but products in the backward pass, "none" keeps everything.
        portable: keep a small copy of the last checkpoint too, see `jdit.train.portable`.
        prompts, guidance, sheet_steps: of the sample sheets. evaluate: captions that are generated to measure recall.
    """

    folder: str = ""
    steps: int = 0
    minutes: float = 0.0
    stop_after: float = 0.0
    chunk: int = 50
    log: float = 10.0
    save: float = 120.0
    sheet: float = 120.0
    seed: int = 0
    dtype: str = "bfloat16"
    devices: int = 0
    attention: str = ""
    remat: str = "none"
    portable: bool = False
    prompts: tuple[str, ...] = ()
    guidance: float = 4.0
    sheet_steps: int = 20
    evaluate: int = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run.

    Attributes:
        stage: "vae" (autoencoder), "text" (two CLIP text encoders), "flow" (MMDiT), "video_vae" (Wan's autoencoder),
            "video_flow" (Wan's transformer and a UMT5 text encoder) or "video_animate" (Wan-Animate's transformer and
            a CLIP image encoder).
        model: architecture, the fields of the stage's config class. loss: weights of the stage's loss terms.
        encoder: architecture of the text encoder that "video_flow" trains too, or of the image encoder that
            "video_animate" trains, see these modules.
        vae, text: folders that the earlier stages wrote, or a diffusers folder that has them.
        init: component folder in diffusers layout to start from, or a folder that has it (two, in the last two); ""
            starts from random weights.
        path: the file that this was read from.
    """

    stage: str
    data: Data = Data()
    optim: Optim = Optim()
    run: Run = Run()
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, float] = dataclasses.field(default_factory=dict)
    vae: str = ""
    text: str = ""
    init: str = ""
    path: Path = Path()

    def dumps(self) -> str:
        """As JSON, for the record in the run's folder."""
        return json.dumps(dataclasses.asdict(self), default=str, indent=2) + "\n"


def find(config: str | Path) -> Path:
    """A TOML file, or the recipe of that name: "fluent-image/vae".

    Raises:
        ValueError: neither is there.
    """
    path = Path(config)
    if path.is_file():
        return path
    recipe = RECIPES / (str(config).replace("-", "_") + ".toml")
    if recipe.is_file():
        return recipe
    have = sorted(str(p.relative_to(RECIPES).with_suffix("")).replace("_", "-") for p in RECIPES.glob("*/*.toml"))
    raise ValueError(f"{config}: no such file, and no recipe of that name; recipes are {', '.join(have)}")


def read(config: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config; `overrides` are KEY=VALUE with dotted keys, values in TOML (bare words are strings).

    Raises:
        ValueError: broken TOML, unknown keys, values of the wrong kind; all of them at once.
    """
    path = find(config)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path}: {e}") from None
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} is not KEY=VALUE")
        *parents, last = key.strip().split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"{key}: {name} is a value, not a section")
        node[last] = _value(text)
    problems: list[str] = []
    out = _build(Config, tree | {"path": path}, "", problems)
    if not problems:
        problems = _check(out)
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return out


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _build(kind: type, tree: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            problems.append(f"unknown key {where}{key} (known: {', '.join(n for n in fields if n != 'path')})")
            continue
        default = fields[key].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                problems.append(f"{where}{key} is a section")
                continue
            values[key] = _build(type(default), value, f"{where}{key}.", problems)
            continue
        if isinstance(value, Mapping):  # a section of its own: architectures want tuples
            value = {k: _frozen(v) for k, v in value.items()}
        value = _frozen(value)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not dataclasses.MISSING and type(value) is not type(default) and key != "path":
            problems.append(f"{where}{key} = {value!r} should be {type(default).__name__}")
        values[key] = value
    try:
        return kind(**values)
    except TypeError as e:
        problems.append(str(e).replace(f"{kind.__name__}.__init__()", "the config"))
        return None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(c: Config) -> list[str]:
    problems = []
    if c.stage not in STAGES:
        problems.append(f"stage = {c.stage!r}; there are {', '.join(STAGES)}")
    if not c.data.folder:
        problems.append("data.folder is not set")
    if not c.run.folder:
        problems.append("run.folder is not set")
    if len(c.data.mix) != 4 or min(c.data.mix) < 0 or sum(c.data.mix) <= 0:
        problems.append(f"data.mix = {c.data.mix}: four shares are wanted")
    if c.run.dtype not in ("bfloat16", "float32"):
        problems.append(f"run.dtype = {c.run.dtype!r}; there are bfloat16, float32")
    if c.run.remat not in ("none", "dots"):
        problems.append(f"run.remat = {c.run.remat!r}; there are none, dots")
    for name in ("batch", "size", "frames"):
        if getattr(c.data, name) < 1:
            problems.append(f"data.{name} must be at least 1")
    if not 0 <= c.data.balance <= 1:
        problems.append(f"data.balance = {c.data.balance}: from 0 (clips evenly) to 1 (groups evenly)")
    if c.run.chunk < 1:
        problems.append("run.chunk must be at least 1")
    return problems
