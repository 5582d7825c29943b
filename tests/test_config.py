"""The configuration tree: overrides, unknown keys, checks across keys, and the round trip through YAML."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from findrec.cli.app import main
from findrec.config import dump_config, load_config, parse_config
from findrec.datasets.sources.recipe import load_recipe
from findrec.errors import FindRecError
from findrec.models.findrec.config import FindRecConfig
from findrec.paths import find_asset
from findrec.training.runs import read_run_config


def test_overrides_are_yaml_values() -> None:
    config = parse_config(
        {"training": {"epochs": 4}},
        [
            "training.epochs=7",
            "training.optim.lr=1e-4",
            "training.optim.betas=[0.8, 0.9]",
            "model.control.hide_id=0.2",
            "data.folder=null",
            "model.repeat=true",
            "evaluation.ks=[1,10]",
        ],
    )
    assert config.training.epochs == 7
    assert config.training.optim.lr == 1e-4
    assert config.training.optim.betas == (0.8, 0.9)
    assert isinstance(config.model, FindRecConfig)
    assert config.model.control.hide_id == 0.2
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
        ({}, ["training.epochs=true"], "training.epochs: a number is needed, not true"),
        ({}, ["cluster.workers=false"], "cluster.workers: a number is needed, not false"),
        ({}, ["training.optim.lr=true"], "training.optim.lr: a number is needed, not true"),
        ({}, ["evaluation.ks=[1, true]"], "evaluation.ks.*a number is needed, not true"),
        ({}, ["training.epoch=3"], "'training.epoch'.*did you mean 'training.epochs'"),
        ({"trainig": {}}, [], "unknown key 'trainig'; did you mean 'training'"),
        (
            {"model": {"name": "sasrec", "align": {"weight": 9}}},
            [],
            "'model.align' .a key of model.name=findrec, but the model is sasrec; leave it out",
        ),
        (
            {"model": {"name": "sasrec"}},
            ["model.align.weight=9"],
            "model.align.weight is a key of model.name=",
        ),
        ({"model": {"stream": {"d_stat": 3}}}, [], "did you mean 'model.stream.d_state'"),
        ({}, ["training.epochs"], "write dotted.key=value"),
        ({"training": {"epochs": 0}}, [], r"training.epochs: .*given: 0"),
        ({"model": {"name": "gru"}}, [], "model.name must be one of 'findrec', .*'sasrec'"),
        ({"name": "../x"}, [], "name: "),
        ({"name": 2024}, [], r"""name: .*a int: write name: "2024" in a file, 'name="2024"' on the"""),
        ({}, ["name=2024"], r"""'name="2024"' on the command line .given: 2024"""),
        ({}, ["name=2024-05-01"], r"""name: "2024-05-01" in a file"""),
        ({"training": None}, [], "training: .*the section is empty; give it keys or leave it out"),
        ({"training": None}, ["training.epochs=3"], "'training.epochs=3' cannot be set: training is None"),
        ({"model": "sasrec"}, ["model.dim=8"], "model is 'sasrec' in config, not a section of keys"),
        ({}, ["training.epochs=["], r"the value of 'training.epochs=\[' is not valid YAML"),
        ({}, ["training.epochs=" + "9" * 5000], "is not valid YAML"),
        ({}, ["training.optim.lr=.inf"], "training.optim.lr: .*finite"),
        ({}, ["=3"], "unknown key ''"),
        ({}, ["model.name=[1]"], "model.name must be one of"),
        ({}, ["model.name=:x"], "cannot import ''"),
        ({}, [f"name={'x' * 300}"], "name: .*at most 100 characters"),
        ({"cluster": {"workers": 5}}, [], "cluster.workers=5 must divide training.microbatches=12"),
    ],
)
def test_mistakes_are_reported_with_advice(tree: dict[str, object], overrides: list[str], says: str) -> None:
    with pytest.raises(FindRecError, match=says):
        parse_config(tree, overrides)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: a\x00b\n", "is not valid YAML: unacceptable character"),
        (b"name: \xff\xfe\n", "is not valid YAML: not UTF-8 text .* at byte 6"),
        (b"name: " + b"[" * 5000, "is not valid YAML: maximum recursion depth"),
        (b"name: " + b"[" * 60 + b"]" * 60, "is nested more than 40 levels deep, or contains itself"),
        (b"name: &a [*a]\n", "is nested more than 40 levels deep, or contains itself"),
        (b"name: !!timestamp x\n", "is not valid YAML"),
        (b"name: 2024-99-99\n", "is not valid YAML: month must be in"),
        (b"training:\n", "training: .*the section is empty"),
        (b"- a\n", "must hold a mapping of keys, found list"),
        (b"1: a\n", "the key 1 is not a word"),
        (b"#" * (9 << 20), "larger than 8 MiB"),
    ],
)
def test_files_that_hold_no_configuration(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    readers: list[Callable[[Path], Any]] = [load_config, lambda path: read_run_config(path.parent)]
    if b"training" not in content:  # a recipe has no such section
        readers.append(lambda path: load_recipe(str(path)))
    for read in readers:
        with pytest.raises(FindRecError, match=says):
            read(path)
    assert main(["train", str(path), "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown


VALUES = [
    "null",
    "[]",
    "{a: 1}",
    "1e999",
    ".nan",
    '""',
    "2024-01-01",
    "yes",
    "!!int x",
    "&a [*a]",
    "9" * 5000,
]


def test_damaged_files_give_a_configuration_or_an_error_message(tmp_path: Path) -> None:
    path, read = tmp_path / "config.yaml", 0
    texts = [dump_config(parse_config({})), find_asset("ml-100k", "datasets").read_text()]
    readers: list[list[Callable[[Path], Any]]] = [
        [load_config, lambda path: read_run_config(path.parent)],
        [lambda path: load_recipe(str(path))],
    ]
    for seed in range(400):
        rng = random.Random(seed)
        data = bytearray(texts[seed % 2].encode())
        for _ in range(rng.randint(1, 3)):
            at, how = rng.randrange(len(data)), rng.random()
            if how < 0.4:
                data[at] ^= 1 << rng.randrange(8)
            elif how < 0.6:
                del data[at : at + rng.randint(1, 40)]
            else:
                end = data.find(b"\n", at)
                colon = data.find(b":", at, max(end, 0))
                if colon > 0:
                    data[colon + 1 : end] = b" " + rng.choice(VALUES).encode()
        path.write_bytes(data)
        with suppress(FindRecError):
            rng.choice(readers[seed % 2])(path)
            read += 1
    assert 20 < read < 380


def test_the_neutral_configuration_for_own_data() -> None:
    config = load_config("shop", ["name=my-shop", "data.recipe=elsewhere/my-shop.yaml"])
    assert (config.name, config.data.recipe) == ("my-shop", "elsewhere/my-shop.yaml")
    assert config.evaluation.mask_seen is None, "decided by the data, unlike in the demo"
    assert load_config("shop").data.recipe == "my-shop.yaml", "never the demo's data"


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
        with pytest.raises(FindRecError, match=r"evaluation\.candidates: .*is not one of all, available"):
            parse_config({}, [f"evaluation.candidates={wrong}"])
