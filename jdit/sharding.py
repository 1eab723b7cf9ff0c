"""Meshes, logical axes and abstract parameters: the only file that knows NamedSharding.

Parameters carry logical axis names under the metadata key `axes`, right-aligned, so that a stacked array
(a leading layer axis) needs nothing more. A frozen `Rules` object maps names to mesh axes; it sits in the static
module config and is therefore part of every jit key.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from flax import nnx
from flax.typing import PathParts
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "sequence", "tensor")
MeshAxis = str | tuple[str, ...] | None
Path = PathParts


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis name -> mesh axis (or axes). `None` replicates.

    batch, seq, rows, width: activations (rows: the pixel rows of an autoencoder). embed, heads, mlp, vocab: parameters
    and the activations that they make; embed is the model width of parameters alone, so that weights may be spread over
    the axes that activations have their batch on (FSDP). attn: the heads of an attention call, where the sequence is
    whole again (Ulysses).
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
            if name not in {f.name for f in dataclasses.fields(self)}:
                raise ValueError(
                    f"{name!r} is not a logical axis; there are {[f.name for f in dataclasses.fields(self)]}"
                )
            target = getattr(self, name)
            for mesh_axis in (target,) if isinstance(target, str) else target or ():
                if mesh_axis in used:
                    raise ValueError(
                        f"logical axes {used[mesh_axis]!r} and {name!r} are both on mesh axis {mesh_axis!r}"
                    )
                used[mesh_axis] = name
            entries.append(target)
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


def _fit(spec: P, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """Drop mesh axes that a dimension does not divide by: such a dimension stays replicated."""
    out = []
    for dim, entry in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec))):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        kept: list[str] = []
        ways = 1
        for a in axes:
            if dim % (ways * sizes.get(a, 1)) == 0:
                kept.append(a)
                ways *= sizes.get(a, 1)
        out.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
    return P(*out)


def shard(x: jax.Array, *axes: str | None, rules: Rules) -> jax.Array:
    """Constrain an activation to its logical axes; outside `jax.set_mesh` it is the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fit(rules.spec(axes, x.ndim), x.shape, dict(mesh.shape)))


def param_sharding(var: nnx.Variable, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> NamedSharding:
    axes = var.get_metadata().get("axes", ())
    return NamedSharding(mesh, _fit(rules.spec(axes, len(shape)), shape, dict(mesh.shape)))


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
