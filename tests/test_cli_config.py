"""`findrec config` prints every key with its value, meaning and origin, as YAML and as a schema."""

import json
from pathlib import Path

import pytest
import yaml

from findrec.cli.app import main
from findrec.cli.key_docs import key_docs
from findrec.config import RunConfig, load_config, parse_config
from findrec.models.configs import CONFIGS
from findrec.schema import flatten


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["demo"], []),
        (["demo", "training.epochs=5", "model.dim=32"], ["training.epochs=5", "model.dim=32"]),
        (["shop", "--model", "sasrec"], ["model.name=sasrec"]),
    ],
)
def test_the_output_is_the_resolved_configuration(
    arguments: list[str], overrides: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["config", *arguments]) == 0
    shown = capsys.readouterr().out
    expected = load_config(arguments[0], overrides)
    assert parse_config(yaml.safe_load(shown)) == expected
    lines = shown.splitlines()
    for override in overrides:
        key, _, value = override.partition("=")
        assert f"{key.rpartition('.')[2]}: {value}  # the command line" in {line.strip() for line in lines}
    assert "name: demo  # demo.yaml" in lines or arguments[0] != "demo"
    assert "  # share of a window that repeats earlier events as context" in lines


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_can_be_shown(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--model", name]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["name"] == name


def test_unknown_names_and_keys_are_refused(capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["dem"], "did you mean 'demo'"),
        (["demo", "model.dims=3"], "did you mean 'model.dim'"),
        (["--model", "findrecs"], "did you mean 'findrec'"),
    ):
        assert main(["config", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_schema_knows_all_keys_and_models(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    names = {choice["$ref"].rpartition("/")[2] for choice in schema["properties"]["model"]["anyOf"][1:]}
    assert {CONFIGS[name].__name__ for name in CONFIGS} == names
    for cls in CONFIGS.values():
        assert set(schema["$defs"][cls.__name__]["properties"]) == set(cls.model_fields)
    training = schema["$defs"]["TrainingConfig"]["properties"]
    assert training["tokens"]["description"].startswith("largest number of padded positions")
    assert schema["properties"]["runs"]["description"] == "the folder of all run folders"
    given = flatten(yaml.safe_load(Path("configs/demo.yaml").read_text()))
    assert {key.partition(".")[0] for key in given} <= set(schema["properties"])


def test_comments_are_those_of_the_source():
    assert key_docs(RunConfig) == {"runs": "the folder of all run folders"}
    dim = key_docs(CONFIGS["findrec"])["dim"]
    assert dim == "width of the item table and of user vectors"
