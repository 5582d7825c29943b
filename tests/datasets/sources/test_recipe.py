"""Recipes: built-in recipes load, and mistakes are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_recipe import small_recipe

from findrec.datasets.sources.recipe import load_recipe
from findrec.errors import FindRecError


def with_file(**keys: Any) -> dict[str, Any]:
    return {"path": ".", "files": {"log": {"member": "log.csv", **keys}}}


def test_built_in_recipes() -> None:
    films = load_recipe("ml-100k")
    assert [str(p) for p in films.sources["movielens"]] == [
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "package recbole 1.2.1",
    ]
    assert films.split.unit == "event"
    journey = load_recipe("complete-journey")
    assert (journey.split.unit, journey.ties) == ("timestamp", "shuffle")


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(FindRecError, match="did you mean 'ml-100k'"):
        load_recipe("ml-10k")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eventz": "x"}, "unknown key 'eventz'; did you mean 'events'"),
        ({"split": {"unitt": "event"}}, r"unknown key 'split\.unitt'; did you mean 'unit'"),
        ({"folder": "x"}, "unknown key 'folder'"),
        ({"events": "SELECT * FROM {logg}"}, "did you mean 'log'"),
        ({"events": ""}, "SQL is missing"),
        ({"name": "../up"}, "name"),
        ({"min_events": 0}, "min_events"),
        ({"k_core": {"user": 5}}, r"unknown key 'k_core\.user'; did you mean 'users'"),
        ({"duplicates": "drp"}, "duplicates"),
        ({"max_bad_rows": 2}, "max_bad_rows"),
        ({"split": {"kind": "global_temporal", "valid_from": 3}}, "both valid_from and test_from"),
        ({"sources": {"files": [with_file(format="cvs")]}}, "format"),
        ({"sources": {"files": [with_file(encoding="latin-1")]}}, "need a format"),
        ({"sources": {"files": [with_file(format="csv", header=False)]}}, "needs columns"),
        ({"sources": {"files": [with_file(format="recbole", header=True)]}}, "option of csv"),
        ({"sources": {"files": [with_file(format="recbole", columns={"a": "INT"})]}}, "its own columns"),
        ({"sources": {"files": [with_file(format="jsonl", encoding="latin-1")]}}, "is UTF-8"),
        ({"sources": {"files": [with_file(format="webdataset", encoding="latin-1")]}}, "is UTF-8"),
        ({"ties": "random"}, "ties"),
        ({"sources": {}}, "at least one"),
        ({"sources": {"a": [{"path": ".", "url": "https://x", "files": {}}]}}, "exactly one of"),
        ({"sources": {"a": [{"package": "p", "files": {}}]}}, "belong together"),
        ({"sources": {"a": [{"path": ".", "files": {"log": {"member": "../x"}}}]}}, "must stay inside"),
        ({"sources": {"a": [{"path": ".", "files": {"log": {"sha256": "12"}}}]}}, "sha256"),
    ],
)
def test_mistakes_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FindRecError, match=message):
        small_recipe(Path("."), **changes)


def test_hash_depends_on_settings_that_influence_the_data() -> None:
    base = small_recipe(Path("."))
    assert base.sha256() == small_recipe(Path("/"), title="other").sha256()
    assert base.sha256() != small_recipe(Path("."), seed=1).sha256()
    assert base.sha256() != base.sha256(limit_users=5)


def test_broken_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(FindRecError, match="not valid YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))
