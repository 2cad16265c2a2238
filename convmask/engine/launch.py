"""Starts one process per GPU, or, without GPUs, one per requested process on the CPU."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from convmask.engine.errors import ConfigError, user_errors

DEFAULT_TIMEOUT = timedelta(minutes=30)


class _RemoteError(Exception):
    """The traceback of a spawned process, shown as the cause of the error that it raised."""


def _free_local_url() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{sock.getsockname()[1]}"


def _create_local_process_group(processes_per_machine: int) -> None:
    """Tells Detectron2 which ranks share this machine; every rank must take part."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    for first in range(0, dist.get_world_size(), processes_per_machine):
        ranks = list(range(first, first + processes_per_machine))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def _leave() -> NoReturn:
    """Ends a process that is done without tearing GLOO down, which now and then aborts ("terminate called ...")."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _worker(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    processes_per_machine: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
    timeout: timedelta,
    failures: SimpleQueue[tuple[Exception, str]],
) -> None:
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend="NCCL" if on_gpus else "GLOO",
        init_method=dist_url,
        world_size=world_size,
        rank=machine_rank * processes_per_machine + local_rank,
        timeout=timeout,
    )
    try:
        _create_local_process_group(processes_per_machine)
        comm.synchronize()
        main_func(*args)
        comm.synchronize()
        if not on_gpus:
            _leave()
    except user_errors() as error:
        failures.put((error, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = "auto",
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> Any:
    """Calls ``main_func(*args)`` in every process of a job.

    One process on one machine (``num_gpus_per_machine`` 0 or 1) is the calling process itself. More of them are
    spawned: with NCCL where there is a GPU, with GLOO on the CPU, where ``num_gpus_per_machine`` counts processes.

    Args:
        main_func: picklable where more than one process is asked for.
        num_gpus_per_machine: processes on each machine.
        num_machines: machines; the same command runs on each of them.
        machine_rank: which of them this one is, from 0.
        dist_url: where the processes meet. ``"auto"``: a free port of this machine, for one machine only.
        args: what ``main_func`` is called with.
        timeout: how long a collective operation may wait for the other processes.

    Returns:
        What ``main_func`` returns if it runs in this process, else None.

    Raises:
        ConfigError: more processes than GPUs, a machine rank out of range, or several machines without a ``dist_url``.
        Exception: one of :func:`~convmask.engine.errors.user_errors` that ``main_func`` raised in a spawned process,
            the first of them where there are several. Other errors arrive as ``ProcessRaisedException``.
    """
    if num_gpus_per_machine < 0 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"cannot start {num_gpus_per_machine} processes as machine {machine_rank} of {num_machines}: "
            "--num-gpus must not be negative, --machine-rank is from 0 to --num-machines - 1"
        )
    processes = max(num_gpus_per_machine, 1)
    if processes * num_machines == 1:
        return main_func(*args)

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ConfigError(f"--num-gpus {processes}: this machine has {torch.cuda.device_count()}")
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ConfigError(f"--dist-url {dist_url}: several machines need the address of the first, tcp://HOST:PORT")
        dist_url = _free_local_url()
    failures = mp.get_context("spawn").SimpleQueue()
    job = (main_func, processes * num_machines, processes, machine_rank, dist_url, args, timeout, failures)
    try:
        mp.spawn(_worker, nprocs=processes, args=job)
    except mp.ProcessExitedException:
        if failures.empty():
            raise
        error, trace = failures.get()
        raise error from _RemoteError(trace)
    return None
