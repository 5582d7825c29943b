"""Changes of a configuration: dotted keys, merging, and what another model keeps."""

from __future__ import annotations

import pytest

from findrec.errors import FindRecError
from findrec.evaluation.leaderboard.trees import expand, merge


def test_dotted_keys_are_sections() -> None:
    given = {"training.epochs": 3, "training": {"optim.lr": 0.1}, "evaluation": {"ks": [5]}}
    want = {"training": {"epochs": 3, "optim": {"lr": 0.1}}, "evaluation": {"ks": [5]}}
    assert expand(given, "here") == want
    assert expand({"model": "sasrec", "model.dim": 8}, "here") == {"model": {"name": "sasrec", "dim": 8}}
    assert expand({"model.dim": 8, "model": "sasrec"}, "here") == {"model": {"name": "sasrec", "dim": 8}}


@pytest.mark.parametrize(
    "given", [{"training": 3, "training.epochs": 3}, {"training": 3, "training.optim.lr": 1}]
)
def test_a_key_is_either_a_value_or_a_section(given: dict[str, object]) -> None:
    for order in (given, dict(reversed(given.items()))):
        with pytest.raises(FindRecError, match=r"^here: training.*Leave out one"):
            expand(order, "here")


def test_changes_are_merged_without_touching_the_base() -> None:
    base = {"training": {"epochs": 3, "optim": {"lr": 0.1, "clip_tower": 1}}, "evaluation": {"ks": [5, 10]}}
    changed = merge(base, {"training": {"optim": {"lr": 0.2}}, "evaluation": {"ks": [20]}})
    assert changed == {
        "training": {"epochs": 3, "optim": {"lr": 0.2, "clip_tower": 1}},
        "evaluation": {"ks": [20]},
    }
    assert base["training"] == {"epochs": 3, "optim": {"lr": 0.1, "clip_tower": 1}}


def test_another_model_keeps_what_sequence_models_share() -> None:
    base = {"model": {"dim": 32, "dropout": 0.1, "label": "ours", "own": 1}}
    changed = merge(base, {"model": {"name": "sasrec", "layers": 1}})
    assert changed["model"] == {"dim": 32, "dropout": 0.1, "name": "sasrec", "layers": 1}
    assert merge(base, {"model": {"name": "findrec"}})["model"] == base["model"] | {"name": "findrec"}
    named = {"model": {"name": "sasrec", "layers": 2, "dim": 8}}
    assert merge(named, {"model": {"name": "sasrec", "dim": 4}})["model"]["layers"] == 2
    assert merge(named, {"model": {"name": "unknown"}})["model"] == {"name": "unknown"}
