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
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

log = logging.getLogger("jdit")

MESH_AXES = ("data", "sequence", "tensor")
EXCHANGES = ("auto", "ulysses", "ring", "ulysses_ring", "gather")
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
    "ulysses_ring", "gather", or "auto", which chooses (`jdit.nn.context_parallel`).

    A dimension need not divide. Tokens (seq) are spread nevertheless where there are at least as many as devices, the
    last devices having fewer or none. Every other dimension of an activation or a parameter then stays whole on the
    mesh axis that it does not divide by, as pixel rows do where a device would have less than two (`LEAST_ROWS`); which
    is logged once.

    Presets, which `Rules.named` and the command line know by name: `tensor` (as it stands), `replicated`, `fsdp`.
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

    @classmethod
    def tensor(cls) -> "Rules":
        """Weights spread over the tensor axis, by heads and the width of the MLPs: the default."""
        return cls()

    @classmethod
    def replicated(cls) -> "Rules":
        """All weights on every device."""
        return cls(heads=None, mlp=None)

    @classmethod
    def fsdp(cls) -> "Rules":
        """As `tensor`, and by the model's width over data and sequence: weights are gathered a layer at a time."""
        return cls(embed=("data", "sequence"))

    @classmethod
    def named(cls, name: str) -> "Rules":
        """A preset.

        Raises:
            ValueError: no such name.
        """
        if name not in PRESETS:
            raise ValueError(f"rules={name!r}; there are {', '.join(PRESETS)}")
        return getattr(cls, name)()

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


PRESETS = ("replicated", "fsdp", "tensor")


def mesh_sizes(text: str) -> dict[str, int]:
    """The axes of a mesh written as "data=2,sequence=4".

    Raises:
        ValueError: an axis that is not known or is named twice, or no whole number of at least 1.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = (part.strip() for part in item.partition("="))
        if name not in MESH_AXES:
            raise ValueError(f"{item!r}: no axis {name!r}; there are {', '.join(MESH_AXES)}, as data=2,sequence=4")
        if name in sizes:
            raise ValueError(f"{item!r}: {name} is there twice")
        if not (size.isascii() and size.isdigit() and int(size)):
            raise ValueError(f"{item!r}: {name} must be a whole number of devices, 1 or more")
        sizes[name] = int(size)
    return sizes


def make_mesh(*, data: int = 1, sequence: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over data*sequence*tensor devices: the first ones, of several processes as many of each.

    Raises:
        ValueError: fewer devices than that, or processes that would have unequal shares.
    """
    sizes = (data, sequence, tensor)
    need, have, processes = math.prod(sizes), jax.device_count(), jax.process_count()
    what = f"mesh data={data}, sequence={sequence}, tensor={tensor} needs {need} devices"
    if min(sizes) < 1 or need > have:
        raise ValueError(f"{what}; there are {have}")
    if need % processes:
        raise ValueError(f"{what}, which are not as many of each of the {processes} processes")
    # Auto axis types: jax.make_mesh's own default is Explicit
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=_first(need // processes))


def _first(each: int) -> list[Any]:
    """So many devices of each process, one process after another: those of a host stay together on the inner axes."""
    return [d for p in range(jax.process_count()) for d in [d for d in jax.devices() if d.process_index == p][:each]]


def planned_mesh(*, data: int = 1, sequence: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of devices that need not be there, to plan with: `abstract` and memory plans take it."""
    return AbstractMesh((data, sequence, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


AnyMesh = Mesh | AbstractMesh


LEAST_ROWS = 2
"""Rows of an activation on a device. With one row each, and a second mesh axis beside it, XLA's partitioner gets a
convolution whose edge rows are repeated wrong (jax 0.10.2 on CPUs: errors of the size of the result)."""


def _ways(axes: tuple[str, ...], sizes: dict[str, int]) -> int:
    return math.prod(sizes.get(a, 1) for a in axes)


@functools.lru_cache(maxsize=256)
def _log_whole(name: str | None, size: int, axis: str, ways: int):
    why = "does not divide by" if size % ways else "is too little for"
    log.info("sharding: %s of %d %s mesh axis %s=%d and stays whole on it", name, size, why, axis, ways)


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
        least = LEAST_ROWS if name == "rows" else 1
        kept: tuple[str, ...] = ()
        for a in axes:
            ways = _ways((*kept, a), sizes)
            if anyway or (dim % ways == 0 and (ways == 1 or dim >= least * ways)):
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


def whole_rows(x: jax.Array) -> jax.Array:
    """Constrain an array to have all rows of its first axis on every device, the other axes as they are; outside
    `jax.set_mesh` it is the identity."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(None, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def param_sharding(var: nnx.Variable, shape: tuple[int, ...], mesh: AnyMesh, rules: Rules) -> NamedSharding:
    axes = var.get_metadata().get("axes", ())
    return NamedSharding(mesh, _fit(rules, axes, shape, dict(mesh.shape), ()))


def abstract(make: Callable[[], nnx.Module], mesh: AnyMesh | None = None, rules: Rules | None = None):
    """Describe a module without allocating it.

    Returns:
        (graphdef, {path: ShapeDtypeStruct}); with a mesh each leaf carries its NamedSharding. This one tree gives
        shapes, shardings, the restore target, the converter's targets and the parameter count.
    """
    module = described(make)
    return nnx.graphdef(module), placed(module, mesh, rules)


@dataclasses.dataclass(frozen=True)
class Make:
    """The constructor of a config's module, as data: what is equal is described once."""

    module: type[Any]
    cfg: Any

    def __call__(self) -> nnx.Module:
        return self.module(self.cfg, rngs=nnx.Rngs(0))


def described(make: Callable[[], nnx.Module]) -> nnx.Module:
    """The abstract module; of a `Make` it is kept, as it takes a second for an autoencoder. Not to be changed."""
    return _described(make) if isinstance(make, Make) else nnx.eval_shape(make)


_described = functools.cache(nnx.eval_shape)


def placed(
    module: nnx.Module, mesh: AnyMesh | None = None, rules: Rules | None = None
) -> dict[Path, jax.ShapeDtypeStruct]:
    """The leaves of `abstract`, of an abstract module."""
    state, leaves = nnx.state(module), {}
    for path, var in nnx.to_flat_state(state):
        sharding = param_sharding(var, var.shape, mesh, rules or Rules()) if mesh is not None else None
        leaves[path] = jax.ShapeDtypeStruct(var.shape, var.dtype, sharding=sharding)
    return leaves


def assemble(
    make: Callable[[], nnx.Module], leaves: dict[Path, jax.Array], only: Collection[Path] | None = None
) -> nnx.Module:
    """The module that `make` describes, holding `leaves` (every path of `abstract(make)`, no other); of a part of a
    module `only` those paths, and nothing in the others (see `jdit.nn.parts`)."""
    graphdef, state = nnx.split(described(make))
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
    module = module_or_make if isinstance(module_or_make, nnx.Module) else described(module_or_make)
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


def whole(tree: Any) -> Any:
    """The same values, with arrays of which devices of other processes hold parts put on every device: NumPy can then
    read them. All processes must call it."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        everywhere = NamedSharding(cast(NamedSharding, x.sharding).mesh, P())
        return _copy_to(everywhere)(x)

    return jax.tree.map(one, tree)


@functools.cache
def _copy_to(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=where)


def box(leaf: jax.ShapeDtypeStruct) -> tuple[slice, ...]:
    """The part of a leaf of `abstract` that the devices of this process hold, as one block."""
    placed: Any = getattr(leaf, "sharding", None)
    if placed is None:
        return tuple(slice(0, n) for n in leaf.shape)
    held = [i for i in placed.addressable_devices_indices_map(leaf.shape).values()]
    spans = [[s[axis].indices(n) for s in held] for axis, n in enumerate(leaf.shape)]
    return tuple(slice(min(s[0] for s in span), max(s[1] for s in span)) for span in spans)


def of_box(leaf: jax.ShapeDtypeStruct, host: np.ndarray) -> jax.Array:
    """A leaf on its devices (the first of this process, where it has no sharding), of its `box` on the host."""
    placed: Any = getattr(leaf, "sharding", None)
    held, placed = box(leaf), placed or SingleDeviceSharding(jax.local_devices()[0])
    shifted = lambda i, h: slice((i.start or 0) - h.start, (h.stop if i.stop is None else i.stop) - h.start)
    pick = lambda index: host[tuple(map(shifted, index or (), held))]
    return jax.make_array_from_callback(leaf.shape, placed, pick)


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
