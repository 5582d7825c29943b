"""Training end to end on planted data, in one process: it learns, it repeats, it resumes bit for bit."""

import numpy as np
import pytest
import torch
from planted import make_config, planted_folder

from findrec.baseline_configs import BASELINES
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import DivergedError, FindRecError
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split, summarise
from findrec.evaluation.scoring.baselines import make_baseline
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.validation import validate
from findrec.models.configs import choose_model
from findrec.tables.base import ITEMS
from findrec.training import loop
from findrec.training.build import build_catalogue, build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import latest_checkpoint, load_checkpoint
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker


class Log:
    def __init__(self):
        self.lines = []

    def log(self, step, epoch, values):
        self.lines.append((step, epoch, dict(values)))

    def losses(self):
        return [v["train/loss"] for _, _, v in self.lines if "train/loss" in v]

    def epoch_losses(self):
        return [v["train/epoch_loss"] for _, _, v in self.lines if "train/epoch_loss" in v]


def train(config, folder, checkpoints, after_epoch=None, log=None):
    torch.manual_seed(config.training.seed)
    model = build_tower_model(config, folder)
    table = build_tables(config, folder)[ITEMS]
    log = log or Log()
    run_training(
        config,
        folder,
        checkpoints,
        PlainTower(model, config.training.optim),
        {ITEMS: table},
        worker=Worker(),
        validate=validate,
        log=log,
        after_epoch=after_epoch,
    )
    return model, table, log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return planted_folder(tmp_path_factory.mktemp("planted") / "data")


@pytest.mark.parametrize(
    ("name", "precision"), [("findrec", "float32"), ("sasrec", "float32"), ("findrec", "bfloat16")]
)
def test_learns_a_planted_pattern_that_popularity_cannot(folder, tmp_path, name, precision):
    config = make_config(precision=precision)
    if name != config.model.name:
        other = choose_model({"name": name, "dim": config.model.dim, "dropout": 0.0})
        config = config.model_copy(update={"model": other})
    model, table, log = train(config, folder, tmp_path)
    protocol = RankingProtocol(users_per_block=64, max_length=16, ks=[10])
    scorer = ModelScorer(
        model, table.weight, build_catalogue(config, folder), max_length=16, device="cpu", name="model"
    )
    learnt = summarise(rank_split(scorer, folder, "test", protocol), folder, "test", protocol, model=name)
    popular = make_baseline(BASELINES["popularity"](name="popularity"), folder)
    chance = summarise(
        rank_split(popular, folder, "test", protocol), folder, "test", protocol, model="popularity"
    )
    assert learnt["ndcg@10"] > 0.9
    assert chance["ndcg@10"] < 0.25
    assert log.losses()[-1] < 0.3 * log.losses()[0]


class StoppedError(Exception):
    pass


def test_a_run_cut_short_continues_bit_for_bit(folder, tmp_path):
    config = make_config(epochs=4)
    whole, whole_table, whole_log = train(config, folder, tmp_path / "whole")

    def stop(values, seen=[]):  # noqa: B006 - counts its calls
        seen.append(values)
        if len(seen) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, folder, tmp_path / "cut", after_epoch=stop)
    rest, rest_table, rest_log = train(config, folder, tmp_path / "cut")
    assert torch.equal(whole_table.weight, rest_table.weight)
    for (name, want), got in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(want, got), name
    assert whole_log.losses()[-len(rest_log.losses()) :] == rest_log.losses()
    assert 0 < len(rest_log.losses()) < len(whole_log.losses())


class StopsAt(Log):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def log(self, step, epoch, values):
        super().log(step, epoch, values)
        if step == self.step:
            raise StoppedError


@pytest.mark.parametrize("stop", [4, 9, 14])
def test_inside_an_epoch_it_continues_with_the_very_next_microbatch(folder, tmp_path, stop):
    config = make_config(epochs=3, save_steps=3, microbatches=2, tokens=64)
    whole, whole_table, whole_log = train(config, folder, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(config, folder, tmp_path / "cut", log=StopsAt(stop))
    saved = load_checkpoint(latest_checkpoint(tmp_path / "cut")).state
    assert saved.step == stop // 3 * 3 - 3 * (stop % 3 == 0)
    assert saved.epoch_step > 0
    rest, rest_table, rest_log = train(config, folder, tmp_path / "cut")
    assert rest_log.losses() == whole_log.losses()[saved.step :]
    assert rest_log.epoch_losses() == whole_log.epoch_losses()[saved.epoch :]
    assert torch.equal(whole_table.weight, rest_table.weight)
    for (name, want), got in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(want, got), name


def test_another_plan_cannot_continue_a_checkpoint(folder, tmp_path):
    train(make_config(epochs=1), folder, tmp_path)
    assert latest_checkpoint(tmp_path) is not None
    with pytest.raises(FindRecError, match="another epoch plan"):
        train(make_config(epochs=1, tokens=64), folder, tmp_path)


def test_divergence_stops_with_a_plain_message(folder, tmp_path):
    config = make_config(epochs=30, optim={"lr": 1e30, "clip_tower": 0.0})
    with pytest.raises(DivergedError, match="not finite at step"):
        train(config, folder, tmp_path)


@pytest.mark.parametrize("switch", ["events", "gaps"])
def test_types_of_events_and_time_gaps_are_read_when_switched_on(tmp_path, switch):
    """The next item depends only on the type of the last event, or on the gap before it."""
    rng = np.random.default_rng(0)
    histories, times, events = [], [], []
    for _ in range(120):
        code = rng.integers(4, size=14)  # decides the item that follows
        histories.append((np.append(rng.integers(4), code[:-1]) + 1).tolist())
        events.append([f"type {c}" for c in code] if switch == "events" else ["seen"] * 14)
        times.append(np.cumsum(10**code if switch == "gaps" else np.full(14, 60)).tolist())
    folder = write_data_folder(tmp_path / "data", histories, times, events=events, num_items=4)
    losses = {}
    for on in (False, True):
        config = make_config(epochs=25)
        model = config.model.model_copy(update={switch: on, "repeat": False})
        _, _, log = train(config.model_copy(update={"model": model}), folder, tmp_path / str(on))
        losses[on] = log.losses()[-1]
    assert losses[False] > 1.2  # ln 4 = 1.386: nothing to go by
    assert losses[True] < 0.3


def test_event_types_that_the_data_does_not_have_are_refused(folder):
    config = make_config()
    model = config.model.model_copy(update={"events": True})
    with pytest.raises(FindRecError, match=r"set model\.events=false"):
        build_tower_model(config.model_copy(update={"model": model}), folder)


def test_one_sample_for_each_prefix_learns_the_pattern_too(folder, tmp_path):
    config = make_config(objective="last", epochs=3, tokens=512)
    _, _, log = train(config, folder, tmp_path)
    assert log.losses()[-1] < 0.5 * log.losses()[0]


class Clock:
    """Stands for `time.perf_counter` in the loop: every reading is half a second after the last."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def seconds(log):
    return [v["train/seconds"] for _, _, v in log.lines if "train/seconds" in v]


def validated(log):
    return [epoch for _, epoch, v in log.lines if "valid/ndcg@10" in v]


def test_time_in_steps_ends_a_training_with_a_validation(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.time, "perf_counter", Clock())
    config = make_config(epochs=9, eval_every=4)
    _, _, log = train(config, folder, tmp_path / "whole")
    steps = len(seconds(log)) // 9
    assert seconds(log) == [1.0] * 9 * steps  # from batch to batch
    assert load_checkpoint(latest_checkpoint(tmp_path / "whole")).state.seconds == 0  # the same in all runs
    assert validated(log) == [4, 8, 9]
    limit = 4.5 * steps  # in the fifth epoch, which is completed
    limited = make_config(epochs=9, eval_every=4, max_seconds=limit)
    _, _, log = train(limited, folder, tmp_path / "limited")
    assert validated(log) == [4, 5]
    assert sum(seconds(log)) == 5 * steps > limit
    state = load_checkpoint(latest_checkpoint(tmp_path / "limited")).state
    assert (state.epoch, state.seconds) == (5, 5.0 * steps)
    _, _, log = train(limited, folder, tmp_path / "limited")  # nothing is left
    assert log.lines == []


@pytest.mark.parametrize("stop", [1.5, 2.0])
def test_an_interrupted_training_has_the_same_time(folder, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(loop.time, "perf_counter", Clock())
    config = make_config(epochs=9, eval_every=4, save_steps=1, microbatches=2, tokens=64, max_seconds=50)
    _, _, whole = train(config, folder, tmp_path / "whole")
    per_epoch = whole.lines[-1][0] // validated(whole)[-1]
    with pytest.raises(StoppedError):
        train(config, folder, tmp_path / "cut", log=StopsAt(int(stop * per_epoch)))
    _, _, rest = train(config, folder, tmp_path / "cut")
    assert validated(rest) == validated(whole)
    assert seconds(rest) == seconds(whole)[-len(seconds(rest)) :]
    assert 0 < len(seconds(rest)) < len(seconds(whole))
