"""A training writes a trace of some of its steps, and the same weights as without."""

import json

import pytest
import torch
from planted import make_config, planted_folder

from findrec.evaluation.validation import validate
from findrec.training.build import build_tables, build_tower_model
from findrec.training.logs.step_trace import FOLDER, StepTrace
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker


def train(folder, checkpoints, worker=None, **training):
    config = make_config(epochs=3, **training)
    torch.manual_seed(0)
    tower = PlainTower(build_tower_model(config, folder), config.training.optim)
    run_training(
        config,
        folder,
        checkpoints,
        tower,
        build_tables(config, folder),
        worker=worker or Worker(),
        validate=validate,
    )
    return tower.model.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return planted_folder(tmp_path_factory.mktemp("data") / "planted", num_users=60)


def test_a_trace_of_the_configured_steps_does_not_change_training(folder, tmp_path, capfd):
    plain = train(folder, tmp_path / "plain/checkpoints")
    traced = train(folder, tmp_path / "traced/checkpoints", profile_steps=2)
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=0, atol=0)
    assert not (tmp_path / "plain" / FOLDER).exists()
    (path,) = (tmp_path / "traced" / FOLDER).iterdir()
    assert path.name == "steps-4-5.json"
    assert str(path) in "".join(capfd.readouterr())
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2
    assert any("adamw" in name.lower() for name in names)


def test_more_steps_than_there_are_leave_a_trace_of_those(folder, tmp_path):
    train(folder, tmp_path / "run/checkpoints", profile_steps=10_000, microbatches=2)
    (path,) = (tmp_path / "run" / FOLDER).iterdir()
    first, last = path.stem.split("-")[1:]
    assert first == "4"
    states = (tmp_path / "run/checkpoints").glob("step-*/state.json")
    assert int(last) == max(json.loads(state.read_text())["step"] for state in states)


def test_a_training_too_short_to_record_leaves_nothing(tmp_path):
    with StepTrace(tmp_path, 5) as trace:
        for step in (1, 2, 3):
            trace.done(step)
    assert trace.path is None
    assert not (tmp_path / FOLDER).exists()
