"""An export answers as the run it was made of, without the run and without its data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from planted import planted_folder
from saved_run import save_run
from small_run import with_columns

import findrec
from findrec.cli.app import main
from findrec.config import dump_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.run import evaluate_run
from findrec.serving.display import json_lines
from findrec.serving.export.export import export_run
from findrec.serving.recommender import Recommender
from findrec.serving.streaming import load_streaming
from findrec.training.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from findrec.training.runs import read_run_config

USERS = ["3", "0", "59"]


def past(data: DataFolder, users: list[str]) -> dict[str, Any]:
    rows = [data.histories([int(user)]) for user in users]
    histories = [[str(v) for v in row.item.tolist()] for row in rows]
    return {"histories": histories, "times": [row.timestamp.tolist() for row in rows]}


def configure(run: Path, **evaluation: Any) -> None:
    config = read_run_config(run)
    changed = config.evaluation.model_copy(update=evaluation)
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"evaluation": changed})))


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_lists_are_digit_for_digit_those_of_the_run(run: Path, data: DataFolder, tmp_path: Path):
    original, copy = findrec.load(run), findrec.load(export_run(run, tmp_path / "export"))
    asked = past(data, USERS)
    for given in (
        {},
        {"k": 99},
        {"only": ["category=third 1", "price<30"]},
        {"exclude_seen": True},
        {"at": 600},
    ):
        want = list(original.recommend(**asked, **given))  # type: ignore[arg-type]
        assert list(copy.recommend(**asked, **given)) == want  # type: ignore[arg-type]
        assert all(one.items for one in want)
    without_times = [original, copy]
    assert len({repr(one.recommend(histories=asked["histories"])) for one in without_times}) == 1
    nobody = [one.recommend(histories=[[], ["unknown"]]) for one in without_times]
    assert list(nobody[0]) == list(nobody[1])
    assert nobody[0][0].ranked_by == "popularity"
    assert list(copy.similar_items(["5", "17"])) == list(original.similar_items(["5", "17"]))
    np.testing.assert_array_equal(copy.user_vectors(**asked), original.user_vectors(**asked))
    np.testing.assert_array_equal(copy.item_vectors(), original.item_vectors())
    assert load_streaming(tmp_path / "export").start([1, 2], [0, 60]) is not None


def test_from_python(run: Path, tmp_path: Path):
    exported = findrec.Run(run).export(tmp_path / "export")
    want = findrec.Run(run).recommender().recommend(histories=[["5", "17"]])
    assert list(findrec.load(exported).recommend(histories=[["5", "17"]])) == list(want)
    assert findrec.Run(run).export() == run / "export"


def test_users_are_exported_on_request_only(run: Path, data: DataFolder, tmp_path: Path):
    private = export_run(run, tmp_path / "private")
    copy = findrec.load(private)
    assert copy.user_ids == []
    with pytest.raises(FindRecError, match=r"private was exported without its users: .*--users"):
        copy.recommend(["3"])
    assert not (private / "data" / "shards").exists()
    whole = findrec.load(export_run(run, tmp_path / "whole", users=True))
    for given in ({}, {"at": 600}, {"only": ["category=third 1"]}):
        assert list(whole.recommend(USERS, **given)) == list(findrec.load(run).recommend(USERS, **given))  # type: ignore[arg-type]


def test_it_holds_no_place_of_the_machine(run: Path, data: DataFolder, tmp_path: Path):
    export_run(run, tmp_path / "export")
    everything = contents(tmp_path / "export")
    assert str(data.path).encode() not in everything
    assert str(run).encode() not in everything


def test_the_card_and_the_vectors(run: Path, data: DataFolder, tmp_path: Path):
    row = evaluate_run(run)["test"][0]
    assert main(["export", str(run)]) == 0
    card = (run / "export" / "README.md").read_text()
    assert row["protocol"] in card
    assert f"| findrec | {row['users']:,} | {row['ndcg@10']:.4f} |" in card
    assert f"{data.num_items} items, {data.manifest.num_events:,} events" in card
    assert "licence of the data `data` is not known" in card
    assert "no histories and no ids of users" in card
    vectors = np.load(run / "export" / "vectors" / "items.npy")
    table = pq.read_table(run / "export" / "vectors" / "items.parquet")
    assert table.column("item").to_pylist() == [str(v) for v in range(1, data.num_items + 1)]
    np.testing.assert_array_equal(np.stack(table.column("vector").to_pylist()), vectors)
    np.testing.assert_array_equal(vectors, findrec.load(run).item_vectors())


def test_loading_it_needs_no_heavy_package(run: Path, data: DataFolder, tmp_path: Path):
    export_run(run, tmp_path / "export")
    code = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "deepspeed", "mlflow", "duckdb", "webdataset"}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocked())
import findrec
recommender = findrec.load(sys.argv[1])
print(recommender.recommend(histories=[["5", "17"]], k=3, only=["price<50"])[0].items)
print(recommender.similar_items("5", k=3)[0].items)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "export")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    original = findrec.load(run)
    want = original.recommend(histories=[["5", "17"]], k=3, only=["price<50"])[0].items
    assert done.stdout.splitlines() == [str(want), str(original.similar_items("5", k=3)[0].items)]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_an_index_comes_along(run: Path, data: DataFolder, factory: str, tmp_path: Path):
    pytest.importorskip("faiss")
    with pytest.raises(FindRecError, match=r"no index in .* \(available: none\)"):
        export_run(run, tmp_path / "none", indexes=[factory])
    assert not (tmp_path / "none").exists()
    assert main(["index", str(run), "--factory", factory, "--users", "9"]) == 0
    export = export_run(run, tmp_path / "export", indexes=[factory])
    asked = past(data, USERS)
    copy, original = Recommender.load(export, factory), Recommender.load(run, factory)
    assert list(copy.recommend(**asked)) == list(original.recommend(**asked))


def test_allow_lists_of_the_run_come_along(run: Path, data: DataFolder, tmp_path: Path):
    stock = tmp_path / "stock.csv"
    stock.write_text("sku,count\n" + "".join(f"{v},1\n" for v in range(1, 31)))
    configure(run, candidates=["category=third 1", f"file:{stock}#sku"], mask_seen=True)
    export = export_run(run, tmp_path / "export")
    want = findrec.load(run).recommend(histories=[["5", "17"]], k=30)
    stock.unlink()
    shutil.move(export, tmp_path / "moved")
    lists = findrec.load(tmp_path / "moved").recommend(histories=[["5", "17"]], k=30)
    assert list(lists) == list(want)
    assert {int(item) for item in lists[0].items} == {v for v in range(1, 31) if v % 3 == 1} - {5, 17}


@pytest.mark.parametrize("model", ["TwoStages", "TwoInterests", "Distance"])
def test_models_of_stages_and_other_scorers(data: DataFolder, model: str, tmp_path: Path):
    tree = {"name": f"toy_models:{model}", "dim": 8}
    run = save_run(tmp_path / "run", data, model=tree, evaluation={"baselines": []})
    if model == "TwoStages":
        add_table_of_users(run / "stages" / "edges" / "checkpoints", data.num_users)
    export = export_run(run, tmp_path / "export")
    asked = past(data, USERS)
    assert list(findrec.load(export).recommend(**asked)) == list(findrec.load(run).recommend(**asked))
    assert (export / "vectors").exists() == (model != "Distance")
    assert (export / "stages" / "edges").exists() == (model == "TwoStages")
    assert not list(export.rglob("table_users-*"))
    whole = export_run(run, tmp_path / "whole", users=True)
    assert len(list(whole.rglob("table_users-*"))) == (model == "TwoStages")


def add_table_of_users(checkpoints: Path, num_users: int) -> None:
    """To the only checkpoint, as a stage leaves it that learns a row for each user."""
    saved = load_checkpoint(checkpoints / "step-00000040")
    tables = {"items": {"weight": saved.table["weight"]}, "users": {"weight": torch.randn(num_users + 1, 8)}}
    save_checkpoint(checkpoints, saved.state, tower=saved.tower, optimizer_state={}, tables=tables)


def test_a_damaged_export_is_refused(run: Path, tmp_path: Path):
    export = export_run(run, tmp_path / "export")
    manifest = json.loads((export / "export.json").read_text())
    for name in ("data/items.parquet", "vectors/items.npy", "config.yaml"):
        content = (export / name).read_bytes()
        (export / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(FindRecError, match=rf"{re.escape(name)} differs .* findrec export tiny --force"):
            findrec.load(export)
        (export / name).write_bytes(content)
    findrec.load(export)
    for change, message in (
        ({"format": 2}, "has format 2, this version reads 1: update"),
        ({"files": {}}, r"does not list config\.yaml"),
        ({"latest": None}, r"export\.json is damaged \(latest: "),
        ({"files": {"../run/config.yaml": {"bytes": 1, "sha256": ""}}}, "names a file outside the export"),
    ):
        (export / "export.json").write_text(json.dumps(manifest | change))
        with pytest.raises(FindRecError, match=message):
            findrec.load(export)
    (export / "export.json").write_text("{")
    with pytest.raises(FindRecError, match="is damaged"):
        findrec.load(export)


def test_the_card_may_be_edited(run: Path, tmp_path: Path):
    export = export_run(run, tmp_path / "export")
    want = list(findrec.load(export).recommend(histories=[["5"]]))
    with (export / "README.md").open("a") as card:
        card.write("The data are under CC BY 4.0.\n")
    assert list(findrec.load(export).recommend(histories=[["5"]])) == want
    (export / "README.md").unlink()
    assert list(findrec.load(export).recommend(histories=[["5"]])) == want


@pytest.mark.parametrize("name", ["checkpoints/step-00009999/tower.safetensors", "data/features/more.npy"])
def test_files_of_another_export_are_refused(run: Path, tmp_path: Path, name: str):
    """As when an export is copied over an older one; its weights would be loaded if their step is higher."""
    export = export_run(run, tmp_path / "export")
    (export / "data" / ".DS_Store").write_text("of a file manager")
    findrec.load(export)
    (export / name).parent.mkdir(parents=True, exist_ok=True)
    (export / name).write_bytes(b"older")
    with pytest.raises(FindRecError, match=rf"{name} is not in export\.json: .*to an empty folder"):
        findrec.load(export)


def test_columns_with_nan_are_exported(tmp_path: Path):
    data = planted_folder(tmp_path / "data", num_users=8)
    price = pa.array([float("nan")] * data.num_items)
    run = save_run(tmp_path / "run", with_columns(data, {"price": price}), evaluation={"baselines": []})
    (one,) = findrec.load(export_run(run, tmp_path / "export")).recommend(histories=[["5"]], k=2)
    assert np.isnan(one.more["price"]).all()
    (line, _) = json_lines([one])
    assert json.loads(line, parse_constant=pytest.fail)["price"] is None


def test_the_target_is_not_overwritten_by_accident(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["export", str(run), str(tmp_path / "mine"), "--force"]) == 2
    assert "mine exists and is not an export" in capsys.readouterr().err
    assert main(["export", str(run)]) == 0
    before = contents(run / "export")
    assert main(["export", str(run)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert main(["export", str(run), "--force"]) == 0
    assert contents(run / "export") == before
    assert main(["export", str(run / "export"), str(tmp_path / "again")]) == 2
    assert "is an export already" in capsys.readouterr().err
    assert not [path for path in run.iterdir() if ".part" in path.name]


def test_the_commands_take_an_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export = export_run(run, tmp_path / "export")
    capsys.readouterr()
    for command in (["--history", "5,17", "--json"], ["--history", "5", "--only", "price<20", "--k", "3"]):
        printed = []
        for folder in (run, export):
            assert main(["recommend", str(folder), *command]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
    assert main(["similar", str(export), "5", "--json"]) == 0
    assert main(["recommend", str(export), "--user", "3"]) == 2
    assert "without its users" in capsys.readouterr().err
