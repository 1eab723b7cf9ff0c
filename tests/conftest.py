"""Eight CPU devices for every test, which must be set before jax is imported; programs that are let go in time."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # XLA ends the process when the devices of a collective have not all come within 40 s, as on a machine that was
    # paused or is short of cores; a test that really hangs is still ended
    flags = (
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

MAPS, MOST = Path("/proc/self/maps"), 20_000
"""Memory areas of this process. Each compiled program takes some, and Linux gives a process 65,530: past that XLA
crashes it with a segmentation fault. A run of all tests compiles thousands."""


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    yield
    if MAPS.exists() and "jax" in sys.modules and MAPS.read_bytes().count(b"\n") > MOST:
        sys.modules["jax"].clear_caches()
        gc.collect()
