"""Joining the processes of a job on several hosts, by the environment or by arguments."""

import functools
import os

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
    """Joins the processes of a job, so that `jax.devices()` are the devices of all of them.

    Call it before anything else that touches a device. Outside of a cluster, and without arguments
    or variables, it does nothing, so that the same script runs anywhere; nor where the processes
    are joined already, as by Ray.

    Args:
        coordinator: address and port of process 0, as in "10.0.0.1:1234"; by default the variable
            JAX_COORDINATOR_ADDRESS, or what jax finds on a TPU pod, Slurm, MPI or Kubernetes.
        processes: the number of processes; by default JAX_NUM_PROCESSES, or what jax finds.
        process: the number of this one, from 0; by default JAX_PROCESS_ID, or what jax finds.
        heartbeat_seconds: when one process ends, the others end within this time, in seconds.

    Returns:
        Whether the job has several processes.

    Raises:
        UserError: only some of the three are known, or a variable is not a number.
        RuntimeError: jax has its devices already.

    Example:
        >>> join_hosts("10.0.0.1:1234", processes=2)
        Traceback (most recent call last):
        adapters_jax.errors.UserError: join_hosts: JAX_PROCESS_ID is not set, ...
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    coordinator = coordinator or os.environ.get(COORDINATOR)
    processes = _number(PROCESSES) if processes is None else processes
    process = _number(PROCESS) if process is None else process
    # jax waits 100 seconds for a process that does not answer; a job on preemptible machines should
    # start again sooner.
    initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=heartbeat_seconds
    )
    known = {COORDINATOR: coordinator, PROCESSES: processes, PROCESS: process}
    if all(value is not None for value in known.values()):
        initialize(coordinator, processes, process)
    elif any(value is not None for value in known.values()):
        absent = ", ".join(name for name, value in known.items() if value is None)
        given = ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)
        raise UserError(
            f"join_hosts: {absent} is not set, and {given} is; set all three, or none "
            "on a cluster that jax knows"
        )
    else:
        try:
            initialize()
        except ValueError as error:
            # There is no separate class for a missing cluster, and other ValueErrors are
            # mistakes.
            if "coordinator_address" not in str(error):  # jax's message where it finds no cluster
                raise
            return False
    return jax.process_count() > 1


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"join_hosts: {name}={text!r}, expected a whole number")
    return None if text is None else int(text)
