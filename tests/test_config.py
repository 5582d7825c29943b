"""The configuration tree: overrides, unknown keys, checks across keys, and the round trip through YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from findrec.config import dump_config, load_config, parse_config
from findrec.errors import FindRecError


def test_overrides_are_yaml_values() -> None:
    config = parse_config(
        {"training": {"epochs": 4}},
        [
            "training.epochs=7",
            "training.optim.lr=1e-4",
            "training.optim.betas=[0.8, 0.9]",
            "model.routing.top_k=2",
            "data.folder=null",
            "model.repeat=true",
            "evaluation.ks=[1,10]",
        ],
    )
    assert config.training.epochs == 7
    assert config.training.optim.lr == 1e-4
    assert config.training.optim.betas == (0.8, 0.9)
    assert config.model.routing.top_k == 2
    assert config.data.folder is None
    assert config.model.repeat is True
    assert config.evaluation.ks == [1, 10]


def test_the_tree_given_is_not_changed_and_the_result_is_frozen() -> None:
    tree = {"training": {"epochs": 4}}
    config = parse_config(tree, ["training.epochs=7"])
    assert tree == {"training": {"epochs": 4}}
    with pytest.raises(ValidationError):
        config.training.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tree", "overrides", "says"),
    [
        ({}, ["training.epoch=3"], "'training.epoch'.*did you mean 'training.epochs'"),
        ({"trainig": {}}, [], "unknown key 'trainig'; did you mean 'training'"),
        ({"model": {"stream": {"d_stat": 3}}}, [], "did you mean 'model.stream.d_state'"),
        ({}, ["training.epochs"], "write dotted.key=value"),
        ({"training": {"epochs": 0}}, [], r"training.epochs: .*given: 0"),
        ({"model": {"name": "gru"}}, [], "model.name: .*'findrec' or 'sasrec'"),
        ({"name": "../x"}, [], "name: "),
        ({"cluster": {"workers": 5}}, [], "cluster.workers=5 must divide training.microbatches=12"),
    ],
)
def test_mistakes_say_where_and_how_to_mend(tree: dict[str, object], overrides: list[str], says: str) -> None:
    with pytest.raises(FindRecError, match=says):
        parse_config(tree, overrides)


def test_every_mistake_is_listed_at_once() -> None:
    with pytest.raises(FindRecError) as caught:
        parse_config({"data": {"max_length": 1, "recip": "x"}}, source="my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "data.max_length" in str(caught.value)
    assert "did you mean 'data.recipe'" in str(caught.value)


def test_a_dumped_tree_loads_to_the_same(tmp_path: Path) -> None:
    config = parse_config({"name": "x"}, ["model.modalities=[text]", "training.optim.betas=[0.5, 0.6]"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text())["training"]["optim"]["betas"] == [0.5, 0.6]


@pytest.mark.parametrize(("text", "says"), [("a: [", "not valid YAML"), ("- 1", "found list")])
def test_files_that_are_no_configuration(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(FindRecError, match=says):
        load_config(path)


@pytest.mark.parametrize(
    "given",
    ["all", "available", "category=Comedy", "file:stock.txt", "[available, category=A, 'category=B, C']"],
)
def test_candidates_are_a_rule_or_an_allow_list(given: str) -> None:
    config = parse_config({}, [f"evaluation.candidates={given}"])
    assert config.evaluation.candidates == yaml.safe_load(given)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    for wrong in ("avialable", "[all, comedy]", "=x", "stock.txt"):
        with pytest.raises(FindRecError, match=r"evaluation\.candidates: .*is neither all, available"):
            parse_config({}, [f"evaluation.candidates={wrong}"])
