"""Meshes, logical axes and abstract parameters: the only file that knows NamedSharding.

Parameters carry logical axis names under the metadata key `axes`, right-aligned, so that a stacked array
(a leading layer axis) needs nothing more. A frozen `Rules` object maps names to mesh axes; it sits in the static
module config and is therefore part of every jit key.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from flax import nnx
from flax.typing import PathParts
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

log = logging.getLogger("jdit")

MESH_AXES = ("data", "sequence", "tensor")
EXCHANGES = ("auto", "ulysses", "ring", "ulysses_ring")
MeshAxis = str | tuple[str, ...] | None
Path = PathParts


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis name -> mesh axis (or axes). `None` replicates.

    batch, seq, rows, width: activations (rows: the pixel rows of an autoencoder). embed, heads, mlp, vocab: parameters
    and the activations that they make; embed is the model width of parameters alone, so that weights may be spread over
    the axes that activations have their batch on (FSDP). attn: the heads of an attention call on whole sequences (text
    encoders).

    exchange is no axis: how attention among tokens that are spread over `seq` comes by all of them, "ulysses", "ring",
    "ulysses_ring", or "auto", which chooses (`jdit.nn.context_parallel`).

    A dimension need not divide. Tokens (seq) are spread nevertheless where there are at least as many as devices, the
    last devices having fewer or none. Every other dimension of an activation or a parameter then stays whole on the
    mesh axis that it does not divide by, which is logged once.
    """

    batch: MeshAxis = "data"
    seq: MeshAxis = "sequence"
    rows: MeshAxis = "sequence"
    width: MeshAxis = None
    embed: MeshAxis = None
    heads: MeshAxis = "tensor"
    mlp: MeshAxis = "tensor"
    vocab: MeshAxis = None
    attn: MeshAxis = ("tensor", "sequence")
    exchange: str = "auto"

    def __post_init__(self):
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange={self.exchange!r}; there are {', '.join(EXCHANGES)}")

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes of a logical axis.

        Raises:
            ValueError: a name that is no logical axis.
        """
        names = [f.name for f in dataclasses.fields(self) if f.name != "exchange"]
        if name not in names:
            raise ValueError(f"{name!r} is not a logical axis; there are {names}")
        target = getattr(self, name)
        return (target,) if isinstance(target, str) else tuple(target or ())

    def ways(self, name: str) -> int:
        """Over how many devices of the mesh that is set a logical axis is spread; 1 where none is."""
        return _ways(self.axes(name), dict(jax.sharding.get_abstract_mesh().shape))

    def spec(self, axes: tuple[str | None, ...], ndim: int | None = None) -> P:
        """PartitionSpec of right-aligned logical axes.

        Raises:
            ValueError: a name that is no rule, or two names that land on one mesh axis.
        """
        entries: list[MeshAxis] = [None] * (0 if ndim is None else ndim - len(axes))
        used: dict[str, str] = {}
        for name in axes:
            if name is None:
                entries.append(None)
                continue
            for mesh_axis in self.axes(name):
                if mesh_axis in used:
                    raise ValueError(
                        f"logical axes {used[mesh_axis]!r} and {name!r} are both on mesh axis {mesh_axis!r}"
                    )
                used[mesh_axis] = name
            entries.append(getattr(self, name))
        return P(*entries)


def make_mesh(*, data: int = 1, sequence: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data*sequence*tensor devices. Auto axis types: Explicit is jax.make_mesh's default."""
    sizes = (data, sequence, tensor)
    need, have = data * sequence * tensor, jax.device_count()
    if min(sizes) < 1 or need > have:
        raise ValueError(
            f"mesh data={data}, sequence={sequence}, tensor={tensor} needs {need} devices; there are {have}"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:need])


def _ways(axes: tuple[str, ...], sizes: dict[str, int]) -> int:
    return math.prod(sizes.get(a, 1) for a in axes)


@functools.lru_cache(maxsize=256)
def _log_whole(name: str | None, size: int, axis: str, ways: int):
    log.info("sharding: %s of %d does not divide by mesh axis %s=%d and stays whole on it", name, size, axis, ways)


def _fit(
    rules: Rules, names: tuple[str | None, ...], shape: tuple[int, ...], sizes: dict[str, int], uneven: Collection[str]
) -> P:
    """PartitionSpec of right-aligned logical axes as `Rules` describes it for dimensions that do not divide.

    Args:
        sizes: of the mesh axes. uneven: logical axes that are spread although they do not divide.
    """
    spec = rules.spec(names, len(shape))
    out = []
    for dim, entry, name in zip(shape, spec, (None,) * (len(shape) - len(names)) + names):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        anyway = name in uneven and dim >= _ways(axes, sizes)
        kept: tuple[str, ...] = ()
        for a in axes:
            if anyway or dim % _ways((*kept, a), sizes) == 0:
                kept = *kept, a
            else:
                _log_whole(name, dim, a, sizes[a])
        out.append(None if not kept else kept[0] if len(kept) == 1 else kept)
    return P(*out)


def shard(x: jax.Array, *axes: str | None, rules: Rules) -> jax.Array:
    """Constrain an activation to its logical axes; outside `jax.set_mesh` it is the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    uneven = ("seq",) if isinstance(x, Tracer) else ()  # arrays of unequal slices exist inside programs alone
    return jax.lax.with_sharding_constraint(x, _fit(rules, axes, x.shape, dict(mesh.shape), uneven))


def param_sharding(var: nnx.Variable, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> NamedSharding:
    axes = var.get_metadata().get("axes", ())
    return NamedSharding(mesh, _fit(rules, axes, shape, dict(mesh.shape), ()))


def abstract(make: Callable[[], nnx.Module], mesh: Mesh | None = None, rules: Rules | None = None):
    """Describe a module without allocating it.

    Returns:
        (graphdef, {path: ShapeDtypeStruct}); with a mesh each leaf carries its NamedSharding. This one tree gives
        shapes, shardings, the restore target, the converter's targets and the parameter count.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    leaves: dict[Path, jax.ShapeDtypeStruct] = {}
    for path, var in nnx.to_flat_state(state):
        sharding = param_sharding(var, var.shape, mesh, rules or Rules()) if mesh is not None else None
        leaves[path] = jax.ShapeDtypeStruct(var.shape, var.dtype, sharding=sharding)
    return graphdef, leaves


def assemble(
    make: Callable[[], nnx.Module], leaves: dict[Path, jax.Array], only: Collection[Path] | None = None
) -> nnx.Module:
    """The module that `make` describes, holding `leaves` (every path of `abstract(make)`, no other); of a part of a
    module `only` those paths, and nothing in the others (see `jdit.nn.parts`)."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = list(nnx.to_flat_state(state))
    wanted = {p for p, _ in flat if only is None or p in only}
    missing, extra = wanted - set(leaves), set(leaves) - wanted
    if missing or extra:
        raise ValueError(f"parameters missing {sorted(map(dotted, missing))}, unknown {sorted(map(dotted, extra))}")
    return nnx.merge(graphdef, nnx.from_flat_state([(p, var.replace(leaves.get(p))) for p, var in flat]))


def leaves(module: nnx.Module) -> dict[Path, jax.Array]:
    """{path: array} of a module."""
    return {path: var.get_value() for path, var in nnx.to_flat_state(nnx.state(module))}


def count(module_or_make: nnx.Module | Callable[[], nnx.Module]) -> int:
    """Number of parameters, fixed tables (metadata `fixed=True`, buffers upstream) left out."""
    module = module_or_make if isinstance(module_or_make, nnx.Module) else nnx.eval_shape(module_or_make)
    total = 0
    for _, var in nnx.to_flat_state(nnx.state(module)):
        if not var.get_metadata().get("fixed"):
            n = 1
            for d in var.shape:
                n *= d
            total += n
    return total


def bytes_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a leaf of `abstract` on each device."""
    placed: Any = getattr(leaf, "sharding", None)
    return math.prod(leaf.shape if placed is None else placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def tree_bytes(tree) -> int:
    def sizes() -> Iterator[int]:
        for leaf in jax.tree.leaves(tree):
            n = leaf.dtype.itemsize
            for d in leaf.shape:
                n *= d
            yield n

    return sum(sizes())
