"""Named, invertible array operations between PyTorch and jdit layouts (NumPy views where possible).

Letters: O out, I in, n fused parts. Every op acts on one tensor of one layer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Op(NamedTuple):
    """forward: PyTorch -> jdit; inverse: back. The name is what error messages and tables show."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


same = Op("same", lambda w: w, lambda w: w)
linear = Op("linear", lambda w: w.T, lambda w: w.T)  # O I <-> I O
conv = Op("conv", lambda w: np.moveaxis(w, (0, 1), (-1, -2)), lambda w: np.moveaxis(w, (-1, -2), (0, 1)))
pointwise = Op("pointwise", lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # O I 1 1 <-> I O
pointwise_3d = Op(
    "pointwise_3d", lambda w: w[:, :, 0, 0, 0].T, lambda w: w.T[:, :, None, None, None]
)  # O I 1 1 1 <-> I O
causal_conv = Op("causal_conv", lambda w: w.transpose(3, 4, 2, 1, 0), lambda w: w.transpose(4, 3, 2, 0, 1))
"""O I t h w <-> h w t I O."""


def fused_linear(n: int) -> Op:
    """One PyTorch matrix of n stacked parts: (n O) I <-> I n O."""
    return Op(
        f"fused_linear({n})",
        lambda w: w.reshape(n, -1, w.shape[1]).transpose(2, 0, 1),
        lambda w: w.reshape(w.shape[0], -1).T,
    )


def fused_bias(n: int) -> Op:
    """(n O) <-> n O."""
    return Op(f"fused_bias({n})", lambda b: b.reshape(n, -1), lambda b: b.reshape(-1))


def fused_linear_in(order: Sequence[int]) -> Op:
    """`fused_linear` whose parts are PyTorch's in this order."""
    plain, back = fused_linear(len(order)), np.argsort(order)
    name = f"fused_linear_in{tuple(order)}"
    return Op(name, lambda w: plain.forward(w)[:, order], lambda w: plain.inverse(w[:, back]))


def fused_bias_in(order: Sequence[int]) -> Op:
    plain, back = fused_bias(len(order)), np.argsort(order)
    name = f"fused_bias_in{tuple(order)}"
    return Op(name, lambda b: plain.forward(b)[list(order)], lambda b: plain.inverse(b[back]))


def fused_linear_reversed(n: int) -> Op:
    """`fused_linear` with the parts in the opposite order: (scale, shift) <-> (shift, scale)."""
    plain = fused_linear(n)
    return Op(f"fused_linear_reversed({n})", lambda w: plain.forward(w)[:, ::-1], lambda w: plain.inverse(w[:, ::-1]))


def fused_bias_reversed(n: int) -> Op:
    plain = fused_bias(n)
    return Op(f"fused_bias_reversed({n})", lambda b: plain.forward(b)[::-1], lambda b: plain.inverse(b[::-1]))


def joined_linear(n: int) -> Op:
    """One PyTorch matrix on n concatenated inputs: O (n I) <-> n I O."""
    return Op(
        f"joined_linear({n})",
        lambda w: w.T.reshape(n, -1, w.shape[0]),
        lambda w: w.reshape(-1, w.shape[-1]).T,
    )


def patch_conv(p: int, channels: int) -> Op:
    """A p x p convolution of stride p as a dense layer on patches: O C p p <-> (p p C) O."""
    return Op(
        f"patch_conv({p})",
        lambda w: w.reshape(w.shape[0], channels, p, p).transpose(2, 3, 1, 0).reshape(p * p * channels, -1),
        lambda w: w.reshape(p, p, channels, -1).transpose(3, 2, 0, 1),
    )


def patch_conv3d(patch: tuple[int, int, int], channels: int) -> Op:
    """`patch_conv` over frames, rows and columns: O C p q r <-> (p q r C) O."""
    p, q, r = patch
    return Op(
        f"patch_conv3d{patch}",
        lambda w: w.reshape(w.shape[0], channels, p, q, r).transpose(2, 3, 4, 1, 0).reshape(p * q * r * channels, -1),
        lambda w: w.reshape(p, q, r, channels, -1).transpose(4, 3, 0, 1, 2),
    )


def patch_linear(patch: tuple[int, int, int], channels: int) -> Op:
    """A dense layer on patches whose channels come first: O (C p q r) <-> (p q r C) O."""
    bias = patch_bias(patch, channels)
    return Op(f"patch_linear{patch}", lambda w: bias.forward(w.T), lambda w: bias.inverse(w).T)


def patch_linear_out(patch: tuple[int, int, int], channels: int) -> Op:
    """A dense layer to patches whose channels come first: (C p q r) I <-> I (p q r C)."""
    bias = patch_bias(patch, channels)
    return Op(f"patch_linear_out{patch}", lambda w: bias.forward(w).T, lambda w: bias.inverse(w.T))


def patch_bias(patch: tuple[int, int, int], channels: int) -> Op:
    """The first axis of `patch_linear_out`: (C p q r) <-> (p q r C)."""
    return Op(
        f"patch_bias{patch}",
        lambda b: np.moveaxis(b.reshape(channels, *patch, *b.shape[1:]), 0, 3).reshape(-1, *b.shape[1:]),
        lambda b: np.moveaxis(b.reshape(*patch, channels, *b.shape[1:]), 3, 0).reshape(-1, *b.shape[1:]),
    )


def reshape(to: tuple[int, ...], back: tuple[int, ...]) -> Op:
    """Fixed reshapes, -1 allowed once on each side."""
    return Op(f"reshape{to}", lambda w: w.reshape(to), lambda w: w.reshape(back))
