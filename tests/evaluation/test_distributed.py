from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from convmask.config import get_cfg
from convmask.evaluation import build_evaluator

from .model_outputs import inputs_of
from .test_build import outputs_of
from .test_panoptic_evaluator import pq_of_files

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no GLOO")
def test_two_processes_find_what_one_finds(small_set, tmp_path):
    name, root, images = small_set
    outputs = outputs_of(name, images[::-1])
    # Predictions that are partly wrong: those of another image, cut or padded to the size.
    for output, (truth, _) in zip(outputs, images, strict=True):
        height, width = truth.shape
        id_map, segments = output["panoptic_seg"]
        padded = torch.zeros(height, width, dtype=torch.int32)
        kept = id_map[:height, :width]
        padded[: kept.shape[0], : kept.shape[1]] = kept
        present = set(padded.unique().tolist())
        output["panoptic_seg"] = (padded, [s for s in segments if s["id"] in present])
        output["sem_seg"] = torch.zeros(3, height, width)
        output["instances"].remove("pred_masks")
    torch.save(outputs, tmp_path / "outputs.pt")

    alone = build_evaluator(get_cfg(), name)
    alone.reset()
    alone.process(inputs_of(name), outputs)
    expected = alone.evaluate()

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER)]
    workers = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == expected.keys()
    for task in expected:
        assert results[task] == pytest.approx(expected[task], abs=1e-9, nan_ok=True)
    assert 0 < results["panoptic_seg"]["PQ"] < 100

    oracle = pq_of_files(
        root / "panoptic.json", root / "panoptic", tmp_path / "distributed" / "panoptic_predictions.json"
    )
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * oracle["All"]["pq"], abs=1e-9)
