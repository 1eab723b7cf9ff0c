"""jdit: diffusion transformers for images and video in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jdit.distributed import initialize
    from jdit.load import load
    from jdit.media import contact_sheet
    from jdit.pipeline.base import Pipeline
    from jdit.sharding import Rules, make_mesh
    from jdit.structs import Output, Plan, Prompt

_HOME = {
    "initialize": "jdit.distributed", "load": "jdit.load", "contact_sheet": "jdit.media",
    "Pipeline": "jdit.pipeline.base", "Rules": "jdit.sharding", "make_mesh": "jdit.sharding", "Output": "jdit.structs",
    "Plan": "jdit.structs", "Prompt": "jdit.structs",
}  # fmt: skip

__all__ = ["Output", "Pipeline", "Plan", "Prompt", "Rules", "contact_sheet", "initialize", "load", "make_mesh"]


def __getattr__(name: str):
    # public names are imported when first used: convert imports jdit's modules, and jdit.load imports convert
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jdit-flax")
    if name not in _HOME:
        raise AttributeError(f"module 'jdit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # `jdit.load` is also a module: the function wins
    return value
