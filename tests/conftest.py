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

# Traces make and drop objects by the hundred thousand, and each pass of the collector goes through all there are: at
# Python's thresholds 7% of the time
gc.set_threshold(100_000, 20, 50)

MAPS, MOST = Path("/proc/self/maps"), 20_000
"""Memory areas of this process. Each compiled program takes some, and Linux gives a process 65,530: past that XLA
crashes it with a segmentation fault. A run of all tests compiles thousands."""


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    yield
    if MAPS.exists() and "jax" in sys.modules and MAPS.read_bytes().count(b"\n") > MOST:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def as_cudnn(monkeypatch):
    """What reaches cuDNN, as on a GPU, is run by jax.nn's plain implementation; whether there was a mask, and the
    shapes of queries and keys, of each call."""
    import inspect

    import jax
    import jax.numpy as jnp
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from jdit.target import Target, compiling_for

    calls, real, plain = [], inspect.signature(cudnn.dot_product_attention), jax.nn.dot_product_attention

    def with_sums(*args, **kw):
        given = real.bind(*args, **kw).arguments
        q, k, v = (given[name] for name in ("query", "key", "value"))
        assert given["mask_type"] == cudnn.MaskType.NO_MASK and given["return_residual"]
        assert all(given[name] is None for name in ("q_seqlen", "kv_seqlen"))
        calls.append((False, q.shape, k.shape))
        wide = (a.astype(jnp.float32) for a in (q, k, v))
        out, lse = plain(*wide, scale=given["scale"], return_residual=True)
        return out.astype(q.dtype), lse.swapaxes(1, 2)

    def public(q, k, v, *, implementation, **kw):
        masked = any(kw.get(name) is not None for name in ("query_seq_lengths", "key_value_seq_lengths"))
        calls.append((masked or kw.get("is_causal", False) or k.shape[1] % 128 > 0, q.shape, k.shape))
        return plain(q, k, v, **kw)

    monkeypatch.setattr(cudnn, "dot_product_attention", with_sums)
    monkeypatch.setattr(jax.nn, "dot_product_attention", public)
    with compiling_for(Target("gpu")):
        yield calls
