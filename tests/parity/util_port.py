"""A folder that upstream saved to a module of ours, through the real converter."""

import json
from pathlib import Path

from convert import registry, stream
from convert.readers import open_folder
from jdit import sharding
from jdit.sharding import Rules


def ported(folder: Path, dtype: str = "float32", mesh=None, rules: Rules = Rules()):
    config = json.loads((folder / "config.json").read_text())
    component = registry.COMPONENTS[config["_class_name"]]
    cfg = registry.placed(component.config(config), dtype, rules)
    with open_folder(folder) as reader:
        leaves = stream.load_leaves(reader, component.rules(cfg), component.targets(cfg, mesh, rules))
    return sharding.assemble(component.make(cfg), leaves)
