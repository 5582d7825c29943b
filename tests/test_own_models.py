"""User models: the main job trains them by their import paths.

`toy_models` and the model of the guide (findrec/models/README.md) are in folders of PYTHONPATH, as a user's
models are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clusters import UNTRACKED, train, weights
from planted import planted_folder

from findrec.cli.app import main as findrec
from findrec.config import parse_config
from findrec.datasets.batches.batch import Batch
from findrec.models.base import DataFacts
from findrec.models.configs import choose_model
from findrec.models.registry import build_model
from findrec.paths import PACKAGE
from findrec.train_dist import main
from findrec.training.checkpoints.checkpoint import latest_checkpoint

TESTS = Path(__file__).parent


def make_home(home: Path, model: dict[str, Any], **training: Any) -> Path:
    """A FINDREC_HOME with the planted data and a run of `model` on two workers in `run.yaml`."""
    planted_folder(home / "data" / "planted", num_users=60)
    tree = {
        "data": {"folder": "data/planted", "recipe": "planted", "max_length": 16},
        "model": model,
        "training": {"epochs": 2, "microbatches": 2, "tokens": 128, "optim": {"lr": 0.02}} | training,
        "cluster": {"workers": 2, "threads": 1, "zero_stage": 3},
        "evaluation": {"baselines": ["popularity"], "users_per_block": 64},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(tree))
    return home


def import_path(*folders: Path) -> str:
    """PYTHONPATH with these folders before those it has."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def metrics(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run / "metrics.json").read_text())["test"]
    return rows


def numbers(rows: list[dict[str, Any]]) -> list[float]:
    return [value for row in rows for _, value in sorted(row.items()) if isinstance(value, float)]


@pytest.mark.ray
@pytest.mark.slow
def test_two_stages_killed_in_the_second_and_continued_end_as_undisturbed(tmp_path: Path) -> None:
    home = make_home(tmp_path, {"name": "toy_models:TwoStages", "dim": 16}, epochs=4, save_steps=2)
    path: dict[str, Any] = {"PYTHONPATH": import_path(TESTS)}
    train(home, "name=whole", **path)
    whole, cut = home / "runs" / "whole", home / "runs" / "cut"
    kill = home / "kill"
    kill.touch()
    overrides = ["name=cut", UNTRACKED, "cluster.max_failures=0"]
    killed = train(home, *overrides, check=False, TOY_KILL_FILE=str(kill), **path)
    assert killed.returncode != 0
    assert not kill.exists()
    stage, reached = weights(cut / "stages" / "edges"), latest_checkpoint(cut / "checkpoints")
    assert reached is not None
    assert reached.name == "step-00000002"
    assert not (cut / "metrics.json").exists()
    done = train(home, *overrides, **path)
    assert "TwoStages/edges: " in done.stdout
    assert weights(cut / "stages" / "edges") == stage == weights(whole / "stages" / "edges")
    assert weights(cut) == weights(whole)
    rows = metrics(whole)
    assert [row["model"] for row in rows] == ["TwoStages", "popularity"]
    assert rows[0]["ndcg@10"] > 2 * rows[1]["ndcg@10"]
    # In training the model is ranked with what it read from the first stage, too.
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    best = max(line["valid/ndcg@10"] for line in lines if "valid/ndcg@10" in line)
    assert json.loads((whole / "metrics.json").read_text())["valid"][0]["ndcg@10"] == pytest.approx(best)
    assert numbers(metrics(cut)) == numbers(rows)


def shown(language: str, number: int = 0) -> str:
    """A block of code in the guide."""
    text = (PACKAGE / "models" / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[number]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of PYTHONPATH that holds the guide's model, `my_shop/models.py`."""
    (tmp_path / "my_shop").mkdir()
    (tmp_path / "my_shop" / "models.py").write_text(shown("python"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_shop"]:
        del sys.modules[name]


def test_the_model_of_the_guide_is_short_causal_and_the_same_in_a_batch(shop: Path) -> None:
    assert len(shown("python").splitlines()) < 60
    assert parse_config(yaml.safe_load(shown("yaml"))).model.title == "MeanOfItems"
    config = choose_model({"name": "my_shop.models:MeanOfItems", "dim": 8, "last": 3})
    assert config.title == "MeanOfItems"
    model = build_model(config, DataFacts(num_items=9)).eval()
    table = torch.randn(10, 8)

    def vectors(*histories: list[int]) -> list[torch.Tensor]:
        width = max(map(len, histories))
        item = torch.tensor([history + [0] * (width - len(history)) for history in histories])
        length = torch.tensor([len(history) for history in histories])
        valid = torch.arange(width) < length[:, None]
        position = valid.flatten().nonzero()[:, 0]
        batch = Batch.build(item, length, torch.zeros_like(length), position, position[:0])
        return list(model(batch, table[batch.ids], {}).h.split(length.tolist()))

    long, short = vectors([3, 1, 4, 1, 5, 9, 2], [6, 5])
    torch.testing.assert_close(vectors([3, 1, 4, 1])[0], long[:4])
    torch.testing.assert_close(vectors([6, 5])[0], short)
    torch.testing.assert_close(vectors([1, 5, 9])[0][-1], long[5])  # the last three events alone count


@pytest.mark.ray
@pytest.mark.slow
def test_the_guide_from_its_first_epoch_to_a_list(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load(shown("yaml"))
    make_home(shop, tree["model"] | {"last": 1, "dim": 32}, epochs=3, eval_every=3)
    path: dict[str, Any] = {"PYTHONPATH": import_path(shop)}
    train(shop, f"name={tree['name']}", UNTRACKED, **path)
    run = shop / "runs" / tree["name"]
    rows, learnt = metrics(run), weights(run)
    assert [row["model"] for row in rows] == ["MeanOfItems", "popularity"]
    assert rows[0]["ndcg@10"] > 2 * rows[1]["ndcg@10"]
    # As after a kill in the last epoch: the same command goes on from the checkpoint before it.
    checkpoints = sorted(path for path in (run / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    (run / "metrics.json").unlink()
    train(shop, f"name={tree['name']}", UNTRACKED, **path)
    assert weights(run) == learnt
    assert numbers(metrics(run)) == numbers(rows)
    assert findrec(["evaluate", tree["name"]]) == 0
    assert numbers(metrics(run)) == numbers(rows)
    capsys.readouterr()
    assert findrec(["recommend", tree["name"], "--user", "0", "--k", "4"]) == 0
    assert "0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("my_shop.model:MeanOfItems", {}, "cannot import 'my_shop.model'"),
        ("nobody.models:MeanOfItems", {}, "in a folder of PYTHONPATH, on every machine"),
        ("my_shop.models:MeanOfItem", {}, "did you mean 'MeanOfItems'?"),
        ("my_shop.models:MeanOfItemsConfig", {}, "no attribute `Config`"),
        ("my_shop.models:MeanOfItems", {"lats": 3}, "did you mean 'model.last'?"),
        ("my_shop.models:MeanOfItems", {"last": 0}, "greater than or equal to 1"),
        ("my_shop.other:NoModel", {}, "is not a model class"),
        ("toy_models:ShortListsModel", {}, "lists of 9 items, but validation needs 10"),
    ],
)
def test_mistakes_are_reported_before_anything_is_trained(
    shop: Path, capsys: pytest.CaptureFixture[str], name: str, keys: dict[str, int], message: str
) -> None:
    (shop / "my_shop" / "other.py").write_text(
        "from findrec.models.config import ModelConfig\nclass NoModel:\n    Config = ModelConfig\n"
    )
    make_home(shop, {"name": name, **keys})
    assert main(["--config", str(shop / "run.yaml")]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert not any((shop / "runs").glob("*"))


def test_a_mistake_in_an_override_names_the_users_model(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_home(shop, {"name": "my_shop.models:MeanOfItems"})
    assert main(["--config", str(shop / "run.yaml"), "model.lats=3"]) == 2
    assert "did you mean 'model.last'?" in capsys.readouterr().err
    assert main(["--config", str(shop / "run.yaml"), "model.gaps=true"]) == 2
    assert "but the model is my_shop.models:MeanOfItems" in capsys.readouterr().err
