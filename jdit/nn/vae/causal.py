"""Convolutions over video that see no later frame, and the frames that they carry from chunk to chunk.

B batch, T frames, H rows, W columns, C D channels in and out; channels last. A causal network gives the same numbers
whether a video passes through it whole or chunk by chunk, if each layer is handed the frames before its chunk: `Stream`
is where a layer takes them from and leaves its own last ones, `Cache` is all of them, a pytree, `run_chunks` the loop.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Frames = Float[Array, "B T H W C"]
Padding = Literal["zero", "replicate"]

FORM = "taps"
"""How a causal convolution is computed, a name of `FORMS`; read while tracing. In bfloat16 the
whole decoder of Wan 2.1 takes 0.77 s with taps and 1.24 s with "conv3d" on an H200 (81 x 480 x 832,
benchmarks/wan_h200.md); on two CPU cores single convolutions are 1.5 to 14 times as fast."""


class Cache(NamedTuple):
    """What a causal network remembers between chunks: the last input frames of each layer, in the order they ran."""

    frames: tuple[Frames, ...]


class Stream:
    """One chunk's pass through a causal network: hands each layer the frames before its chunk, collects the next.

    Made inside a traced function and gone at its end; only `Cache` travels. Layers run in the same order each time.

    Args:
        cache: what the chunk before left; None for the first chunk.
    """

    def __init__(self, cache: Cache | None = None):
        self.first = cache is None
        self._past = iter(() if cache is None else cache.frames)
        self._kept: list[Frames] = []

    def take(self) -> Frames:
        """The frames that this layer kept from the chunk before."""
        try:
            return next(self._past)
        except StopIteration:
            raise ValueError("the cache is of another network: it holds too few layers") from None

    def keep(self, frames: Frames):
        """Leave frames for this layer's next chunk: once for each layer and chunk."""
        self._kept.append(frames)

    def extend(self, x: Frames, frames: int, padding: Padding = "zero") -> Float[Array, "B T+frames H W C"]:
        """x behind the `frames` frames before it; the last ones are kept. Before a video: zeros, or its first frame."""
        if not self.first:
            past = self.take()
        elif padding == "zero":
            past = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        else:
            past = jnp.repeat(x[:, :1], frames, axis=1)
        x = jnp.concatenate([past, x], 1)
        self.keep(x[:, x.shape[1] - frames :])
        return x

    def cache(self) -> Cache:
        """What the next chunk needs, when all layers have run."""
        if next(self._past, None) is not None:
            raise ValueError("the cache is of another network: it holds too many layers")
        return Cache(tuple(self._kept))


def _taps(x: Frames, kernel: Float[Array, "k k t C D"], stride: int, step: int = 1, edge: str = "SAME") -> Frames:
    """The frames under the kernel side by side in the channels, then one convolution of a picture a frame."""
    k, _, taps, c_in, c_out = kernel.shape
    n = (x.shape[1] - taps) // stride + 1
    if taps > 1 or stride > 1:
        x = jnp.concatenate([x[:, i : i + stride * (n - 1) + 1 : stride] for i in range(taps)], -1)
    flat = kernel.reshape(k, k, taps * c_in, c_out)
    if k == 1 and step == 1:
        return x @ flat[0, 0]
    dims = ("NHWC", "HWIO", "NHWC")
    return per_frame(lambda f: jax.lax.conv_general_dilated(f, flat, (step, step), edge, dimension_numbers=dims), x)


def _conv3d(x: Frames, kernel: Float[Array, "k k t C D"], stride: int, step: int = 1, edge: str = "SAME") -> Frames:
    """One convolution over frames, rows and columns."""
    k = kernel.shape[0]
    pads = ((k - 1) // 2, k // 2) if edge == "SAME" else (0, 0)
    dims = ("NDHWC", "HWDIO", "NDHWC")  # strides and edges follow the kernel's order of axes
    return jax.lax.conv_general_dilated(x, kernel, (step, step, stride), (pads, pads, (0, 0)), dimension_numbers=dims)


FORMS: dict[str, Callable[..., Frames]] = {"taps": _taps, "conv3d": _conv3d}
"""(x, kernel, stride of the frames, stride of rows and columns, "SAME" or "VALID" at their edges)."""


def per_frame(fn: Callable[[Float[Array, "N H W C"]], Array], x: Frames) -> Array:
    """A function of pictures, applied to every frame."""
    y = fn(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


class CausalConv(nnx.Module):
    """A convolution of `taps` frames (this one and those before it) and `size` rows and columns, same size out.

    kernel (size, size, taps, C, D): taps beside channels, so that the form "taps" only reshapes it.

    Args:
        stride: of the frames; then T must be what the network's rule of chunks wants, see `valid`.
        step: stride of rows and columns, of which ceil(H / step) come out; above 1 with repeated edges only.
        padding: what stands before the first frame.
        edges: what stands around rows and columns.
    """

    def __init__(
        self, c_in: int, c_out: int, *, taps: int = 3, size: int = 3, stride: int = 1, step: int = 1,
        padding: Padding = "zero", edges: Padding = "zero", dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        if step > 1 and edges == "zero":
            raise ValueError(f"step is {step}: with zeros around rows and columns only 1 is supported")
        self.taps, self.stride, self.step = taps, stride, step
        self.padding: Padding = padding
        self.edges: Padding = edges
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, taps, c_in, c_out), dtype), axes=(None,) * 5)
        self.bias = nnx.Param(jnp.zeros(c_out, dtype), axes=(None,))

    def __call__(self, x: Frames, stream: Stream | None = None) -> Float[Array, "B n Y X D"]:
        """As many frames out as in (with a stride ceil(T / stride)); `stream` None is a whole video."""
        stream = stream or Stream()
        alone = stream.first and x.shape[1] == 1 and self.padding == "zero"
        behind = stream.extend(x, self.taps - 1, self.padding)
        # a first frame alone has zeros before it: those taps add nothing, and a picture costs a third
        return self.valid(x, last=1) if alone else self.valid(behind)

    def valid(self, x: Frames, last: int | None = None) -> Float[Array, "B n Y X D"]:
        """Without frames added in front: n = (T - taps) // stride + 1. `last`: with the kernel's last taps alone."""
        kernel, edge = self.kernel.get_value()[:, :, -(last or self.taps) :], "SAME"
        if self.edges == "replicate":
            around, edge = (kernel.shape[0] // 2,) * 2, "VALID"
            x = jnp.pad(x, ((0, 0), (0, 0), around, around, (0, 0)), mode="edge")
        return FORMS[FORM](x.astype(kernel.dtype), kernel, self.stride, self.step, edge) + self.bias.get_value()


def run_chunks(
    step: Callable[[Frames, Cache | None], tuple[Frames, Cache]], x: Frames, *, size: int, out: int, first: int = 1
) -> Float[Array, "B S Y X D"]:
    """step(chunk, cache) -> (result, cache) over the frames of x: the first ones apart, then a scan over the rest.

    Results are written into one buffer, so that memory besides x and the result does not grow with the length. Frames
    beyond first + n * size are left out.

    Args:
        size: frames of a chunk after the first. out: frames of its result (the first chunk's may be another number).
        first: frames of the first chunk.
    """
    y, cache = step(x[:, :first], None)
    n, begin = (x.shape[1] - first) // size, y.shape[1]
    if n == 0:
        return y
    results = jnp.zeros((y.shape[0], begin + n * out, *y.shape[2:]), y.dtype)

    def body(carry, i):
        cache, results = carry
        y, cache = step(jax.lax.dynamic_slice_in_dim(x, first + i * size, size, 1), cache)
        return (cache, jax.lax.dynamic_update_slice_in_dim(results, y, begin + i * out, 1)), None

    carry = cache, jax.lax.dynamic_update_slice_in_dim(results, y, 0, 1)
    return jax.lax.scan(body, carry, jnp.arange(n))[0][1]
