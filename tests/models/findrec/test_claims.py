"""What FindRec is for, on planted data whose answers are known; each model is trained once, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planted import Silent, make_config
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.inspect.inspect import relative_change
from findrec.evaluation.metrics.metrics import Ranks
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.validation import validate
from findrec.models.capabilities import withhold
from findrec.models.findrec.explain import item_shares
from findrec.tables.base import ITEMS
from findrec.training.build import build_catalogue, build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

GROUPS, EACH, COLD = 8, 14, 2  # the last COLD items of each group have no training events
NUM_ITEMS = GROUPS * EACH
DIM, LAST = 32, 8  # width of vectors; events of the histories that are explained

Array = NDArray[Any]


def group_histories(rng: np.random.Generator, num_users: int, cold: float) -> list[Any]:
    """Users stay with a group of items, and mostly go from an item to its successor there.

    Items have popularities that fall as 1 / rank, so some are rare. In a share `cold` of the users the last
    event, which is the test target, is one of the group's cold items.
    """
    warm = EACH - COLD
    popularity = 1 / np.arange(1, warm + 1)
    popularity /= popularity.sum()
    follows = rng.choice(warm, size=(GROUPS, warm), p=popularity)
    histories = []
    for _ in range(num_users):
        group = int(rng.integers(GROUPS))
        items = [int(rng.choice(warm, p=popularity))]
        for _ in range(int(rng.integers(8, 16))):
            chained = rng.random() < 0.6
            items.append(int(follows[group, items[-1]] if chained else rng.choice(warm, p=popularity)))
        if rng.random() < cold:
            items.append(warm + int(rng.integers(COLD)))
        histories.append(group * EACH + np.array(items) + 1)
    return histories


def write_groups(path: Path, *, cold: float = 0.0, useless: bool = False) -> DataFolder:
    """Texts tell the group, and the item within it; useless ones tell nothing that relates items."""
    rng = np.random.default_rng(0)
    histories = group_histories(rng, 300, cold)
    text = np.repeat(rng.normal(size=(GROUPS, 16)), EACH, axis=0) + 0.5 * rng.normal(size=(NUM_ITEMS, 16))
    if useless:
        text = rng.normal(size=(NUM_ITEMS, 16))
    return write_data_folder(path, histories, features={"text": text}, num_items=NUM_ITEMS)


@dataclass(frozen=True)
class Trained:
    """A trained model with the data it was trained on."""

    model: Any
    rows_Vw: Tensor
    catalogue: Catalogue
    folder: DataFolder

    @property
    def counts(self) -> Array:
        """Training events of each item."""
        return self.folder.train_count

    @property
    def swapped(self) -> Catalogue:
        """The catalogue with the content of each item given to another."""
        return self.catalogue.altered(noise=1.0) if self.catalogue.modalities else self.catalogue

    def ranks(self, catalogue: Catalogue | None = None) -> Ranks:
        """The ranks of the test targets."""
        scorer = ModelScorer(
            self.model, self.rows_Vw, catalogue or self.catalogue, max_length=16, device="cpu", name="model"
        )
        return rank_split(scorer, self.folder, "test", RankingProtocol(users_per_block=100, max_length=16))

    @torch.no_grad()
    def logits(self, catalogue: Catalogue) -> Array:
        """The gates' log-odds of all items."""
        features = catalogue.all_features("cpu")
        items = self.model.items
        weights = items(items.split(self.rows_Vw), items.encode(features), features)[1]
        return weights.logit_n["text"].numpy()

    @torch.no_grad()
    def shares(self, catalogue: Catalogue) -> Array:
        """Shares `[V + 1, 3]` of id, content and memory."""
        return item_shares(self.model, self.rows_Vw, catalogue.all_features("cpu")).numpy()

    def auroc(self) -> float:
        """Probability that true content has a larger gate than wrong content, over items with events."""
        with_events = self.counts > 0
        true_n = self.logits(self.catalogue)[with_events]
        wrong_n = self.logits(self.swapped)[with_events]
        return float((true_n[:, None] > wrong_n[None]).mean())


def ndcg(ranks: Ranks, of_C: Array | None = None) -> float:
    """ndcg@10 of all test targets, or of those selected."""
    gain_C = np.where(ranks.rank <= 10, 1 / np.log2(ranks.rank + 1), 0.0)
    return float(gain_C.mean() if of_C is None else gain_C[of_C].mean())


def rank_correlation(x_n: Array, y_n: Array) -> float:
    """Spearman's; ties have their mean rank."""

    def ranks(values_n: Array) -> Array:
        _, index_n, size_k = np.unique(values_n, return_inverse=True, return_counts=True)
        ranks_n: Array = (np.cumsum(size_k) - (size_k - 1) / 2)[index_n]
        return ranks_n

    return float(np.corrcoef(ranks(x_n), ranks(y_n))[0, 1])


def train(folder: DataFolder, path: Path, *, sampled: bool = False, **model: Any) -> Trained:
    loss = {"kind": "sampled", "negatives": 16} if sampled else {"kind": "exact"}
    tree = make_config(epochs=15, eval_every=15, loss=loss).model_dump(mode="json")
    tree["model"] = {"name": "findrec", "dim": DIM, "dropout": 0.0, "stream": {"layers": 1}, "repeat": False}
    tree["model"] |= model
    config = type(make_config()).model_validate(tree)
    torch.manual_seed(0)
    network, tables = build_tower_model(config, folder), build_tables(config, folder)
    tower = PlainTower(network, config.training.optim)
    run_training(config, folder, path, tower, tables, worker=Worker(), validate=validate, log=Silent())
    return Trained(network.eval(), tables[ITEMS].weight, build_catalogue(config, folder), folder)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # the data, and what is changed
    "whole": ("warm", {}),
    "ids": ("warm", {"modalities": []}),
    "open": ("warm", {"control": {"gates": "open"}}),
    "none": ("warm", {"align": {"kind": "none"}}),
    "marginal": ("warm", {"align": {"kind": "marginal"}}),
    "sampled": ("warm", {"sampled": True}),
    "useless": ("useless", {}),
    "cold": ("cold", {}),
    "cold ids": ("cold", {"modalities": []}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """`trained(name)`: one of `MODELS`, trained when it is first asked for."""
    path = tmp_path_factory.mktemp("claims")
    folders = {
        "warm": write_groups(path / "warm"),
        "useless": write_groups(path / "useless", useless=True),
        "cold": write_groups(path / "cold", cold=0.4),
    }

    @cache
    def of_name(name: str) -> Trained:
        data, changes = MODELS[name]
        return train(folders[data], path / name, **changes)

    return of_name


def test_swapped_content_is_noticed_and_survived(trained: Callable[[str], Trained]) -> None:
    whole, opened = trained("whole"), trained("open")
    ids = ndcg(trained("ids").ranks())
    assert whole.auroc() > 0.95
    assert ndcg(whole.ranks(whole.swapped)) > 0.9 * ids
    assert ndcg(opened.ranks()) > 0.9 * ids  # until its content is swapped
    assert ndcg(opened.ranks(opened.swapped)) < 0.75 * ids


@pytest.mark.parametrize("kind", ["none", "marginal"])
def test_only_the_conditional_alignment_lets_gates_notice(
    trained: Callable[[str], Trained], kind: str
) -> None:
    whole, other = trained("whole"), trained(kind)
    assert ndcg(other.ranks()) > 0.9 * ndcg(whole.ranks())  # it learns as well as any
    assert other.auroc() < whole.auroc() - 0.15
    assert ndcg(other.ranks(other.swapped)) < 0.8 * ndcg(whole.ranks(whole.swapped))


def test_items_without_events_are_found_by_content(trained: Callable[[str], Trained]) -> None:
    whole, ids = trained("cold"), trained("cold ids")
    chance = 10 / NUM_ITEMS
    cold_C = whole.counts[whole.ranks().target] == 0
    assert cold_C.sum() > 60

    def recall(ranks: Ranks) -> float:
        return float((ranks.rank[cold_C] <= 10).mean())

    assert recall(whole.ranks()) > 4 * chance
    assert recall(ids.ranks()) < 2 * chance
    assert recall(whole.ranks(whole.swapped)) < 2 * chance  # it is the content that finds them
    assert ndcg(whole.ranks(), ~cold_C) > 0.9 * ndcg(ids.ranks(), ~cold_C)  # at no one's expense


def test_a_useless_modality_does_no_harm(trained: Callable[[str], Trained]) -> None:
    """It is ignored in the ranking, although it takes a share of the item vectors."""
    useless = trained("useless")
    assert ndcg(useless.ranks()) > 0.95 * ndcg(trained("ids").ranks())
    for other in (useless.swapped, useless.catalogue.altered(missing=1.0)):
        assert ndcg(useless.ranks(other)) > 0.95 * ndcg(useless.ranks())


def test_ids_gain_share_with_events(trained: Callable[[str], Trained]) -> None:
    """With a sampled loss, whose steps update only the rows that they look up.

    With the exact loss every step of Adam moves every row, by a length that hardly depends on the number of
    events of its item, and neither does the share of the id.
    """
    model = trained("sampled")
    with_events = model.counts > 0
    count_n, id_n = model.counts[with_events], model.shares(model.catalogue)[with_events, 0]
    assert rank_correlation(id_n, count_n) > 0.4
    assert id_n[count_n >= 80].mean() > 1.2 * id_n[count_n <= 10].mean()


def test_content_decides_for_rare_items_and_ids_count_with_events(trained: Callable[[str], Trained]) -> None:
    """By what the ranking of targets loses without ids, and without content and the memory of it."""
    whole = trained("whole")
    ranks = whole.ranks()
    no_ids, no_memory = whole.rows_Vw.clone(), whole.rows_Vw.clone()
    no_ids[:, :DIM] *= 1e-6  # not zero: the items remain known
    no_memory[:, DIM:] = 0
    without_ids = replace(whole, rows_Vw=no_ids).ranks()
    without_content = replace(whole, rows_Vw=no_memory).ranks(whole.catalogue.altered(missing=1.0))
    count_C = whole.counts[ranks.target]
    share_of_ids = []
    for of_C in (count_C <= 20, count_C > 80):
        assert of_C.sum() > 30
        by_ids = ndcg(ranks, of_C) - ndcg(without_ids, of_C)
        by_content = ndcg(ranks, of_C) - ndcg(without_content, of_C)
        assert by_content > 0.1
        share_of_ids.append(by_ids / (by_ids + by_content))
    rare, frequent = share_of_ids
    assert rare < 0.4
    assert frequent > rare + 0.1


def test_occlusion_agrees_with_the_shares_where_some_content_is_wrong(
    trained: Callable[[str], Trained],
) -> None:
    """Only there: true content that is missing is replaced by an equal memory, so little changes."""
    whole = trained("cold")
    catalogue = whole.catalogue.altered(noise=0.5)
    features = catalogue.all_features("cpu")
    with torch.no_grad():
        vector_Vd = whole.model.item_transform(whole.rows_Vw, features)
        without_Vd = whole.model.item_transform(whole.rows_Vw, withhold(features, ["text"]))
    change_V = ((vector_Vd - without_Vd).norm(dim=1) / vector_Vd.norm(dim=1).clamp(min=1e-9)).numpy()
    share_V = whole.shares(catalogue)[:, 1]
    with_events = whole.counts > 0
    assert rank_correlation(share_V[1:], change_V[1:]) > 0.75
    assert rank_correlation(share_V[with_events], change_V[with_events]) > 0.6

    histories = group_histories(np.random.default_rng(1), 200, cold=0.4)
    item = torch.from_numpy(np.stack([history[-LAST:] for history in histories]))
    users, last = torch.arange(len(item)), torch.arange(LAST - 1, item.numel(), LAST)
    batch = Batch.build(item, torch.full_like(users, LAST), users, last, torch.ones_like(users))
    result = whole.model.explain(batch, whole.rows_Vw[batch.ids], catalogue.features(batch.ids))
    change_T = relative_change(result.whole, result.without["text"]).detach().numpy()
    share_T = result.gates_THE[:, 0, 1].detach().numpy()
    assert rank_correlation(share_T, change_T) > 0.75
