"""All stages end to end: what each learns, what it hands over, and new items served from their content."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from findrec.config import RunConfig, parse_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.scoring.load import load_scorer
from findrec.evaluation.validation import validate
from findrec.models.mufasa.config import FusionConfig
from findrec.models.mufasa.fusion_stage import collapse_warnings
from findrec.models.mufasa.item_pairs import ItemPairExamples
from findrec.models.mufasa.model import Mufasa
from findrec.models.parts.artifacts import artifact_rows, artifact_weights
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.validations import find_artifacts
from findrec.training.loop import run_training
from findrec.training.runs import TrainingJob, training_jobs
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

CLUSTERS, EACH, COLD = 6, 8, 2  # clusters of items, items of each, those of them without training events
NUM_ITEMS = CLUSTERS * EACH


def cluster(item: int) -> int:
    return (item - 1) // EACH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Clusters follow each other in turn, and texts and images tell the cluster; some items are new."""
    rng = np.random.default_rng(0)
    histories = []
    for _ in range(120):
        start = int(rng.integers(CLUSTERS))
        turns = (start + np.arange(int(rng.integers(10, 16)))) % CLUSTERS
        items = turns * EACH + rng.integers(EACH - COLD, size=len(turns)) + 1
        new = ((turns[-1] + 1) % CLUSTERS) * EACH + EACH - int(rng.integers(COLD))
        histories.append(np.append(items, new))  # the last event is the test
    of_item = np.arange(NUM_ITEMS) // EACH
    centres = {"text": rng.normal(size=(CLUSTERS, 12)), "image": rng.normal(size=(CLUSTERS, 8))}
    features = {
        name: (centre[of_item] + 0.2 * rng.normal(size=(NUM_ITEMS, centre.shape[1]))).astype(np.float32)
        for name, centre in centres.items()
    }
    features["image"][::7] = np.nan
    path: Path = tmp_path_factory.mktemp("clusters") / "data"
    return write_data_folder(path, histories, features=features, num_items=NUM_ITEMS)


def make_config(folder: DataFolder, **model: Any) -> RunConfig:
    system = {
        "name": "mufasa",
        "dim": 16,
        "dropout": 0.0,
        "repeat": False,
        "layers": 1,
        "heads": 2,
        "groups": 1,
        "fusion": {"dim": 16, "epochs": 20, "reach": 1},
        "collaborative_epochs": 10,
    }
    tree = {
        "data": {"max_length": 16, "folder": str(folder.path)},
        "model": system | model,
        "training": {"epochs": 8, "microbatches": 2, "tokens": 256, "optim": {"lr": 0.01}},
        "evaluation": {"baselines": []},
        "tracking": {"enabled": False},
    }
    return parse_config(tree)


class Log:
    """The logged values of all steps."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.steps.append(dict(values))

    def curve(self, key: str) -> list[float]:
        return [values[key] for values in self.steps if key in values]


def train_jobs(config: RunConfig, folder: DataFolder, root: Path) -> tuple[list[TrainingJob], dict[str, Log]]:
    """Train all stages as a worker does."""
    jobs, logs = training_jobs(config, root), {}
    for job in jobs:
        torch.manual_seed(0)
        artifacts = find_artifacts(job.config, job.needs)
        tower = PlainTower(build_tower_model(job.config, folder, artifacts), job.config.training.optim)
        log = logs[job.name] = Log()
        run_training(
            job.config,
            folder,
            job.folder / "checkpoints",
            tower,
            build_tables(job.config, folder),
            worker=Worker(),
            validate=validate,
            log=log,
            earlier=None if job.continues is None else artifacts[job.continues],
        )
    return jobs, logs


@pytest.fixture(scope="module")
def trained(
    folder: DataFolder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[TrainingJob], dict[str, Log]]:
    return train_jobs(make_config(folder), folder, tmp_path_factory.mktemp("run"))


Trained = tuple[list[TrainingJob], dict[str, Log]]


def test_stages_and_what_they_need(folder: DataFolder) -> None:
    jobs = training_jobs(make_config(folder), Path("run"))
    assert [job.name for job in jobs] == ["mufasa/collaborative", "mufasa/fusion", "mufasa"]
    assert [list(job.needs) for job in jobs] == [[], ["collaborative"], ["fusion"]]
    assert [job.config.training.epochs for job in jobs] == [10, 20, 8]
    assert [job.ranked for job in jobs] == [False, False, True]
    without = make_config(folder, fusion={"losses": {"collaborative": 0}})
    assert [job.name for job in training_jobs(without, Path("run"))] == ["mufasa/fusion", "mufasa"]


LOSSES = ("anchor", "collaborative", "structure", "distribution")


def test_each_loss_has_a_curve(trained: Trained) -> None:
    """The logged loss is their weighted sum, and falls."""
    log = trained[1]["mufasa/fusion"]
    weights = dict(zip(LOSSES, (1.0, 0.5, 0.5, 0.1), strict=True))
    total = log.curve("train/loss")
    for step, values in enumerate(total):
        parts = sum(weight * log.curve(f"aux/{name}")[step] for name, weight in weights.items())
        assert values == pytest.approx(parts, rel=1e-4)
    assert sum(total[-5:]) < 0.9 * sum(total[:5])


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone_falls(trained: Trained, folder: DataFolder, name: str) -> None:
    losses = dict.fromkeys(LOSSES, 0.0) | {name: 1.0}
    config = make_config(folder, fusion={"dim": 16, "epochs": 15, "reach": 1, "losses": losses})
    curve = train_fusion(config, folder, trained[0][1].needs).curve(f"aux/{name}")
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])


def train_fusion(config: RunConfig, folder: DataFolder, needs: Mapping[str, Path]) -> Log:
    """The stage of fusion alone, with vectors of a collaborative stage if it needs some."""
    job = next(job for job in training_jobs(config, Path("run")) if job.name == "mufasa/fusion")
    torch.manual_seed(0)
    artifacts = find_artifacts(config, needs) if job.needs else {}
    tower, log = PlainTower(build_tower_model(job.config, folder, artifacts), config.training.optim), Log()
    with tempfile.TemporaryDirectory() as checkpoints:
        run_training(
            job.config,
            folder,
            Path(checkpoints),
            tower,
            build_tables(job.config, folder),
            worker=Worker(),
            validate=validate,
            log=log,
        )
    return log


def test_streams_do_not_collapse(trained: Trained) -> None:
    """The spread of each stream stays above a tenth of what it was at first; ranks are logged."""
    curves = trained[1]["mufasa/fusion"]
    for stream in ("text", "image", "fused"):
        std = curves.curve(f"diagnostics/std_{stream}")
        assert min(std) > 0.1 * std[0]
        assert curves.curve(f"diagnostics/rank_{stream}")[-1] > 2
    assert collapse_warnings(curves.steps[-1]) == []


def test_collapsed_streams_are_told() -> None:
    values = {"diagnostics/std_text": 0.05, "diagnostics/rank_fused": 1.2, "diagnostics/std_fused": 0.9}
    messages = dict(collapse_warnings(values))
    assert set(messages) == {"diagnostics/std_text", "diagnostics/rank_fused"}
    assert "'text' have collapsed to a point" in messages["diagnostics/std_text"]
    assert "'fused' have collapsed to a line" in messages["diagnostics/rank_fused"]


def test_vectors_of_co_consumption_tell_which_clusters_follow(trained: Trained) -> None:
    jobs, _ = trained
    rows = artifact_rows(find_artifacts(jobs[1].config, jobs[1].needs)["collaborative"])
    unit = torch.nn.functional.normalize(rows, dim=1)
    warm = [v for v in range(1, NUM_ITEMS + 1) if (v - 1) % EACH < EACH - COLD]

    def cosine(turns: int) -> float:
        pairs = [(a, b) for a in warm for b in warm if (cluster(b) - cluster(a)) % CLUSTERS == turns]
        return sum(float(unit[a] @ unit[b]) for a, b in pairs) / len(pairs)

    assert cosine(1) > cosine(3) + 0.2


@pytest.mark.parametrize("tuning", ["frozen", "tuned"])
def test_the_sequence_model_starts_from_the_fusion_stage(
    trained: Trained, folder: DataFolder, tuning: str
) -> None:
    jobs, _ = trained
    artifacts = find_artifacts(jobs[2].config, jobs[2].needs)
    saved = artifact_weights(artifacts["fusion"], "fusion.")
    config = make_config(folder, tuning=tuning)
    model = build_tower_model(config, folder, artifacts)
    assert isinstance(model, Mufasa)
    state = model.fusion.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert bool(list(model.fusion.parameters())) == (tuning == "tuned")
    fresh = build_tower_model(config, folder)
    assert not torch.equal(fresh.state_dict()["fusion.missing"], saved["missing"])


def test_frozen_fusion_is_unchanged_by_training_and_saved_with_the_model(trained: Trained) -> None:
    jobs, _ = trained
    before = artifact_weights(find_artifacts(jobs[2].config, jobs[2].needs)["fusion"], "fusion.")
    best = find_artifacts(jobs[2].config, {"": jobs[2].folder})[""]
    after = artifact_weights(best, "fusion.")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_new_items_are_ranked_by_their_content(trained: Trained, folder: DataFolder) -> None:
    """Items without any training event: those of the cluster that follows are ahead of all other new ones."""
    jobs, _ = trained
    scorer = load_scorer(jobs[2], folder)
    new = [v for v in range(1, NUM_ITEMS + 1) if folder.train_count[v] == 0]
    assert len(new) == CLUSTERS * COLD
    model = scorer.model
    saved = artifact_rows(find_artifacts(jobs[2].config, {"": jobs[2].folder})[""])
    assert not saved[new].any()
    catalogue = Catalogue(folder, list(folder.modalities))
    vectors = model.item_vectors(saved, catalogue)
    right = 0
    users = next(iter(folder.blocks()))
    for user in range(40):
        begin, end = users.offset[user], users.offset[user + 1]
        items = users.item[begin : end - 1]
        score = user_vector(model, items, saved, catalogue) @ vectors[new].T
        wanted = (cluster(int(items[-1])) + 1) % CLUSTERS
        right += cluster(new[int(score.argmax())]) == wanted
    assert right >= 32


@torch.no_grad()
def user_vector(model: Any, items: Any, rows: torch.Tensor, catalogue: Catalogue) -> torch.Tensor:
    item = torch.from_numpy(np.asarray(items, dtype=np.int64))[None]
    last = torch.tensor([item.shape[1] - 1])
    batch = Batch.build(item, last + 1, torch.zeros(1, dtype=torch.int64), last, last[:0])
    vector: torch.Tensor = model.eval()(batch, rows[batch.ids], catalogue.features(batch.ids)).h[0]
    return vector


def test_a_joint_stage_continues_the_frozen_one(folder: DataFolder, tmp_path: Path) -> None:
    """It starts as good as the stage before it ended, and trains the fusion layer too."""
    fusion = {"dim": 16, "epochs": 2, "losses": {"collaborative": 0}}
    config = make_config(folder, tuning="tuned", sequences={"epochs": 4, "lr": 0.02}, fusion=fusion)
    training = config.training.model_copy(update={"epochs": 1})
    config = config.model_copy(update={"training": training})
    jobs, logs = train_jobs(config, folder, tmp_path)
    assert [job.name for job in jobs] == ["mufasa/fusion", "mufasa/sequences", "mufasa"]
    assert [job.ranked for job in jobs] == [False, True, True]
    assert [job.config.training.optim.lr for job in jobs] == [0.02, 0.02, 0.01]
    assert jobs[0].config.training.tokens == FusionConfig().items
    first, joint = (logs[name].curve("train/loss") for name in ("mufasa/sequences", "mufasa"))
    assert joint[0] < (first[0] + first[-1]) / 2
    artifacts = find_artifacts(config, jobs[2].needs | {"": jobs[2].folder})
    stages = [artifact_weights(artifacts[name], "fusion.") for name in ("fusion", "sequences", "")]
    assert torch.equal(stages[0]["gate.weight"], stages[1]["gate.weight"])
    assert not torch.equal(stages[1]["gate.weight"], stages[2]["gate.weight"])


def test_partners_are_close_in_the_training_events_of_one_user(folder: DataFolder) -> None:
    config = make_config(folder)
    job = training_jobs(config, Path("run"))[1]
    source = ItemPairExamples(job.config, folder, reach=2)
    allowed: dict[int, set[int]] = {}
    for block in folder.blocks():
        for user in range(len(block.offset) - 1):
            items = block.item[block.offset[user] : block.offset[user] + folder.valid_start[user]]
            for t, item in enumerate(items):
                near = items[max(0, t - 2) : t + 3]
                allowed.setdefault(int(item), set()).update(int(v) for v in near)
    drawn = 0
    for epoch in range(20):
        (pairs,) = source.read(epoch, [np.arange(NUM_ITEMS)])
        for item, partner in zip(pairs.item.tolist(), pairs.partner.tolist(), strict=True):
            assert partner == 0 or (partner != item and partner in allowed[item])
            drawn += partner > 0
        assert (pairs.partner[torch.from_numpy(folder.train_count)[pairs.item] == 0] == 0).all()
    assert drawn > 0.6 * 20 * NUM_ITEMS * (EACH - COLD) / EACH
    (again,) = source.read(3, [np.arange(NUM_ITEMS)])
    (same,) = source.read(3, [np.arange(NUM_ITEMS)])
    assert torch.equal(again.partner, same.partner)


@pytest.mark.parametrize(
    "losses",
    [
        {"collaborative": 0},
        {"anchor": 0},
        {"structure": 0, "distance": "mmd"},
        {"distribution": 0, "same_genre": 0.5},
    ],
)
@pytest.mark.parametrize("anchor", ["text", "image", "mean"])
def test_ablations_of_the_fusion_stage_train(
    trained: Trained, folder: DataFolder, losses: dict[str, Any], anchor: str
) -> None:
    config = make_config(folder, anchor=anchor, fusion={"dim": 8, "epochs": 1, "losses": losses})
    log = train_fusion(config, folder, trained[0][1].needs)
    left_out = {name for name, weight in losses.items() if weight == 0}
    logged = {key.rpartition("/")[2] for values in log.steps for key in values}
    assert set(LOSSES) & logged == set(LOSSES) - left_out
