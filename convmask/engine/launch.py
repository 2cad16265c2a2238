"""Starts one process per GPU, or, without GPUs, one per requested process on the CPU; or joins those of torchrun."""

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
from torch.distributed.elastic.multiprocessing.errors import record

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


def _store_of_torchrun(timeout: timedelta) -> dist.Store:
    """Where the processes of ``torchrun`` find each other; apart from where those before a restart did.

    Otherwise a process may find the address of one that has ended.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"convmask/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _join(rank: int, world_size: int, local_rank: int, local_size: int, url: str, timeout: timedelta) -> None:
    """Makes this process part of a job: NCCL where there is a GPU, GLOO on the CPU."""
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(local_rank)
    backend = "NCCL" if on_gpus else "GLOO"
    if url == "env://":
        store = _store_of_torchrun(timeout)
        dist.init_process_group(backend, store=store, world_size=world_size, rank=rank, timeout=timeout)
    else:
        dist.init_process_group(backend, init_method=url, world_size=world_size, rank=rank, timeout=timeout)
    _create_local_process_group(local_size)
    comm.synchronize()


def _finish() -> None:
    """Leaves a job that is done; on the CPU this ends the process.

    After a failure nobody leaves: that would wait for processes that are gone, and hide what was wrong.
    """
    comm.synchronize()
    if not torch.cuda.is_available():
        _leave()
    dist.destroy_process_group()


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
    rank = machine_rank * processes_per_machine + local_rank
    try:
        _join(rank, world_size, local_rank, processes_per_machine, dist_url, timeout)
        main_func(*args)
        _finish()
    except user_errors() as error:
        failures.put((error, traceback.format_exc()))
        raise SystemExit(1) from None


def started_by_torchrun() -> bool:
    """Whether this process is one of a job that ``torchrun`` has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _run_in_torchrun(main_func: Callable[..., Any], args: tuple[Any, ...], timeout: timedelta) -> Any:
    """Calls ``main_func`` as the process that the environment of ``torchrun`` describes."""
    rank, world_size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if world_size == 1:
        return main_func(*args)
    if world_size % local_size:
        raise ConfigError(f"torchrun has started {local_size} of {world_size} processes here: machines must have alike")
    if torch.cuda.is_available() and local_size > torch.cuda.device_count():
        raise ConfigError(f"--nproc-per-node {local_size}: this machine has {torch.cuda.device_count()} GPUs")
    _join(rank, world_size, local_rank, local_size, "env://", timeout)
    result = main_func(*args)
    _finish()
    return result


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

    A process that ``torchrun`` has started is one of its job, whatever the arguments from ``num_gpus_per_machine`` to
    ``dist_url`` say. On the CPU it ends here once all are done.

    A process that fails ends the job. Its traceback is what is raised here, or shown by ``torchrun``.

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
    if started_by_torchrun():
        return record(_run_in_torchrun)(main_func, args, timeout)
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
