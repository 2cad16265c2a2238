"""One of several processes that evaluate a panoptic set together: ``python distributed_worker.py RANK SIZE FOLDER``.

FOLDER holds the set (``set/``) and ``outputs.pt``, one model output an image. The first process writes
``results.json``.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog

from convmask.config import get_cfg
from convmask.data.panoptic import register_panoptic
from convmask.evaluation import build_evaluator


def main(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    register_panoptic("shared", folder / "set/images", folder / "set/panoptic.json", folder / "set/panoptic")
    outputs = torch.load(folder / "outputs.pt", weights_only=False)
    cfg = get_cfg()
    cfg.TEST.DUMP_PANOPTIC = True
    evaluator = build_evaluator(cfg, "shared", str(folder / "distributed"))
    evaluator.reset()
    dist.barrier()
    for index, record in enumerate(DatasetCatalog.get("shared")):
        if index % size == rank:
            evaluator.process([record], [outputs[index]])
    results = evaluator.evaluate()
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    else:
        assert not results
    # GLOO now and then aborts a process while it is torn down, and one whose partner has left while its last message
    # is under way.
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
