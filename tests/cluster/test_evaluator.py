"""The evaluator beside training, as a plain object: the digits of workers that validate, from checkpoints."""

import shutil

import pytest
import torch
from planted import planted_folder, planted_run

from findrec.cluster.evaluator import Evaluator
from findrec.errors import FindRecError
from findrec.evaluation.run import evaluate_run
from findrec.training.checkpoints.checkpoint import list_checkpoints
from findrec.training.checkpoints.validations import (
    METRICS,
    best_checkpoint_path,
    due_checkpoints,
    read_validations,
)
from findrec.training.runs import read_run_config

KEEP_ONE = {"keep": 1, "epochs": 4}


class Kept:
    """A log that keeps what was validated."""

    def __init__(self):
        self.lines = {}

    def log(self, step, epoch, values):
        if "valid/mrr" in values:
            self.lines[step] = values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return planted_folder(tmp_path_factory.mktemp("data"), num_users=60)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, folder):
    """The same training with an inline and with an asynchronous evaluator."""
    home, kept = tmp_path_factory.mktemp("runs"), Kept()
    common = {"training": KEEP_ONE, "baselines": ["popularity"], "valid_users": 40}
    beside = planted_run(home / "beside", folder, evaluator="async", **common)
    inline = planted_run(home / "inline", folder, log=kept, **common)
    return beside, inline, kept.lines


def evaluator_of(run, folder):
    config = read_run_config(run).model_dump(mode="json")
    return Evaluator(config, str(folder.path), str(run), torch.get_num_threads(), gpu=True)


def test_it_finds_what_workers_find(pair, folder, capsys):
    beside, inline, kept = pair
    assert len(list_checkpoints(beside / "checkpoints")) == 4  # all due, so none is deleted
    here = evaluator_of(beside, folder)
    while here.work():
        continue
    lines = {
        one.step: {f"valid/{name}": one.values[name] for name in METRICS} for one in read_validations(beside)
    }
    assert lines == kept
    assert (
        best_checkpoint_path(beside / "checkpoints").name == best_checkpoint_path(inline / "checkpoints").name
    )
    output = capsys.readouterr().out
    assert output.count("validation of findrec, epoch ") == 4
    assert output.count("ranking ") == 2  # the model and popularity, before training is said to be over
    rows = here.finish()
    assert {row["users"] for part in ("valid", "test") for row in rows[part]} == {60}  # no longer a sample
    assert capsys.readouterr().out.count("ranking ") == 0
    assert rows == evaluate_run(inline)
    assert (beside / "metrics.json").read_bytes() == (inline / "metrics.json").read_bytes()
    page = (beside / "report.html").read_text()
    assert "validation NDCG@10" in page


def test_results_of_other_weights_are_ranked_again(pair, folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(pair[0], run)
    here = evaluator_of(run, folder)
    while here.work():
        continue
    best = best_checkpoint_path(run / "checkpoints")
    shutil.rmtree(best)
    capsys.readouterr()
    here.finish()
    assert "ranking findrec" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_read_is_given_up_loudly(pair, folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(pair[0], run)
    (run / "validations.jsonl").unlink()
    first = list_checkpoints(run / "checkpoints")[0]
    (first / "tower.safetensors").write_bytes(b"x")
    here = evaluator_of(run, folder)
    while here.work():
        continue
    output = capsys.readouterr().out
    assert output.count("WARNING") == 1
    assert f"no validation of findrec at {first.name}" in output
    assert due_checkpoints(read_run_config(run), run) == [first]
    assert len(read_validations(run)) == 3


def test_a_machine_without_the_run_folder_is_told(folder, pair, tmp_path):
    config = read_run_config(pair[0]).model_dump(mode="json")
    with pytest.raises(FindRecError, match=r"there is no run folder .*evaluation.evaluator=inline"):
        Evaluator(config, str(folder.path), str(tmp_path), 1, gpu=True)
