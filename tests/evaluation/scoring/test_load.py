"""A model is ranked by the scorer that its configuration names, in validation and from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import NUM_ITEMS, planted_folder, planted_run

from findrec.config import parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.metrics.metrics import summarise
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.load import load_ranker, load_scorer, scorer_class
from findrec.evaluation.scoring.users import UserBlock
from findrec.models.configs import choose_model
from findrec.serving.recommender import Recommender
from findrec.tables.placement import place_table
from findrec.training.checkpoints.checkpoint import load_checkpoint
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.runs import main_job, read_run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return planted_folder(tmp_path_factory.mktemp("load") / "data", num_users=60)


@pytest.mark.parametrize("name", ["TwoInterests", "Distance"])
def test_validation_and_evaluation_rank_by_the_scorer_of_the_model(
    folder: DataFolder, tmp_path: Path, name: str
) -> None:
    """Both are compared with scores of all items that are computed here, from the checkpoint."""
    run = planted_run(tmp_path / "run", folder, {"name": f"toy_models:{name}", "dim": 16}, {"epochs": 2})
    config = read_run_config(run)
    job = main_job(config, run)
    path = best_checkpoint_path(run / "checkpoints")
    assert path is not None
    saved = load_checkpoint(path)
    protocol = RankingProtocol.of(config, folder)
    ranks = rank_split(load_ranker(job, folder), folder, "valid", protocol)
    table, weight, bias = saved.table["weight"], saved.tower["follow.weight"], saved.tower["follow.bias"]
    for user, target, greater, equal in zip(
        ranks.user, ranks.target, ranks.greater, ranks.equal, strict=True
    ):
        history = UserBlock.read(folder, "valid", ranks.user[ranks.user == user][:1], 16).item
        h_d = weight @ table[int(history[-1])] + bias
        if name == "Distance":
            scores = -torch.cdist(h_d[None].double(), table.double())[0].float()
        else:
            scores = (table @ h_d.view(2, -1).T).amax(1)
        others = torch.cat([scores[1:target], scores[target + 1 :]])
        assert greater == int((others > scores[target]).sum())
        assert equal == int((others == scores[target]).sum())
    row = summarise(ranks, folder, "valid", protocol, model=name)
    assert row["ndcg@10"] == pytest.approx(saved.state.best)


def test_a_model_without_user_vectors_is_not_served_by_them(folder: DataFolder, tmp_path: Path) -> None:
    run = planted_run(tmp_path / "run", folder, {"name": "toy_models:Distance", "dim": 8}, {"epochs": 1})
    with pytest.raises(FindRecError, match="DistanceScorer, but this needs a model with user vectors"):
        load_scorer(main_job(read_run_config(run), run), folder)


def test_lists_are_those_of_the_scorer_of_the_model(folder: DataFolder, tmp_path: Path) -> None:
    run = planted_run(tmp_path / "run", folder, {"name": "toy_models:Distance", "dim": 8}, {"epochs": 1})
    path = best_checkpoint_path(run / "checkpoints")
    assert path is not None
    saved = load_checkpoint(path)
    table = saved.table["weight"]
    users = folder.user_ids[:3]
    for user, one in zip(range(3), Recommender.load(run).recommend(users, k=4), strict=True):
        h_d = saved.tower["follow.weight"] @ table[int(folder.histories([user]).item[-1])]
        distance = torch.cdist((h_d + saved.tower["follow.bias"])[None].double(), table[1:].double())[0]
        nearest = (distance.argsort()[:4] + 1).tolist()
        assert [int(item) for item in one.items] == [int(folder.items["raw"][v - 1].as_py()) for v in nearest]


def test_scorers_that_cannot_validate_are_refused() -> None:
    with pytest.raises(FindRecError, match="lists of 9 items, but validation needs 10"):
        scorer_class(choose_model("toy_models:ShortListsModel"))
    with pytest.raises(FindRecError, match="needs a SequenceModel, but toy_models:TwoTables is not one"):
        scorer_class(choose_model("toy_models:TwoTables"))


def test_a_table_is_not_sharded_under_another_scorer() -> None:
    tree = {"model": {"name": "toy_models:Distance"}, "training": {"table": "sharded"}}
    with pytest.raises(FindRecError, match="DistanceScorer needs all rows"):
        place_table(parse_config(tree), NUM_ITEMS, 8, 2, content=False)
