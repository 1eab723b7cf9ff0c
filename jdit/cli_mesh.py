"""What commands say of devices: meshes, rules, other processes; and the plan that `jdit inspect --mesh` prints."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import click

from jdit import distributed
from jdit.terminal import import_jax

log = logging.getLogger("jdit")

AUTO = "auto"
RULES = ("replicated", "fsdp", "tensor")
EXCHANGES = (AUTO, "ulysses", "ring", "ulysses_ring", "gather")
"""Presets and exchanges of `jdit.Rules`, which cannot be asked here: that would import jax for `--help`."""


class Mesh(click.ParamType):
    """Axes and their sizes, as data=2,sequence=4, or a word that stands for a choice."""

    name = "AXIS=N,..."

    def __init__(self, *words: str):
        self.words = words

    def convert(self, value: Any, param, ctx) -> dict[str, int] | str:
        if isinstance(value, dict) or value in self.words:
            return value
        import_jax()
        from jdit.sharding import mesh_sizes

        try:
            return mesh_sizes(value)
        except ValueError as e:
            return self.fail(str(e) + "".join(f"; or {word}" for word in self.words), param, ctx)


rules_option = click.option("--rules", type=click.Choice(RULES), help="Where weights go on --mesh.  [default: tensor]")


def mesh_options(command: Callable) -> Callable:
    """--mesh, --rules and --exchange of a command that runs a model, and what finds its other processes."""
    exchange = f"How attention comes by tokens of other devices of --mesh.  [default: {AUTO}]"
    count = "How many processes run this command together; auto: jax finds them.  [default: the launcher's word]"
    for option in (
        click.option("--process-id", type=int, help="Which of them this is, from 0.  [default: the launcher's word]"),
        click.option("--processes", metavar="N", help=count),
        click.option("--coordinator", metavar="HOST:PORT", help="Where the first of several processes listens."),
        click.option("--exchange", type=click.Choice(EXCHANGES), help=exchange),
        rules_option,
        click.option("--mesh", type=Mesh(), help="Devices to use together, as data=2,sequence=4.  [default: one]"),
    ):
        command = option(command)
    return command


def join(mesh: dict[str, int] | None, rules: str | None, exchange: str | None, **processes: Any):
    """Join the other processes of a command, if --mesh is there and somebody says that there are others.

    Raises:
        click.UsageError: options that need --mesh.
    """
    if mesh is not None:
        import_jax()
        distributed.initialize(**processes)
        return
    said = {"rules": rules, "exchange": exchange} | processes
    given = {f"--{name.replace('_', '-')}": value for name, value in said.items()}
    if alone := [name for name, value in given.items() if value is not None]:
        raise click.UsageError(f"{', '.join(alone)}: goes with --mesh, as --mesh data=2,sequence=4")


def make(mesh: dict[str, int] | None):
    """The mesh of a run; None, of one device, is said where there are more.

    Raises:
        ValueError: more devices than there are.
    """
    import jax

    from jdit.sharding import make_mesh

    if mesh is not None:
        return make_mesh(**mesh)
    if (count := jax.local_device_count()) > 1:
        log.info("one of %d devices is used; --mesh spreads over more (jdit inspect --mesh auto proposes one)", count)
    return None


def rules_of(name: str | None, exchange: str | None) -> Any:
    """What --rules and --exchange say, as `rules` of `jdit.load`."""
    from jdit.sharding import Rules

    return name if exchange is None else dataclasses.replace(Rules.named(name or "tensor"), exchange=exchange)


def planned(
    opened: Any, mesh: dict[str, int] | str | None, rules: str | None, devices: int | None, room: float | None,
    memory: float | None,
) -> dict[str, Any]:  # fmt: skip
    """What `jdit inspect` says of memory, and of a mesh if one is asked for.

    Args:
        room, memory: bytes of a device, see `jdit.load.Opened.memory`.

    Raises:
        ValueError: options that do not go together; a mesh of more than `devices`.
    """
    import jax

    from jdit.sharding import planned_mesh

    if mesh is None:
        given = {"--rules": rules, "--devices": devices}
        if alone := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(alone)}: goes with --mesh, as --mesh auto")
        return {"memory": opened.memory(room=room, memory=memory).describe()}
    if mesh == AUTO:
        if rules is not None:
            raise ValueError(f"--rules {rules} goes with a mesh that is given: --mesh auto proposes its own")
        found = opened.propose(devices or jax.device_count(), room=room, memory=memory)
        return {"proposal": found.describe(), "memory": found.memory.describe()}
    assert isinstance(mesh, dict)
    on = planned_mesh(**mesh)
    if devices is not None and on.size > devices:
        raise ValueError(f"--mesh needs {on.size} devices, --devices says {devices}")
    described = {"mesh": ",".join(f"{axis}={n}" for axis, n in mesh.items()), "rules": rules or "tensor", "reasons": []}
    held = opened.memory(mesh=on, rules=described["rules"], room=room, memory=memory)
    return {"proposal": described, "memory": held.describe()}
