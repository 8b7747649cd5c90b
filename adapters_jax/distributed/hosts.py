"""Several hosts: joining them, from the environment or by hand."""

import functools
import os
from collections.abc import Mapping

import jax

from adapters_jax.errors import UserError

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join_hosts(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_seconds: int = 20,
) -> bool:
    """Joins the processes of a job, so that `jax.devices()` are those of all of them.

    It has to come before anything else that touches a device. Where nothing says that there are
    several processes it does nothing, so that a script can call it anywhere.

    Args:
        coordinator: address and port of process 0, as in "10.0.0.1:1234"; by default the variable
            JAX_COORDINATOR_ADDRESS, or what jax finds out on a TPU pod, Slurm, MPI or Kubernetes.
        processes: how many there are; by default JAX_NUM_PROCESSES, or likewise.
        process: which one this is, from 0; by default JAX_PROCESS_ID, or likewise.
        heartbeat_seconds: when one process ends, the others do so after at most so long.

    Returns:
        Whether there are several.

    Raises:
        ValueError: only some of the three are known, or a number is not one.
        RuntimeError: jax has its devices already.
    """
    coordinator = coordinator or os.environ.get(COORDINATOR)
    processes = _number(PROCESSES) if processes is None else processes
    process = _number(PROCESS) if process is None else process
    initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=heartbeat_seconds
    )
    known = {COORDINATOR: coordinator, PROCESSES: processes, PROCESS: process}
    if all(value is not None for value in known.values()):
        initialize(coordinator, processes, process)
    elif any(value is not None for value in known.values()):
        absent = ", ".join(name for name, value in known.items() if value is None)
        raise UserError(
            f"join_hosts: {absent} is not set, and {_shown(known)} is; set all three, or none "
            "where the cluster itself tells"
        )
    else:
        try:
            initialize()
        except ValueError as error:
            if "coordinator_address" not in str(error):  # what jax says where it finds no cluster
                raise
            return False
    return jax.process_count() > 1


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"join_hosts: {name}={text!r} is not a number")
    return None if text is None else int(text)


def _shown(known: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)
