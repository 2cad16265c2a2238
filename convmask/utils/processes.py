"""What a loss needs of the other processes of a job."""

from __future__ import annotations

import torch
from detectron2.utils import comm


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, without a gradient; with one process the tensor itself, detached.

    Every process has to call it the same number of times in a pass, with images of nothing too: it waits for all.

    Args:
        value: of the same shape and type in each process; a count as float32, since bfloat16 rounds above 256.
    """
    processes = comm.get_world_size()
    if processes == 1:
        return value.detach()
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / processes
