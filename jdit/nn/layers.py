"""Building blocks. B batch, N tokens, D width, H heads, K head dim, F mlp width.

Compute dtype = parameter dtype of the layer; statistics are taken in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jdit.sharding import Rules
from jdit.target import target

Axes = tuple[str | None, ...]


def product(*args, **kw) -> Array:
    """`jax.lax.dot_general`. On a GPU the bias stays apart from it, to be added where the result is read: XLA reads a
    scanned layer's weights in place for products that have nothing fused in, and copies them for others."""
    out = jax.lax.dot_general(*args, **kw)
    return jax.lax.optimization_barrier(out) if target().platform == "gpu" else out


def linear(d_in: int, d_out: int, axes: Axes, *, dtype, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """Dense layer with logical axes (in, out) on its kernel (d_in, d_out)."""
    return nnx.Linear(
        d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, dot_general=product, rngs=rngs,
        kernel_metadata={"axes": axes}, bias_metadata={"axes": axes[1:]},
    )  # fmt: skip


def fused_linear(d_in: int, n: int, d_out: int, axes: Axes, *, dtype, rngs: nnx.Rngs, bias: bool = True):
    """`n` dense layers on one input as one product (q, k, v): kernel (d_in, n, d_out), axes (in, out)."""
    return nnx.LinearGeneral(
        d_in, (n, d_out), use_bias=bias, dtype=dtype, param_dtype=dtype, dot_general=product, rngs=rngs,
        kernel_metadata={"axes": (axes[0], None, axes[1])}, bias_metadata={"axes": (None, axes[1])},
    )  # fmt: skip


def marked(x: Array) -> tuple[Array, Float[Array, ""]]:
    """x, and a zero that is there when x is: what it is added to is made after x, at no cost in the kernel that makes
    it. Whoever needs x has to use the one that is returned, else XLA forgets what the zero was to wait for."""
    return jax.lax.optimization_barrier((x, jnp.zeros((), x.dtype)))


def some_parts(
    fused: nnx.LinearGeneral, x: Float[Array, "... D"], which: slice, rules: Rules, sent: Float[Array, ""] | None = None
) -> Float[Array, "... m E"]:
    """Some of a `fused_linear`'s parts, in a product of their own.

    sent: mark (`marked`) of what other devices are to be sent while the product runs. The kernel that copies these
    parts' weights waits for it: NCCL's has its processors then before the product's takes all of them and keeps them.
    """
    kernel, bias = fused.kernel.get_value(), fused.bias
    if len(range(kernel.shape[1])[which]) == kernel.shape[1]:
        return fused(x)
    some = kernel[:, which] if sent is None else kernel[:, which] + sent.astype(kernel.dtype)
    m, e = some.shape[1:]
    # not `product`: these weights are copied in any case, and a bias of one axis is free in the product's own kernel.
    # Several parts whose columns are spread have no such axis that is spread.
    axes = (m * e,) if m == 1 or rules.ways(fused.kernel.get_metadata("axes")[-1]) == 1 else (m, e)
    out = jax.lax.dot_general(x.astype(kernel.dtype), some.reshape(-1, *axes), (((x.ndim - 1,), (0,)), ((), ())))
    if bias is not None:
        out = out + bias.get_value()[which].reshape(axes)
    return out.reshape(*x.shape[:-1], m, e)


def joined_linear(n: int, d_in: int, d_out: int, axes: Axes, *, dtype, rngs: nnx.Rngs):
    """One dense layer on `n` arrays (..., n, d_in): kernel (n, d_in, d_out), axes (in, out)."""
    return nnx.LinearGeneral(
        (n, d_in), d_out, axis=(-2, -1), dtype=dtype, param_dtype=dtype, dot_general=product, rngs=rngs,
        kernel_metadata={"axes": (None, *axes)}, bias_metadata={"axes": axes[1:]},
    )  # fmt: skip


def conv(
    c_in: int, c_out: int, kernel: int, *, stride: int = 1, padding: Any = "SAME", rank: int = 2, bias: bool = True,
    dtype, rngs: nnx.Rngs,
) -> nnx.Conv:  # fmt: skip
    """2D convolution (1D with `rank` 1), channels last, kernel (k, k, c_in, c_out)."""
    return nnx.Conv(
        c_in, c_out, (kernel,) * rank, strides=stride, padding=padding, use_bias=bias, dtype=dtype, param_dtype=dtype,
        rngs=rngs, kernel_metadata={"axes": (None,) * (rank + 2)}, bias_metadata={"axes": (None,)},
    )  # fmt: skip


def _statistics(values, rotated: bool):
    """Of a norm. With `rotated`, rotary positions are what reads its result; on a GPU statistics are then made first:
    XLA does not join a rotation to a kernel that sums, and would store all of it in float32 in between."""
    return jax.lax.optimization_barrier(values) if rotated and target().platform == "gpu" else values


def layer_norm(x: Float[Array, "... D"], eps: float = 1e-6, *, rotated: bool = False) -> Float[Array, "... D"]:
    """Layer norm without affine part, statistics and result in float32. `rotated`: rotary positions follow."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
    mean, inverse = _statistics((mean, inverse), rotated)
    return (x - mean) * inverse


def modulate(x: Float[Array, "B N D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]) -> Float[Array, "B N D"]:
    """Adaptive layer norm, norm(x) (1 + scale) + shift, in float32, returned in x's dtype."""
    return (layer_norm(x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def spread(rows: Float[Array, "B M D"], n: int) -> Float[Array, "B N D"]:
    """Modulation of n tokens: each of the M rows serves n/M consecutive ones. One row stays one and broadcasts.

    Raises:
        ValueError: n is no multiple of M.
    """
    m = rows.shape[1]
    if n % m:
        raise ValueError(f"{m} rows of modulation for {n} tokens: the rows must be 1 or divide the tokens")
    return rows if m == 1 else jnp.repeat(rows, n // m, axis=1)


def modulate_rows(
    x: Float[Array, "B N D"], shift: Float[Array, "B M D"], scale: Float[Array, "B M D"], eps: float = 1e-6
) -> Float[Array, "B N D"]:
    """`modulate` with M rows a sample (`spread`), where time differs between tokens."""
    shift, scale = (spread(a, x.shape[1]) for a in (shift, scale))
    return (layer_norm(x, eps) * (1 + scale) + shift).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Affine layer norm, statistics in float32. `rotated`: rotary positions follow."""

    def __init__(self, d: int, *, eps: float, dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(d, dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(d, dtype), axes=(None,))

    def __call__(self, x: Float[Array, "... D"], *, rotated: bool = False) -> Float[Array, "... D"]:
        return (layer_norm(x, self.eps, rotated=rotated) * self.scale + self.bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, statistics in float32 (arXiv 1910.07467). `rotated`: rotary positions
    follow."""

    def __init__(self, d: int, *, eps: float, dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(d, dtype), axes=(None,))

    def __call__(self, x: Float[Array, "... D"], *, rotated: bool = False) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        inverse = _statistics(jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps), rotated)
        return (x32 * inverse * self.scale).astype(x.dtype)


class Mlp(nnx.Module):
    """Dense, activation, dense. `act` maps an array to one of the same shape; `d_out` None is the input's width."""

    def __init__(self, d: int, f: int, act: Callable, *, d_out: int | None = None, dtype, rngs: nnx.Rngs):
        self.act = act
        self.up = linear(d, f, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(f, d_out or d, ("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        kernel, bias = self.up.kernel.get_value(), self.up.bias
        if self.act is gelu_tanh and bias is not None and _gelu_pays_in_product(x, kernel):
            return self.down(_product_with_gelu(x.astype(kernel.dtype), kernel, bias.get_value()))
        return self.down(self.act(self.up(x)))


class GatedMlp(nnx.Module):
    """act(x A) * (x B) C (arXiv 2002.05202): `act` silu is SwiGLU."""

    def __init__(self, d: int, f: int, act: Callable, *, dtype, rngs: nnx.Rngs, bias: bool = False):
        self.act = act
        self.up = fused_linear(d, 2, f, ("embed", "mlp"), dtype=dtype, rngs=rngs, bias=bias)
        self.down = linear(f, d, ("mlp", "embed"), dtype=dtype, rngs=rngs, bias=bias)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        up = self.up(x)
        return self.down(self.act(up[..., 0, :]) * up[..., 1, :])


class TimeMlp(nnx.Module):
    """Dense, SiLU, dense to the model's width: timestep features and pooled text."""

    def __init__(self, d_in: int, d: int, *, dtype, rngs: nnx.Rngs):
        self.up = linear(d_in, d, (None, "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(d, d, ("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(silu(self.up(x)))


def dense32(layer: nnx.LinearGeneral, x: Float[Array, "... D"]) -> Float[Array, "... n E"]:
    """A `fused_linear` whose sums and result are float32 (modulation), whatever the layer's dtype."""
    kernel = layer.kernel.get_value()
    out = jnp.einsum("...d,dne->...ne", x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
    return out if layer.bias is None else out + layer.bias.get_value().astype(jnp.float32)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh form (arXiv 1606.08415). In float32 inside: its steps rounded to bfloat16 cost accuracy."""
    return nnx.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_pays_in_product(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> bool:
    """Whether a product is to make `gelu_tanh` of its result itself, as cuBLASLt's do on a GPU. It saves a pass over
    the result, and costs one over a scanned layer's weights, which XLA copies for it (`product`): so of more rows on a
    device than the input is wide."""
    sizes = jax.sharding.get_abstract_mesh().shape
    rows = x.size // x.shape[-1] // math.prod(n for axis, n in sizes.items() if axis != "tensor")
    return target().platform == "gpu" and kernel.dtype in (jnp.bfloat16, jnp.float16) and rows > kernel.shape[0]


@jax.custom_vjp
def _product_with_gelu(
    x: Float[Array, "... D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"]
) -> Float[Array, "... F"]:
    """`gelu_tanh` of a dense layer, in a form by which XLA knows it: all in the dtype of the product, whose own GELU is
    in float32 (epilogue BIAS_GELU). Its gradients are those of the form that is not in the product."""
    return nnx.gelu(x @ kernel + bias, approximate=True)


def _product_then_gelu(x, kernel, bias):
    return gelu_tanh(product(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias)


_product_with_gelu.defvjp(lambda *given: jax.vjp(_product_then_gelu, *given), lambda vjp, g: vjp(g))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by the error function, in float32 inside."""
    return nnx.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(x), in float32 inside."""
    return nnx.silu(x.astype(jnp.float32)).astype(x.dtype)


def timestep_embedding(
    t: Float[Array, "*S"], dim: int, max_period: float = 10000.0, *, scale: Float[Array, ""] | float = 1.0
) -> Float[Array, "*S dim"]:
    """Sinusoidal features [cos, sin] of timesteps (arXiv 1706.03762; the order that SD3 and its kin use), float32.

    An odd `dim` ends in a zero. `scale` is of the angles, for models that are told t / scale.
    """
    # host constants, rounded as torch rounds them: at t = 1000 one ulp of a frequency moves the cosine by 1e-4
    exponents = np.float32(-np.log(max_period)) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2)
    angles = scale * (t.astype(jnp.float32)[..., None] * np.exp(exponents.astype(np.float64)).astype(np.float32))
    odd = [jnp.zeros_like(angles[..., :1])] * (dim % 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), *odd], -1)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
    """`depth` equal modules as one module whose leaves have a leading layer axis."""
    return jax.vmap(make)(rngs.split(depth))


def groups(tree, size: int):
    """Stacked layers, or what each of them is given, in groups: leaves (L, ...) become (L / size, size, ...)."""
    return jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), tree)


def scan_blocks(blocks, carry, xs=None, *, call: Callable | None = None, unroll: bool = False):
    """Run a stacked module: carry <- block_i(carry, xs_i), for each layer i.

    The only place that knows how stacked layers are run; compile time does not grow with depth unless `unroll`.

    Args:
        blocks: a module built by `stack`, or a pytree of such, or of `groups`.
        carry: pytree passed from layer to layer.
        xs: pytree of per-layer inputs with a leading layer axis, or None.
        call: (block, carry, x) -> carry; the default calls block(carry) or block(carry, x).
    """
    call = call or (lambda block, c, x: block(c) if x is None else block(c, x))
    return jax.lax.scan(lambda c, bx: (call(bx[0], c, bx[1]), None), carry, (blocks, xs), unroll=unroll or 1)[0]
