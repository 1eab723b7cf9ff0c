"""A transformer's step as a program of shapes: what is lowered, compiled and counted without weights, or run with them.

p = programs.of(WanConfig(), (21, 60, 104))            latents of 81 x 480 x 832
jax.jit(p.whole).lower(*p.abstract()).compile()
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdit import sharding, zoo
from jdit.nn.cogvideox import CogVideoXConfig
from jdit.nn.hunyuan_video import HunyuanVideoConfig
from jdit.nn.mmdit import MMDiTConfig
from jdit.nn.qwen_image import QwenImageConfig
from jdit.nn.wan import WanConfig
from jdit.nn.wan_animate_config import WanAnimateConfig


class Program(NamedTuple):
    """x are latents, `given` what the prompt and its like are made into; `before` runs once, `step` in each step."""

    make: Callable[[], nnx.Module]
    x: jax.ShapeDtypeStruct
    given: tuple[jax.ShapeDtypeStruct, ...]
    before: Callable[..., tuple]
    step: Callable[..., Any]

    def whole(self, module, x, *given):
        return self.step(module, x, *self.before(module, *given))

    def abstract(self, mesh: Mesh | jax.sharding.AbstractMesh | None = None, rules: sharding.Rules | None = None):
        """Arguments of `whole`: the module and arrays of shapes alone, placed where there is a mesh."""
        _, leaves = sharding.abstract(self.make, mesh, rules)
        module = sharding.assemble(self.make, leaves)  # pyright: ignore[reportArgumentType]
        return module, *(placed(a, mesh) for a in (self.x, *self.given))

    def prepared(self) -> tuple:
        """Shapes of what `before` gives."""
        return jax.eval_shape(self.before, *(self.abstract()[i] for i in (0, *range(2, 2 + len(self.given)))))


def placed(a: jax.ShapeDtypeStruct, mesh) -> jax.ShapeDtypeStruct:
    """An array whose rows are spread over the data axis where they divide."""
    if mesh is None:
        return a
    spec = P("data") if a.ndim and a.shape[0] % mesh.shape["data"] == 0 else P()
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))


def of(cfg: Any, size: tuple[int, ...], rows: int = 1, text: int | None = None) -> Program:
    """The step of a transformer.

    Args:
        size: of the latents, (Y, X) or (T, Y, X). rows: batch. text: its tokens; None is what the family usually has.
    """
    make = sharding.Make(zoo.MODULES[type(cfg)], cfg)
    array = lambda *shape, dtype=cfg.dtype: jax.ShapeDtypeStruct((rows, *shape), dtype)
    x, t = array(*size, cfg.in_channels, dtype="float32"), array(dtype="float32")
    lengths = array(dtype="int32")
    states = lambda usual, width: array(text or usual, width)

    if isinstance(cfg, MMDiTConfig):
        before = lambda m, t, text, pooled: (m.modulation(t, pooled), m.embed_context(text))
        given = t, states(333, cfg.joint_dim), array(cfg.pooled_dim)
        return Program(make, x, given, before, lambda m, x, *a: m.velocity(x, *a))
    if isinstance(cfg, QwenImageConfig):
        before = lambda m, t, text, lengths: (m.modulation(t), m.embed_text(text), lengths)
        step = lambda m, x, rows, text, n: m.velocity(x, rows, text, text_lengths=n)
        return Program(make, x, (t, states(128, cfg.text_dim), lengths), before, step)
    if isinstance(cfg, CogVideoXConfig):
        before = lambda m, t, text: (m.modulation(t), m.embed_text(text))
        return Program(make, x, (t, states(226, cfg.text_dim)), before, lambda m, x, *a: m.velocity(x, *a))
    if isinstance(cfg, HunyuanVideoConfig):
        before = lambda m, t, text, n, pooled, scale: (
            m.modulation(t, pooled, scale), m.embed_text(t, text, text_lengths=n), n,
        )  # fmt: skip
        step = lambda m, x, rows, text, n: m.velocity(x, rows, text, text_lengths=n)
        given = t, states(256, cfg.text_dim), lengths, array(cfg.pooled_dim), array(dtype="float32")
        return Program(make, x, given, before, step)
    given = t, states(512, cfg.text_dim)
    if cfg.image_dim is not None:
        given = *given, array(257, cfg.image_dim)
    if isinstance(cfg, WanAnimateConfig):
        frames, face = size[0] - 1, cfg.face_size
        given = *given, array(frames, *size[1:], cfg.latent_channels), array(4 * frames, face, face, 3)
        before = lambda m, t, text, image, pose, pixels: (
            m.modulation(t), m.embed_context(text, image), m.embed_pose(pose), m.embed_face(pixels),
        )  # fmt: skip
    else:
        assert isinstance(cfg, WanConfig), f"no program for {type(cfg).__name__}"
        before = lambda m, t, *a: (m.modulation(t), m.embed_context(*a))
    return Program(make, x, given, before, lambda m, x, *a: m.velocity(x, *a))
