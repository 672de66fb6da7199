"""Starting JAX on several hosts, and stopping all of them together."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np

from silkie_jax.errors import UserError

HEARTBEAT_SECONDS = 60  # a host that is silent for so long is dead; the others then stop with a message that says so


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to the others, before JAX touches a device. Does nothing where there is only one.

    With an explicit `coordinator` (HOST:PORT of process 0) all three are needed. Otherwise they are taken from what
    started the job: Slurm, Open MPI or a TPU pod (Google Cloud or GKE).

    Raises:
      UserError: an incomplete or wrong explicit address, or the other processes did not come.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # XLA starts a thread a processor or device. Pretended devices wait for each other in collectives, several at a
        # time, and would wait for ever for a thread.
        os.environ.setdefault("NPROC", "64")
    import jax

    if coordinator is None:
        if processes is not None or process is not None:
            raise UserError("--processes and --process need --coordinator HOST:PORT")
        if not _in_cluster():
            return
        jax.distributed.initialize(local_device_ids=_local_devices(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        return
    if processes is None or process is None or not 0 <= process < processes:
        raise UserError("--coordinator needs --processes N and --process K with 0 <= K < N")
    try:
        jax.distributed.initialize(
            coordinator, processes, process, _local_devices(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--coordinator {coordinator}: the {processes} processes did not meet ({reason})") from None


@contextmanager
def together() -> Iterator[None]:
    """What fails inside on one host fails on all of them: the others say which host it was, and why.

    A host that left alone would have the others wait for it in their next collective, until they take it for dead.
    Whatever inside needs all hosts must be done by each of them, whether it fails or not.

    Raises:
      UserError: another host failed.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    own: BaseException | None = None
    try:
        yield
    except BaseException as e:
        own = e
    said = _tell_all("" if own is None else str(own) or type(own).__name__)
    if own is not None:
        raise own
    for host, why in enumerate(said):
        if why:
            raise UserError(f"host {host} stopped: {why}")


def _tell_all(line: str) -> list[str]:
    """What each host has to say."""
    from jax.experimental import multihost_utils

    own = np.frombuffer(line.encode()[:1000].ljust(1000, b"\0"), np.uint8)
    return [bytes(host).rstrip(b"\0").decode(errors="replace") for host in multihost_utils.process_allgather(own)]


def as_the_first_host(value: int) -> int:
    """The first host's value, on all of them: what each reads from a disk need not be the same."""
    import jax
    from jax.experimental import multihost_utils

    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def on_all_hosts(flags: list[bool]) -> list[bool]:
    """Which of the flags hold on every host."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return flags
    gathered = np.asarray(multihost_utils.process_allgather(np.array(flags)))
    return [bool(host.all()) for host in gathered.reshape(-1, len(flags)).T]


def _local_devices() -> list[int] | None:
    """The devices of this process for JAX: [], all of the host's, where Slurm or Open MPI started one process a host.

    JAX itself (None) would give each process a single GPU there, the one of its number on the host.
    """
    slurm = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    alone = (slurm[0] is not None and slurm[0] == slurm[1]) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return [] if alone else None


def _in_cluster() -> bool:
    """Whether something started several processes of this job."""
    if any(int(os.environ.get(name, "1") or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        # `salloc` sets SLURM_NTASKS in the shell too, where nothing has numbered this process.
        return any(name in os.environ for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))
    return (
        len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    )


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a stop after the step or evaluation batch under way, with a checkpoint.

    On several hosts a SIGTERM to any of them stops all at the same place: JAX's coordination service passes it on.
    """

    def __init__(self) -> None:
        import jax

        self._alone = jax.process_count() == 1
        self._asked, self._times = False, 0
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether to stop here; every host must ask at the same places."""
        if self._alone:
            return self._asked
        from jax.experimental import multihost_utils

        self._times += 1
        # It is true at one place alone, and whoever asks there may have a step to finish first.
        self._asked = self._asked or multihost_utils.reached_preemption_sync_point(self._times)
        return self._asked

    def __enter__(self) -> "StopRequest":
        if self._alone:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])  # a second Ctrl-C stops at once
