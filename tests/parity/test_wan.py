"""Wan's transformer and its conversion against diffusers' WanTransformer3DModel."""

import jax
import pytest
import util_wan
from util_sd3 import error

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=util_wan.KINDS, ids=util_wan.KINDS.keys())
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    model = util_wan.saved(folder, **util_wan.KINDS[request.param])
    return model, util_wan.ported(folder), folder


call = jax.jit(lambda module, *args: module(*args))


def test_velocity(both):
    model, module, _ = both
    given = util_wan.inputs(model.config)
    assert error(call(module, *util_wan.ours(module, given)), util_wan.theirs(model, given)) < 1e-5
