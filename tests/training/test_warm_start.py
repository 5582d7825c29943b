"""A run that starts from another run's weights on a grown catalogue, and when it may not."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted import NUM_ITEMS, make_config

from findrec.config import parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.validation import validate
from findrec.tables.base import ITEMS
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import checkpoint_folder, latest_checkpoint, read_state
from findrec.training.checkpoints.validations import best_checkpoint
from findrec.training.identity import catalogue_fingerprint
from findrec.training.loop import run_training
from findrec.training.runs import open_run_folder, training_jobs
from findrec.training.tower import PlainTower
from findrec.training.warm_start import find_warm_start
from findrec.training.worker import Worker

NEW = 5  # items that the grown catalogue has beside


def histories(num_items, num_users, seed=0):
    """The next item is a fixed permutation of the first 60 ids; new ones lie in between now and then."""
    rng = np.random.default_rng(seed)
    follows = np.random.default_rng(0).permutation(NUM_ITEMS) + 1
    made = []
    for _ in range(num_users):
        items = [int(rng.integers(NUM_ITEMS)) + 1]
        for _ in range(int(rng.integers(8, 20))):
            items.append(int(follows[items[-1] - 1]))
        if num_items > NUM_ITEMS:
            items.insert(3, int(rng.integers(NUM_ITEMS, num_items)) + 1)
        made.append(items)
    return made


def features(num_items, widths=(12, 8)):
    text, image = (np.random.default_rng(1).normal(size=(NUM_ITEMS + NEW, w)) for w in widths)
    return {"text": text[:num_items], "image": image[:num_items]}


@pytest.fixture(scope="module")
def old_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "data"
    return write_data_folder(path, histories(NUM_ITEMS, 100), features=features(NUM_ITEMS))


@pytest.fixture(scope="module")
def new_data(tmp_path_factory):
    size = NUM_ITEMS + NEW
    path = tmp_path_factory.mktemp("new") / "data"
    return write_data_folder(path, histories(size, 100, seed=2), features=features(size))


def config_in(home, name, model=None, **training):
    tree = make_config(**{"epochs": 1} | training).model_dump()
    tree |= {"name": name, "runs": str(home), "tracking": {"enabled": False}}
    tree["model"] |= model or {}
    return parse_config(json.loads(json.dumps(tree)))


class Log:
    def __init__(self):
        self.losses = []

    def log(self, step, epoch, values):
        if "train/loss" in values:
            self.losses.append(values["train/loss"])


def parts(config, data):
    torch.manual_seed(config.training.seed)
    return PlainTower(build_tower_model(config, data), config.training.optim), build_tables(config, data)[
        ITEMS
    ]


def train(config, data):
    folder = open_run_folder(config)
    (job, *_) = training_jobs(config, folder)
    tower, table = parts(job.config, data)
    run_training(
        job.config, data, checkpoint_folder(folder), tower, {ITEMS: table}, worker=Worker(), validate=validate
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory, old_data):
    """A folder of runs with a finished one, `yesterday`."""
    home = tmp_path_factory.mktemp("runs")
    train(config_in(home, "yesterday", epochs=6), old_data)
    return home


def test_known_rows_and_weights_are_taken_over(home, new_data, tmp_path):
    saved = best_checkpoint(home / "yesterday/checkpoints")
    config = config_in(home, "tomorrow", warm_start="yesterday")
    fresh_tower, fresh_table = parts(config, new_data)
    captured = {}

    def capture(state):
        captured["state"] = state
        captured["tower"] = {k: v.clone() for k, v in tower.model.state_dict().items()}
        captured["table"] = {k: v.clone() for k, v in table.state().items()}
        captured["optimizer_state"] = {k: v.clone() for k, v in tower.optimizer_state().items()}

    tower, table = parts(config, new_data)
    log = Log()
    run_training(
        config,
        new_data,
        tmp_path / "checkpoints",
        tower,
        {ITEMS: table},
        worker=Worker(),
        validate=validate,
        log=log,
        on_start=capture,
    )
    assert all(torch.equal(captured["tower"][name], value) for name, value in saved.tower.items())
    rows = captured["table"]["weight"]
    assert torch.equal(rows[: NUM_ITEMS + 1], saved.table["weight"])
    assert torch.equal(rows[NUM_ITEMS + 1 :], fresh_table.weight[NUM_ITEMS + 1 :])
    assert rows[NUM_ITEMS + 1 :].abs().sum() > 0
    assert not captured["table"]["exp_avg"].any()
    assert not any(value.any() for value in captured["optimizer_state"].values())
    cold_log = Log()
    cold_config = config_in(home, "cold")
    run_training(
        cold_config,
        new_data,
        tmp_path / "cold",
        fresh_tower,
        {ITEMS: fresh_table},
        worker=Worker(),
        validate=validate,
        log=cold_log,
    )
    assert log.losses[0] < 0.7 * cold_log.losses[0]  # it knows what follows what
    written = read_state(latest_checkpoint(tmp_path / "checkpoints"))
    assert "yesterday/checkpoints/step-" in written.started_from
    assert captured["state"].started_from == written.started_from
    assert captured["state"].step == 0
    assert read_state(latest_checkpoint(tmp_path / "cold")).started_from == ""


def test_a_fresh_optimizer_is_one_that_never_stepped(home, new_data, tmp_path):
    """Loading zero moments at step 0 trains bit for bit as a new optimizer with the same weights does."""
    config = config_in(home, "zero", warm_start="yesterday")
    warm, warm_table = parts(config, new_data)
    run_training(
        config, new_data, tmp_path / "warm", warm, {ITEMS: warm_table}, worker=Worker(), validate=validate
    )
    saved = best_checkpoint(home / "yesterday/checkpoints")
    plain, plain_table = parts(config, new_data)
    plain.model.load_state_dict(saved.tower)
    plain_table.weight[: NUM_ITEMS + 1] = saved.table["weight"]
    cold = config_in(home, "zero2")
    run_training(
        cold, new_data, tmp_path / "plain", plain, {ITEMS: plain_table}, worker=Worker(), validate=validate
    )
    assert torch.equal(warm_table.weight, plain_table.weight)


def test_an_interrupted_warm_run_goes_on_from_its_own_checkpoint(home, new_data, tmp_path):
    config = config_in(home, "resumed", warm_start="yesterday", epochs=2)
    whole, table = parts(config, new_data)
    run_training(config, new_data, tmp_path / "a", whole, {ITEMS: table}, worker=Worker(), validate=validate)
    newest = latest_checkpoint(tmp_path / "a")
    shutil.rmtree(newest)
    away = config_in(tmp_path / "nowhere", "resumed", warm_start="yesterday", epochs=2)
    again, table_again = parts(away, new_data)
    run_training(
        away, new_data, tmp_path / "a", again, {ITEMS: table_again}, worker=Worker(), validate=validate
    )  # the source is not needed
    assert torch.equal(table.weight, table_again.weight)
    assert "yesterday" in read_state(latest_checkpoint(tmp_path / "a")).started_from


def test_baselines_start_from_their_own_kind(home, old_data, new_data):
    def sasrec(name, **training):
        config = config_in(home, name, **training)
        job = training_jobs(config, home / name)[1]
        assert job.name == "sasrec"
        return job

    assert find_warm_start(sasrec("cold").config, new_data) is None
    assert find_warm_start(sasrec("lone", warm_start="yesterday").config, new_data) is None  # it trained none
    open_run_folder(config_in(home, "both"))
    before = sasrec("both")
    tower, table = parts(before.config, old_data)
    run_training(
        before.config,
        old_data,
        checkpoint_folder(before.folder),
        tower,
        {ITEMS: table},
        worker=Worker(),
        validate=validate,
    )
    start = find_warm_start(sasrec("next", warm_start="both").config, new_data)
    assert start is not None
    assert "both/baselines/sasrec/checkpoints" in start.title


def renamed(data, path, names):
    """The same folder with other raw ids."""
    shutil.copytree(data.path, path)
    items = pq.read_table(path / "items.parquet")
    place = items.column_names.index("raw")
    pq.write_table(items.set_column(place, "raw", [names]), path / "items.parquet")
    return DataFolder.open(path, verify=False)


def test_refusals(home, old_data, new_data, tmp_path):
    def refused(told, data=new_data, name="refused", model=None, **training):
        config = config_in(home, name, model, **{"warm_start": "yesterday"} | training)
        with pytest.raises(FindRecError, match=told):
            find_warm_start(config, data)

    refused("no run called 'yestreday'.*did you mean 'yesterday'", warm_start="yestreday")
    refused("is this run itself", name="yesterday")
    refused(r"another model \(model\.dim: 32 there, 16 here", model={"dim": 16})
    refused(r"model\.repeat: True there, False here", model={"repeat": False})
    refused(r"training\.loss\.classes", loss={"classes": "trained"})
    open_run_folder(config_in(home, "untrained"))
    refused("no usable checkpoint", warm_start="untrained")
    names = [str(v) for v in range(1, NUM_ITEMS + NEW + 1)]
    refused("are not the items", renamed(new_data, tmp_path / "swapped", [names[1], names[0], *names[2:]]))
    refused("are not the items", renamed(new_data, tmp_path / "run on", ["12", "", *names[2:]]))
    small = write_data_folder(tmp_path / "small", [[1, 2, 3]] * 9, features=features(3))
    refused("the first 60 of the 3 items", small)
    wide = features(NUM_ITEMS, (9, 8))
    refused("have the shape", write_data_folder(tmp_path / "wide", histories(NUM_ITEMS, 9), features=wide))
    later = renamed(new_data, tmp_path / "later", [*names[:NUM_ITEMS], "a", "b", "c", "d", "e"])
    config = config_in(home, "fine", {"dropout": 0.5}, warm_start="yesterday")
    assert find_warm_start(config, later) is not None  # later items do not matter
    marks = [catalogue_fingerprint(config, data, NUM_ITEMS)["items"] for data in (old_data, new_data, later)]
    assert marks[0] == marks[1] == marks[2]


def test_a_run_of_another_encoder_is_refused(home, new_data):
    state = next((home / "yesterday/checkpoints").glob("step-*")) / "state.json"
    assert json.loads(state.read_text())["catalogue"]["encoders"] == {"text": "given", "image": "given"}
    entries = [e.model_copy(update={"weights_sha256": "f" * 64}) for e in new_data.manifest.features]
    other = DataFolder(new_data.path, new_data.manifest.model_copy(update={"features": entries}))
    with pytest.raises(FindRecError, match="trained with the encoders"):
        find_warm_start(config_in(home, "encoder", warm_start="yesterday"), other)
