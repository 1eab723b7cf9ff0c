"""Several processes, on one host or on many, that run one program together (jax.distributed).

Each process runs the same command. They find one another by what the launcher says, load each what its devices hold,
and make the same result; the first one writes it. The rule for errors: a process that fails tells all others through
the coordination service, and each of them ends with that message and exit code, wherever it is, within `GRACE` seconds
or so. A process that is killed tells nothing; the service misses it after `HEARTBEAT` seconds and ends the others.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

log = logging.getLogger("jdit")

GRACE = 5.0
"""Seconds that a process is given to end by itself after another has failed; it may be waiting for that one."""
HEARTBEAT = 100
POLL = 0.5
FAILED, ENDED = "jdit/failed", "jdit/ended"

COUNTS = {"SLURM_NTASKS": "SLURM", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
IDS = {"SLURM_PROCID": "SLURM", "OMPI_COMM_WORLD_RANK": "Open MPI", "JOB_COMPLETION_INDEX": "Kubernetes"}
"""Variables by which launchers tell a process how many there are, and which one it is."""


class Launch(NamedTuple):
    """How a process finds the others; what is None, jax finds.

    Attributes:
        by: who says so. devices: of this host, by number, that this process takes; None leaves it to jax: one for each
            process under SLURM and Open MPI, else all.
    """

    by: str
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    devices: tuple[int, ...] | None = None


class Failure(NamedTuple):
    """What went wrong, where, and the exit code that it ends all processes with."""

    process: int
    message: str
    code: int

    def __str__(self) -> str:
        return f"process {self.process}: {self.message}"


def launch(
    coordinator: str | None = None, processes: int | str | None = None, process_id: int | None = None, *,
    env: Mapping[str, str] = os.environ,
) -> Launch | None:  # fmt: skip
    """What arguments and the environment say of other processes; None where this one is alone.

    Arguments come before JDIT_COORDINATOR, JDIT_PROCESSES and JDIT_PROCESS_ID, those before the launcher's own
    variables (SLURM, Open MPI, Kubernetes' JOB_COMPLETION_INDEX, TPU workers on GKE).

    Raises:
        ValueError: numbers that are none or do not fit together, or one of the three without the others.
    """
    coordinator = coordinator or env.get("JDIT_COORDINATOR") or None
    asked = env.get("JDIT_PROCESSES") if processes is None else processes
    if asked == "auto":
        return Launch("jax", coordinator)
    count, rank = _number("--processes or JDIT_PROCESSES", asked, 1), process_id
    if rank is None:
        rank = _number("--process-id or JDIT_PROCESS_ID", env.get("JDIT_PROCESS_ID"), 0)
    if (coordinator, count, rank) == (None, None, None):
        return _launched(env)
    if count == 1:
        return None
    by_launcher = lambda names, least: next((_number(n, env[n], least) for n in names if n in env), None)
    count = by_launcher(COUNTS, 1) if count is None else count
    rank = by_launcher(IDS, 0) if rank is None else rank
    given = {"a coordinator (HOST:PORT)": coordinator, "the number of processes": count, "this one's number": rank}
    if lacks := [what for what, value in given.items() if value is None]:
        have = ", ".join(f"{what} is {value}" for what, value in given.items() if value is not None)
        raise ValueError(f"{have}, but {' and '.join(lacks)} {'is' if len(lacks) == 1 else 'are'} missing: give "
                         "--coordinator, --processes and --process-id, or JDIT_COORDINATOR and so on")  # fmt: skip
    assert coordinator is not None and count is not None and rank is not None
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise ValueError(f"coordinator {coordinator!r} is not HOST:PORT, as 10.0.0.1:1234")
    if rank >= count:
        raise ValueError(f"process {rank} of {count}: they are numbered 0 to {count - 1}")
    return Launch("arguments", coordinator, count, rank)


def _launched(env: Mapping[str, str]) -> Launch | None:
    """What a launcher says by itself."""
    if "SLURM_STEP_NODELIST" in env and (count := _number("SLURM_NTASKS", env.get("SLURM_NTASKS"), 1) or 1) > 1:
        # one task a node takes all of its devices, where jax would take one
        alone = env.get("SLURM_STEP_NUM_NODES") == str(count)
        devices = _number("SLURM_GPUS_ON_NODE", env.get("SLURM_GPUS_ON_NODE"), 1) if alone else None
        rank = _number("SLURM_PROCID", env.get("SLURM_PROCID"), 0)
        return Launch("SLURM", None, count, rank, tuple(range(devices)) if devices else None)
    if (_number("OMPI_COMM_WORLD_SIZE", env.get("OMPI_COMM_WORLD_SIZE"), 1) or 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env:
            raise ValueError("this Open MPI does not say where its first process is: give --coordinator HOST:PORT")
        return Launch("Open MPI")
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return Launch("GKE")
    return None


def _number(what: str, value: int | str | None, least: int) -> int | None:
    if value is None or value == "":
        return None
    if not str(value).isdigit() or int(value) < least:
        raise ValueError(f"{what}={value}: it must be a whole number of at least {least}")
    return int(value)


# --- together

_failure: Failure | None = None
_joined = False


def first() -> bool:
    """Whether this process writes and prints: of several, the first one does."""
    return not _joined or _state().process_id == 0


def _state() -> Any:
    from jax._src import distributed  # jax has no public name for the client of its coordination service

    return distributed.global_state


def initialize(
    coordinator: str | None = None, processes: int | str | None = None, process_id: int | None = None, *,
    timeout: int = 300,
) -> bool:  # fmt: skip
    """Join the other processes of a launch; before anything else that touches devices.

    Args:
        coordinator: HOST:PORT of the first process. processes: how many there are; "auto" leaves everything to jax's
            own detection. process_id: which one this is. None takes the environment's word: see `launch`.
        timeout: seconds to wait for the others.

    Returns:
        Whether there are others: False where neither arguments nor environment say so, and nothing has been done.

    Raises:
        ValueError: what `launch` refuses. RuntimeError: jax has used its devices already, or the others did not come.
    """
    global _joined
    if _joined:
        return True
    found = launch(coordinator, processes, process_id)
    if found is None:
        return False
    import jax

    try:
        jax.distributed.initialize(
            found.coordinator, found.processes, found.process_id, found.devices, initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (ValueError, KeyError) as e:
        raise ValueError(f"{found.by} does not say how the processes find one another: {e}") from None
    _joined = _state().num_processes > 1
    if _joined:
        log.info("process %d of %d, by %s", _state().process_id, _state().num_processes, found.by)
        threading.Thread(target=_watch, daemon=True).start()
        before = sys.excepthook
        sys.excepthook = lambda kind, error, trace: _uncaught(before, kind, error, trace)
    return _joined


def _watch():
    """Ends this process soon after another has failed."""
    global _failure
    client = _state().client
    while _state().client is client:
        if (told := _told(client)) is not None and told.process != _state().process_id:
            _failure = told
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C, so that nothing half-written is left
            time.sleep(GRACE)
            _end(told)  # it waits inside of jax, perhaps for the one that failed
        time.sleep(POLL)


def _told(client: Any) -> Failure | None:
    with contextlib.suppress(Exception):  # not there, or the service is gone
        return Failure(*json.loads(client.key_value_try_get(FAILED)))
    return None


def fail(message: str, code: int = 1):
    """End all processes: with this message or, where another one has failed before, with that one's.

    Does not return where there are several processes; does nothing where there is one.
    """
    if not _joined:
        return
    state = _state()
    own = Failure(state.process_id, message, code)
    with contextlib.suppress(Exception):  # another one was first
        state.client.key_value_set(FAILED, json.dumps(own))
    _end(_failure or _told(state.client) or own)


def _end(why: Failure):
    """Say why and leave, without jax's own farewell, which waits for all. The first process hosts the service: it
    leaves when the others have heard."""
    if _first_end.acquire(blocking=False):
        state = _state()
        print(f"jdit: {why}", file=sys.stderr, flush=True)  # not logged: nothing that is open gets closed from here on
        with contextlib.suppress(Exception):
            state.client.key_value_set(f"{ENDED}/{state.process_id}", "")
            until = time.monotonic() + 2 * GRACE
            while state.process_id == 0 and time.monotonic() < until:
                if len(state.client.key_value_dir_get(ENDED)) == state.num_processes:
                    break
                time.sleep(POLL / 5)
        sys.stdout.flush()
        os._exit(why.code)
    time.sleep(3 * GRACE)  # another thread is at it


_first_end = threading.Lock()


def _uncaught(before: Any, kind: type[BaseException], error: BaseException, trace: Any):
    if _failure is None:
        before(kind, error, trace)
    fail(f"{kind.__name__}: {error}", 130 if issubclass(kind, KeyboardInterrupt) else 1)


def same(what: str, values: Mapping[str, Any], timeout: int = 60):
    """Check that all processes were given the same.

    Raises:
        ValueError: naming what differs from the first process.
    """
    if not _joined:
        return
    state, own = _state(), {name: repr(value) for name, value in values.items()}
    if state.process_id == 0:
        state.client.key_value_set(f"jdit/{what}", json.dumps(own))
        return
    theirs = json.loads(state.client.blocking_key_value_get(f"jdit/{what}", 1000 * timeout))
    names = [name for name in {**theirs, **own} if theirs.get(name) != own.get(name)]
    if names:
        told = "; ".join(f"{name}={own.get(name)} where process 0 has {theirs.get(name)}" for name in names)
        raise ValueError(f"{what}: {told}; all processes must be started alike")
