"""What a program is compiled for, which need not be what is here; kernels are chosen by it while it is traced."""

from typing import NamedTuple

import jax

compiling_for = jax.make_user_context(None)
"""`with compiling_for(Target("tpu", "TPU v6 lite")):` says so for jax.export, which has no devices to tell it by. It is
part of every jit key. Devices of a mesh need none, those of a topology that is not here (jax.experimental.topologies)
included."""


class Target(NamedTuple):
    """A platform ("cpu", "gpu", "tpu") and, where it is known, the kind of chip as `jax.Device.device_kind` has it."""

    platform: str
    kind: str = ""


def target() -> Target:
    """The target of `compiling_for`, or the devices of the mesh that is set, or those that JAX takes by default."""
    if compiling_for.value is not None:
        return compiling_for.value
    meant = jax.sharding.get_abstract_mesh().abstract_device
    if meant is not None:
        return Target(meant.platform, meant.device_kind)
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is not None:
        return Target(default) if isinstance(default, str) else Target(default.platform, default.device_kind)
    platform = jax.default_backend()
    return Target(platform, jax.devices()[0].device_kind if platform == "tpu" else "")
