"""What conversion needs to know about one kind of component: the record that the registry holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from convert.table import Rule
from jdit.sharding import Make, Path, Rules, abstract


class Component(NamedTuple):
    """One upstream class and its counterpart here.

    Attributes:
        upstream_class: `_class_name` (diffusers) or architecture (transformers).
        module: our class, an nnx.Module built as module(cfg, rngs=...).
        config: upstream config.json -> our config.
        upstream_config: our config -> upstream config.json.
        rules: our config -> the family's table.
        library: upstream's package that has the class.
    """

    upstream_class: str
    module: type[Any]
    config: Callable[[dict], Any]
    upstream_config: Callable[[Any], dict]
    rules: Callable[[Any], list[Rule]]
    library: str = "diffusers"

    def make(self, cfg: Any) -> Callable[[], nnx.Module]:
        """A constructor for `sharding.abstract` and `assemble`."""
        return Make(self.module, cfg)

    def targets(
        self, cfg: Any, mesh: Mesh | None = None, rules: Rules | None = None
    ) -> dict[Path, jax.ShapeDtypeStruct]:
        """The leaves to be filled, with their shardings if a mesh is given."""
        return abstract(self.make(cfg), mesh, rules)[1]
