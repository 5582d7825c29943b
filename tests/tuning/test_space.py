"""Search spaces: those of all models are valid, and mistakes in a file are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.models.configs import CONFIGS
from findrec.tuning.space import Range, Space, find_space, with_values


def space(tmp_path: Path, tree: dict[str, Any], model: str = "sasrec") -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(tree))
    return find_space(parse_config({"model": model}), path)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_has_a_space_of_values_that_it_allows(name: str) -> None:
    config = parse_config({"model": {"name": name}})
    found = find_space(config)  # which checks each value
    assert "training.optim.lr" in found.keys
    assert all(key.startswith(("model.", "training.", "data.")) for key in found.keys)


def test_the_file_beside_a_model_adds_to_the_shared_keys() -> None:
    shared = set(find_space(parse_config({"model": "toy_models:Distance"})).keys)
    own = set(find_space(parse_config({"model": "sasrec"})).keys)
    assert shared < own
    assert own - shared >= {"model.layers", "model.heads"}
    assert "model.dropout" not in shared  # the model has no such key


def test_a_file_is_the_whole_space(tmp_path: Path) -> None:
    found = space(
        tmp_path,
        {
            "training.optim.lr": {"low": 0.001, "high": 0.1, "log": True},
            "model.layers": {"low": 1, "high": 3},
            "model.dim": [8, 16],
        },
    )
    assert found.tree == {
        "training.optim.lr": {"low": 0.001, "high": 0.1, "log": True},
        "model.layers": {"low": 1, "high": 3, "log": False},
        "model.dim": [8, 16],
    }
    layers = found.keys["model.layers"]
    assert isinstance(layers, Range)
    assert layers.whole
    for key, inside, outside in (
        ("training.optim.lr", [0.001, 0.05, 0.1], [0.0009, 0.2, True, "0.05"]),
        ("model.layers", [1, 3], [0, 4, 1.5]),
        ("model.dim", [8, 16], [12]),
    ):
        assert all(found.contains(key, value) for value in inside)
        assert not any(found.contains(key, value) for value in outside)
    assert [found.at_edge("training.optim.lr", value) for value in (0.0011, 0.002, 0.01, 0.095)] == [
        *(True, False, False, True)
    ]
    assert [found.at_edge("model.layers", value) for value in (1, 2, 3)] == [True, False, True]


def test_the_value_of_the_configuration_is_tried_too(tmp_path: Path) -> None:
    model = {"name": "sasrec", "dim": 48, "layers": 5, "dropout": 0.7}
    optim = {"lr": 0.03, "weight_decay": 0.0}
    config = parse_config({"model": model, "training": {"optim": optim}})
    found = find_space(config)
    assert found.keys["model.dim"] == (32, 48, 64, 128)
    assert found.keys["model.layers"] == Range(low=1, high=5)
    assert found.keys["model.dropout"] == Range(low=0.0, high=0.7)
    rate, decay = found.keys["training.optim.lr"], found.keys["training.optim.weight_decay"]
    assert isinstance(rate, Range)
    assert isinstance(decay, Range)
    assert rate.high == 0.03
    assert decay.low > 0  # 0 is not on a logarithmic scale
    (tmp_path / "space.yaml").write_text("model.dim: [8, 16]")
    assert find_space(config, tmp_path / "space.yaml").keys == {"model.dim": (8, 16)}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model.layer": [1, 2]}, "no key 'model.layer'; did you mean 'model.layers'"),
        ({"model.dim": [8]}, "model.dim is .8.: write a range"),
        ({"model.dim": 8}, "model.dim is 8: write a range"),
        ({"model.dim": {"low": 8, "hi": 9}}, "model.dim.*unknown key 'hi'"),
        ({"model.dropout": {"low": 0.5, "high": 0.2}}, "low: 0.5 is not below high: 0.2"),
        ({"model.dropout": {"low": 0.0, "high": 0.2, "log": True}}, "must be positive with log"),
        ({"model.dropout": {"low": 0.0, "high": 1.0}}, "model.dropout=1.0 is not allowed"),
        ({"model.dim": None}, "the search space has no keys"),
    ],
)
def test_mistakes_are_named(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match=message):
        space(tmp_path, tree)


def test_tokens_that_are_not_known_yet_are_refused() -> None:
    with pytest.raises(FindRecError, match=r"set training.tokens, e.g. training.tokens=3200"):
        find_space(parse_config({"model": "sasrec", "training": {"tokens": "auto"}}))


def test_the_combinations_of_a_finite_space() -> None:
    finite = Space({"model.layers": Range(low=1, high=3), "model.dim": (8, 16, 8)})
    assert finite.size == 6
    assert list(finite.combinations()) == [
        {"model.layers": layers, "model.dim": dim} for layers in (1, 2, 3) for dim in (8, 16)
    ]
    assert Space({"model.dim": (8, 16), "model.dropout": Range(low=0.0, high=0.5)}).size is None


def test_values_replace_keys_of_a_tree() -> None:
    tree = {"model": {"name": "sasrec", "dim": 8}, "training": {"epochs": 2}}
    changed = with_values(tree, {"model.dim": 16, "training.optim.lr": 0.1})
    assert changed == {
        "model": {"name": "sasrec", "dim": 16},
        "training": {"epochs": 2, "optim": {"lr": 0.1}},
    }
    assert tree["model"] == {"name": "sasrec", "dim": 8}
