"""The recipes in the guides work as printed."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.recipe import Features, load_recipe, parse_recipe
from findrec.paths import PACKAGE

GUIDES = PACKAGE.parent / "datasets"


def shown(page: str, number: int = 0) -> str:
    """A block of YAML in a guide."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[number]


def test_the_shop_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "sales.csv").write_text(
        "customer,sku,bought_at\n"
        "ann,milk,2024-01-05 10:00:00\nann,bread,2024-01-06 10:00:00\nann,milk,2024-01-07 10:00:00\n"
        "bob,bread,2024-01-05 11:00:00\n"
    )
    (tmp_path / "products.csv").write_text("sku,name,category\nmilk,Milk 1 l,dairy\n")
    recipe = parse_recipe(yaml.safe_load(shown("README.md")), "README.md", tmp_path)
    assert recipe.features.text is not None
    made = prepare(recipe.model_copy(update={"features": Features()}), tmp_path / "data")
    assert (made.user_ids, made.items["raw"].to_pylist()) == (["ann", "bob"], ["bread", "milk"])
    assert made.items["text"].to_pylist() == [None, "Milk 1 l. dairy"]
    assert made.histories([0]).item.tolist() == [2, 1, 2]


def test_one_pair_per_line(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("7 12\n7 11\n3 11\n7 12\n")
    given = yaml.safe_load("place:\n" + shown("sequence-files.md"))
    template = load_recipe("sequence-files").model_dump(mode="json")
    place = {"path": ".", "files": given["place"]["files"]}
    template |= {"events": given["events"], "sources": {"sequences": [place]}}
    made = prepare(parse_recipe(template, "sequence-files.md", tmp_path), tmp_path / "data")
    raw = made.items["raw"].to_pylist()
    assert [[raw[v - 1] for v in made.histories([u]).item] for u in (0, 1)] == [["11"], ["12", "11", "12"]]
