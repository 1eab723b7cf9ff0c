"""Eight CPU devices for every test and programs compiled quickly, both set before jax is imported; programs let go in
time."""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # XLA ends the process when the devices of a collective have not all come within 40 s, as on a machine that was
    # paused or is short of cores; a test that really hangs is still ended
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Tiny programs, each run a few times, compile for much longer than they run: without optimisation, and with the
    # older code for fusions, which later versions lack, in a quarter of the time (a Wan decoder: 0.7 s for 3.1 s)
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
]
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f for f in FLAGS if f.split("=")[0] not in given)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# torch's threads wait in busy loops, which with a test process a core doubles the time of its tests
os.environ.setdefault("OMP_NUM_THREADS", "1")
# XLA's threads (as many as devices, on few cores) wait inside collectives: two exchanges of one device at a time leave
# another without a thread, for ever
os.environ.setdefault("NPROC", "32")

MAPS, MOST = Path("/proc/self/maps"), 20_000
"""Memory areas of this process. Each compiled program takes some, and Linux gives a process 65,530: past that XLA
crashes it with a segmentation fault. A run of all tests compiles thousands."""


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    yield
    if MAPS.exists() and "jax" in sys.modules and MAPS.read_bytes().count(b"\n") > MOST:
        sys.modules["jax"].clear_caches()
        gc.collect()
