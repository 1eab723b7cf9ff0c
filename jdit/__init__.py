"""jdit: diffusion transformers for images and video in JAX and Flax."""

from importlib.metadata import PackageNotFoundError, version

from jdit.load import load
from jdit.media import contact_sheet
from jdit.pipeline.base import Pipeline
from jdit.sharding import Rules, make_mesh
from jdit.structs import Output, Plan, Prompt

try:
    __version__ = version("jdit-flax")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"

__all__ = ["Output", "Pipeline", "Plan", "Prompt", "Rules", "contact_sheet", "load", "make_mesh"]
