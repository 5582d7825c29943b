"""Which checkpoints are due, best and kept, for inline and asynchronous validations."""

from dataclasses import replace

import pytest
import torch

from findrec.config import parse_config
from findrec.training.checkpoints.checkpoint import TrainState, list_checkpoints, save_checkpoint
from findrec.training.checkpoints.validations import (
    FILE,
    Validation,
    best_checkpoint_path,
    checkpoint_digest,
    due_checkpoints,
    protected_checkpoints,
    prune_checkpoints,
    read_validations,
    record_validation,
)

START = TrainState(epoch=0, step=0, plan="p", best=-1.0, best_step=-1, stale=0)


def config(evaluator="async", **training):
    return parse_config({"training": {"epochs": 9} | training, "evaluation": {"evaluator": evaluator}})


def save(training, epoch, value=0.0, **state):
    """A checkpoint of ten steps an epoch; its folder."""
    root = training / "checkpoints"
    saved_state = replace(START, **{"epoch": epoch, "step": 10 * epoch} | state)
    table = {"weight": torch.full((3, 2), value)}
    return save_checkpoint(
        root, saved_state, tower={"w": torch.zeros(2)}, optimizer_state={}, tables={"items": table}
    )


def validation_of(path, ndcg):
    step = int(path.name.removeprefix("step-"))
    return Validation(
        step, step // 10, checkpoint_digest(path), {"ndcg@10": ndcg, "recall@10": 0.5, "mrr": 0.1}
    )


def names(paths):
    return [int(path.name.removeprefix("step-")) for path in paths]


def test_due_is_what_ends_a_validated_epoch_and_has_no_line(tmp_path):
    for epoch in (1, 2, 3, 4):
        save(tmp_path, epoch)
    save(tmp_path, 4, step=45, epoch_step=5)  # inside an epoch
    (tmp_path / "checkpoints/step-00000060").mkdir()  # never committed
    save(tmp_path, 9)  # the last one always is
    assert names(due_checkpoints(config(eval_every=2), tmp_path)) == [20, 40, 90]
    record_validation(tmp_path, validation_of(tmp_path / "checkpoints/step-00000020", 0.3))
    assert names(due_checkpoints(config(eval_every=2), tmp_path)) == [40, 90]


def test_the_epoch_in_which_the_time_ends_is_due(tmp_path):
    for epoch in (1, 2, 3):
        save(tmp_path, epoch, seconds=7.0 * epoch)
    save(tmp_path, 3, step=35, epoch_step=5, seconds=25.0)
    assert names(due_checkpoints(config(eval_every=2), tmp_path)) == [20]
    assert names(due_checkpoints(config(eval_every=2, max_seconds=21.0), tmp_path)) == [20, 30]
    assert names(due_checkpoints(config(eval_every=2, max_seconds=21.1), tmp_path)) == [20]


def test_a_step_saved_anew_is_due_anew(tmp_path):
    record_validation(tmp_path, validation_of(save(tmp_path, 1), 0.3))
    assert due_checkpoints(config(), tmp_path) == []
    save(tmp_path, 1, value=1.0)
    assert names(due_checkpoints(config(), tmp_path)) == [10]
    assert read_validations(tmp_path) == []
    record_validation(tmp_path, validation_of(tmp_path / "checkpoints/step-00000010", 0.2))
    assert [one.values["ndcg@10"] for one in read_validations(tmp_path)] == [0.2]


def test_a_torn_line_counts_for_nothing(tmp_path):
    record_validation(tmp_path, validation_of(save(tmp_path, 1), 0.3))
    second = validation_of(save(tmp_path, 2), 0.4)
    record_validation(tmp_path, second)
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text[: len(text) - 20])
    assert [one.step for one in read_validations(tmp_path)] == [10]
    assert names(due_checkpoints(config(), tmp_path)) == [20]


def test_the_best_is_that_of_the_lines_and_of_the_workers(tmp_path):
    root = tmp_path / "checkpoints"
    paths = [save(tmp_path, epoch) for epoch in (1, 2, 3)]
    assert best_checkpoint_path(root) == paths[2]  # the newest, as nothing is known
    for path, ndcg in zip(paths, (0.3, 0.3, 0.1), strict=True):
        record_validation(tmp_path, validation_of(path, ndcg))
    assert best_checkpoint_path(root) == paths[0]  # of equals the first
    noted = save(tmp_path, 4, best=0.4, best_step=20)  # the workers validated for a while
    assert best_checkpoint_path(root) == paths[1]
    record_validation(tmp_path, validation_of(noted, 0.5))
    assert best_checkpoint_path(root) == noted


@pytest.mark.parametrize(
    ("evaluator", "validated", "keep_every", "left"),
    [
        ("inline", {}, 0, [20, 40, 50]),
        ("inline", {}, 3, [20, 30, 40, 50]),
        ("async", {}, 0, [10, 20, 30, 40, 50]),
        ("async", {10: 0.9, 20: 0.1}, 0, [10, 30, 40, 50]),
        ("async", {10: 0.4, 20: 0.1, 30: 0.2, 40: 0.3, 50: 0.1}, 0, [20, 40, 50]),  # 20: the workers' 0.5
    ],
)
def test_retention(tmp_path, evaluator, validated, keep_every, left):
    for epoch in range(1, 7):  # training resumed before the last one, which is damaged
        save(tmp_path, epoch)
    for step, ndcg in validated.items():
        record_validation(tmp_path, validation_of(tmp_path / f"checkpoints/step-{step:08d}", ndcg))
    state = replace(START, step=50, best=0.5, best_step=20)
    root = tmp_path / "checkpoints"
    protected = protected_checkpoints(config(evaluator, keep_every=keep_every), root, state)
    prune_checkpoints(root, state.step, keep=2, protected=protected)
    assert names(list_checkpoints(root)) == [*left, 60]


@pytest.mark.parametrize("key", [{"patience": 3}, {"checkpoint_store": "memory://x"}])
def test_what_an_evaluator_beside_cannot_go_with_is_refused(key):
    with pytest.raises(ValueError, match=r"needs evaluation.evaluator=inline"):
        config("async", **key)
