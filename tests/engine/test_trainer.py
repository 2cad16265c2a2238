"""Training, resuming and evaluating in one process, on four small images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import CommonMetricPrinter

from convmask.checkpoint import CheckpointError
from convmask.data.errors import DatasetError
from convmask.engine import ConfigError, Trainer, argument_parser, load_config, prepare, setup, trainer
from convmask.engine.defaults import check_test_classes, choose_device
from convmask.engine.progress import ProgressBar
from convmask.evaluation import PanopticEvaluator

QUICK = "quick/panoptic_fpn_synthetic.yaml"


@pytest.fixture
def cfg(tiny_options: list[str]) -> CfgNode:
    result = load_config(QUICK, tiny_options)
    prepare(result)
    return result


def test_class_counts_and_device_are_completed(cfg: CfgNode) -> None:
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 5
    assert cfg.MODEL.DEVICE == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to use")
def test_a_cuda_config_falls_back_to_the_cpu() -> None:
    cfg = load_config("", ["MODEL.DEVICE", "cuda:1"])
    choose_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("float16", r"SOLVER\.AMP\.DTYPE float16 needs a CUDA device"), ("int8", r"SOLVER\.AMP\.DTYPE is 'int8'")],
)
def test_a_precision_that_there_is_not_is_refused(dtype: str, message: str) -> None:
    cfg = load_config("", ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", dtype])
    with pytest.raises(ConfigError, match=message):
        choose_device(cfg)


def test_an_unknown_data_set_is_named_with_the_nearest_one() -> None:
    cfg = load_config(QUICK, ["DATASETS.TRAIN", "('synthetic_panoptic_trian',)"])
    with pytest.raises(ConfigError, match=r"'synthetic_panoptic_trian'.*did you mean synthetic_panoptic_train"):
        prepare(cfg)


def test_a_contradicting_class_count_is_refused(tiny_options: list[str]) -> None:
    with pytest.raises(DatasetError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES is 7"):
        prepare(load_config(QUICK, [*tiny_options, "MODEL.ROI_HEADS.NUM_CLASSES", "7"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()"], r"TEST\.AUG\.MIN_SIZES is empty"),
        (["TEST.AUG.ENABLED", "True", "TEST.AUG.MERGE_THRESH", "0."], r"TEST\.AUG\.MERGE_THRESH is 0\.0"),
        (["TEST.AUG.ENABLED", "True", "INPUT.TARGETS_IN_TEST", "True"], r"INPUT\.TARGETS_IN_TEST are both True"),
        (["INPUT.FORMAT", "XYZ"], r"INPUT\.FORMAT is 'XYZ', not one of BGR, RGB"),
        (["MODEL.DEVICE", "tpu"], r"MODEL\.DEVICE 'tpu' is no device"),
    ],
)
def test_values_that_nothing_can_act_on_are_refused(tiny_options: list[str], options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(QUICK, [*tiny_options, *options]))


def test_an_output_folder_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="OUTPUT_DIR is empty"):
        setup(argument_parser().parse_args(["OUTPUT_DIR", ""]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.MAX_ITER", "0"], r"SOLVER\.MAX_ITER is 0"),
        (["SOLVER.IMS_PER_BATCH", "0"], r"SOLVER\.IMS_PER_BATCH is 0"),
        (["SOLVER.LR_SCHEDULER_NAME", "none"], "the training cannot be built .* none"),
        (["MODEL.META_ARCHITECTURE", "none"], "the model cannot be built .*'none'"),
        (["MODEL.PANOPTIC_FPN.TASK", "none"], r"the model cannot be built .*MODEL\.PANOPTIC_FPN\.TASK 'none'"),
    ],
)
def test_what_cannot_be_trained_is_a_wrong_config(cfg: CfgNode, options: list[str], message: str) -> None:
    cfg.merge_from_list(options)
    with pytest.raises(ConfigError, match=message):
        Trainer(cfg)


def test_a_test_set_of_other_classes_is_refused_before_training(tiny_options: list[str]) -> None:
    name, classes = "set_with_a_class_of_its_own", ["disc", "box"]
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: [])
        MetadataCatalog.get(name).thing_classes = classes
    with pytest.raises(ConfigError, match=rf"'{name}' has 2 things classes, .* has 5; .* 'box' and "):
        prepare(load_config(QUICK, [*tiny_options, "DATASETS.TEST", f"('{name}',)"]))


def test_a_test_set_without_stuff_or_of_semantic_labels_may_differ(cfg: CfgNode) -> None:
    things = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    for name, metadata in {
        "set_of_the_same_things": {"thing_classes": things},
        "set_of_semantic_labels": {"stuff_classes": ["road", "sky"], "evaluator_type": "sem_seg"},
    }.items():
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, lambda: [])
            MetadataCatalog.get(name).set(**metadata)
        cfg.DATASETS.TEST = (name,)
        check_test_classes(cfg)


def test_resuming_with_another_optimizer_is_refused(cfg: CfgNode) -> None:
    Trainer(cfg).checkpointer.save("model_final", iteration=0)
    cfg.SOLVER.OPTIMIZER = "SGD"
    with pytest.raises(CheckpointError, match=r"its trainer does not belong to this run: .* has no dampening"):
        Trainer(cfg).resume_or_load(resume=True)


def test_a_training_writes_metrics_and_a_checkpoint_and_resumes(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ()
    output = Path(cfg.OUTPUT_DIR)
    first = Trainer(cfg)
    first.resume_or_load(resume=False)
    first.train()
    assert (output / "model_final.pth").is_file()
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert {"total_loss", "loss_mask", "loss_sem_seg", "data_time", "lr"} <= records[-1].keys()
    assert list(output.glob("events.out.tfevents.*"))

    cfg.SOLVER.MAX_ITER = 3
    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    for (name, mine), theirs in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert second.optimizer.state_dict()["state"].keys() == first.optimizer.state_dict()["state"].keys()
    second.train()
    assert second.iter == 3


def test_evaluation_covers_every_task(cfg: CfgNode) -> None:
    model = Trainer.build_model(cfg)
    results = Trainer.test(cfg, model)
    assert {"PQ", "PQ_th", "PQ_st"} <= results["panoptic_seg"].keys()
    assert {"bbox", "segm", "sem_seg"} <= results.keys()
    evaluators = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])._evaluators
    assert any(isinstance(evaluator, PanopticEvaluator) for evaluator in evaluators)


def test_a_diverging_training_names_iteration_loss_and_images(
    cfg: CfgNode, few_images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(cfg)
    original = type(run.model).forward

    def forward(self: torch.nn.Module, batch: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        losses = original(self, batch)
        return {**losses, "loss_mask": losses["loss_mask"] * float("nan")} if run.iter == 1 else losses

    monkeypatch.setattr(type(run.model), "forward", forward)
    with pytest.raises(FloatingPointError, match=r"iteration 1: loss_mask = nan; images of this batch: synthetic://"):
        run.train()
    assert not (Path(cfg.OUTPUT_DIR) / "model_final.pth").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals(cfg: CfgNode, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "on_terminal", lambda: terminal)
    run = Trainer(cfg)
    assert any(isinstance(hook, ProgressBar) for hook in run._hooks) == terminal
    # The metric lines are written in both cases: on a terminal the bar keeps them to the log file.
    assert any(isinstance(writer, CommonMetricPrinter) for writer in run.build_writers())
