"""Wan's own encoder classes, with the parameter names of the original releases, as diffsynth-engine carries them.

Its package does not import without many others; each file here does, with the few names that it takes from there.
"""

import contextlib
import importlib.util
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.find_spec("diffsynth_engine")
needs_original = pytest.mark.skipif(SPEC is None, reason="Wan's own classes come with diffsynth-engine, not installed")


def _attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


STANDINS = {
    "diffsynth_engine.models.base": {"StateDictConverter": object, "PreTrainedModel": torch.nn.Module},
    "diffsynth_engine.models.basic.attention": {"attention": _attention},
    "diffsynth_engine.utils": {"logging": types.SimpleNamespace(get_logger=logging.getLogger)},
    "diffsynth_engine.utils.gguf": {"gguf_inference": contextlib.nullcontext},
    "torchvision": {"__path__": []},
    "torchvision.transforms": {},
}


def original(name: str) -> types.ModuleType:
    """models/wan/{name}.py of diffsynth-engine."""
    assert SPEC is not None and SPEC.submodule_search_locations
    package = Path(SPEC.submodule_search_locations[0])
    file = package / "models" / "wan" / f"{name}.py"
    keymap = package / "conf" / "models" / "wan" / "vae" / "wan_vae_keymap.json"
    constants = dict.fromkeys(("WAN2_1_VAE_CONFIG_FILE", "WAN2_2_VAE_CONFIG_FILE", "WAN_VAE_KEYMAP_FILE"), keymap)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    packages = ("diffsynth_engine", "diffsynth_engine.models", "diffsynth_engine.models.basic")
    with pytest.MonkeyPatch.context() as patch:
        standins = {**STANDINS, "diffsynth_engine.utils.constants": constants}
        for key, names in {**{p: {"__path__": []} for p in packages}, **standins}.items():
            standin = types.ModuleType(key)
            standin.__dict__.update(names)
            patch.setitem(sys.modules, key, standin)
        spec.loader.exec_module(module)
    return module
