"""`findrec index` on a trained run: saved, loaded and measured; what does not belong together is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import NUM_ITEMS
from rich.console import Console
from torch import Tensor

from findrec.cli import main
from findrec.datasets.folder import ALWAYS, NEVER
from findrec.datasets.memory import write_data_folder
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.index import build_index
from findrec.evaluation.index_curve import (
    EXACT,
    applicable,
    choose,
    default_factories,
    measure_indexes,
    recall,
)
from findrec.evaluation.index_show import format_curve, index_curve_figure, read_curve, write_curve
from findrec.evaluation.index_store import index_folder, load_index, read_mark, save_index, saved_indexes
from findrec.evaluation.load import load_scorer
from findrec.evaluation.scorers import Queries
from findrec.training.checkpoint import save_checkpoint
from findrec.training.runs import read_run_config, training_jobs
from findrec.training.validations import best_checkpoint, best_checkpoint_path

faiss = pytest.importorskip("faiss")


def vectors(run: Path) -> tuple[Tensor, Path]:
    config = read_run_config(run)
    job = training_jobs(config, run)[0]
    checkpoint = best_checkpoint_path(run / "checkpoints")
    assert checkpoint is not None
    return load_scorer(job, open_data_folder(config.data)).items_Vd, checkpoint


def test_the_command_saves_measures_and_shows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines_file = run / "rows.jsonl"
    asked = ["--factory", "Flat", "--factory", "IVF4,Flat", "--factory", "HNSW4", "--threads", "1"]
    assert main(["index", str(run), *asked, "--users", "60", "--k", "5", "--json", str(lines_file)]) == 0
    shown = capsys.readouterr().out
    for text in ("recall@5", "IVF4,Flat", "nprobe=2", "efSearch=64", "60 test users", "p99 ms", "index MiB"):
        assert text in shown
    assert sorted(saved_indexes(run)) == ["Flat", "HNSW4", "IVF4,Flat"]
    lines = [json.loads(line) for line in (run / "index" / "curve.jsonl").read_text().splitlines()]
    assert lines_file.read_text() == (run / "index" / "curve.jsonl").read_text()
    by_name = {(line["factory"], line["setting"]): line for line in lines}
    nprobe = [by_name["IVF4,Flat", f"nprobe={n}"]["recall"] for n in (1, 2, 4)]
    assert nprobe == sorted(nprobe)
    assert nprobe[-1] == by_name["Flat", ""]["recall"] == by_name[EXACT, ""]["recall"] == 1
    assert nprobe[0] < 1
    for line in lines:
        assert line["queries_per_s"] > 0
        assert 0 < line["p50_ms"] <= line["p99_ms"]
        assert line["users"] == line["singles"] == 60
        assert (line["items"], line["k"], line["run"]) == (NUM_ITEMS, 5, "tiny")
        assert "full catalogue (60 items)" in line["protocol"]
        if line["factory"] != EXACT:
            assert line["index_bytes"] == (index_folder(run, line["factory"]) / "index.faiss").stat().st_size
    for factory in ("Flat", "IVF4,Flat", "HNSW4"):  # the marked setting is the one that is noted
        (served,) = (line for line in lines if line["factory"] == factory and line["served"])
        assert read_mark(index_folder(run, factory)).setting == served["setting"]
        assert served["recall"] >= 0.99
    assert (run / "index" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "index" / "curve.svg").read_text().rstrip().endswith("</svg>")
    assert not [path for path in run.rglob(".*") if path.is_file()], "nothing half written is left"


def test_the_report_is_given_a_figure(run: Path, tmp_path: Path) -> None:
    assert index_curve_figure(run) is None
    curve = measure_indexes(run, ["IVF4,Flat"], users=20, threads=1)
    write_curve(run, curve)
    assert read_curve(run) == curve
    figure = index_curve_figure(run)
    assert figure is not None
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label.split(", ")[0] for label in labels] == ["exact", "IVF4,Flat"]
    marked = [line.get_xdata().tolist() for line in figure.axes[0].get_lines()]
    assert marked[1] == [point.recall for point in curve.points[1:]]
    console = Console(width=150, file=io.StringIO())
    console.print(format_curve(curve))
    (run / "index" / "curve.jsonl").write_text('{"run": "of another version"}\n')
    assert index_curve_figure(run) is None
    with pytest.raises(FindRecError, match="cannot write"):
        write_curve(tmp_path, curve, Path("/proc/nowhere/x.json"))


def test_settings_and_defaults() -> None:
    torch.manual_seed(0)
    items = torch.randn(301, 8)
    flat, lists, graph = (build_index(items, name) for name in ("Flat", "IVF6,Flat", "HNSW4"))
    assert [applicable(index, []) for index in (flat, lists)] == [[""], ["nprobe=1", "nprobe=2", "nprobe=4"]]
    assert applicable(graph, [])[0] == "efSearch=16"
    mixed = ["nprobe=3", "efSearch=7"]
    assert [applicable(index, mixed)[0] for index in (flat, lists, graph)] == ["", *mixed]
    with pytest.raises(FindRecError, match="'nprobe' is no setting"):
        applicable(flat, ["nprobe"])
    assert default_factories(30) == ["Flat", "IVF1,Flat", "HNSW32"]
    assert default_factories(1_000_000)[1] == "IVF4096,Flat"
    for num_items in (1, 39, 78, 1682, 68_509):  # each can be trained, without FAISS asking for more items
        lists_of = int(default_factories(num_items)[1].removeprefix("IVF").removesuffix(",Flat"))
        assert lists_of == 1 or lists_of * 39 <= num_items


def test_recall_is_the_share_of_the_true_list() -> None:
    true = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
    found = torch.tensor([[4, 3, 9, 8], [6, 7, 0, 0], [0, 0, 0, 0]])
    assert recall([found], [true]) == 0.5
    assert recall([true[2:]], [true[2:]]) == 1


def test_the_fastest_setting_that_finds_enough_is_chosen(run: Path) -> None:
    point = measure_indexes(run, ["Flat"], users=5, threads=1).points[1]
    made = [
        replace(point, setting=name, recall=found, queries_per_s=rate)
        for name, found, rate in (("a", 0.9, 9.0), ("b", 0.995, 5.0), ("c", 1.0, 2.0))
    ]
    assert choose(made).setting == "b"
    assert choose(made[:1]).setting == "a"


def test_a_saved_index_lists_what_it_did(run: Path) -> None:
    items_Vd, checkpoint = vectors(run)
    since_V = torch.full((NUM_ITEMS + 1,), ALWAYS)
    since_V[5] = NEVER
    built = build_index(items_Vd, "IVF4,Flat", since_V)
    built.set("nprobe=3")
    save_index(built, run, checkpoint)
    loaded = load_index(run, "IVF4,Flat", items_Vd, checkpoint, since_V)
    assert loaded.setting == "nprobe=3"
    queries = Queries(torch.randn(9, items_Vd.shape[1]))
    for found, expected in zip(loaded.top(queries, 20), built.top(queries, 20), strict=True):
        assert torch.equal(found, expected)


def test_an_index_of_something_else_is_refused(run: Path) -> None:
    items_Vd, checkpoint = vectors(run)
    folder = save_index(build_index(items_Vd, "HNSW4"), run, checkpoint)

    def load(items: Tensor = items_Vd, at: Path = checkpoint, since_V: Tensor | None = None) -> None:
        load_index(run, "HNSW4", items, at, since_V)

    load()
    wider = torch.cat([items_Vd, items_Vd], dim=1)
    with pytest.raises(FindRecError, match=r"width of the vectors was 32 .* is 64 now.*: findrec index tiny"):
        load(wider)
    with pytest.raises(FindRecError, match="number of items was 60"):
        load(items_Vd[:-1])
    since_V = torch.full((NUM_ITEMS + 1,), ALWAYS)
    since_V[5] = NEVER
    with pytest.raises(FindRecError, match="number of items on offer was 60"):
        load(since_V=since_V)
    with pytest.raises(FindRecError, match=r"no index in .*IVF9.* \(there: HNSW4\)\. Build .*'IVF9'"):
        load_index(run, "IVF9", items_Vd, checkpoint)
    # Training went on: a later checkpoint is the best one now.
    saved = best_checkpoint(run / "checkpoints")
    assert saved is not None
    state = replace(saved.state, step=saved.state.step + 1000, best_step=saved.state.step + 1000)
    parts: dict[str, Any] = {"tower": saved.tower, "moments": saved.moments, "table": saved.table}
    later = save_checkpoint(run / "checkpoints", state, **parts)
    with pytest.raises(FindRecError, match=r"not belong to this model: the checkpoint was .*Build it anew"):
        load(at=later)
    # The run was trained again from the start and got as far.
    parts["table"] = {name: value + 1 for name, value in saved.table.items()}
    again = save_checkpoint(run / "checkpoints", saved.state, **parts)
    assert again == checkpoint
    with pytest.raises(FindRecError, match="the checkpoint's manifest was"):
        load()
    assert folder.is_dir()


def test_a_damaged_index_is_refused(run: Path) -> None:
    items_Vd, checkpoint = vectors(run)
    folder = save_index(build_index(items_Vd, "Flat"), run, checkpoint)
    file, mark = folder / "index.faiss", folder / "index.json"

    def told(message: str) -> None:
        with pytest.raises(FindRecError, match=message):
            load_index(run, "Flat", items_Vd, checkpoint)

    whole, text = file.read_bytes(), mark.read_text()
    file.write_bytes(whole[:-4] + b"evil")
    told("differs from what was saved")
    file.write_bytes(whole[:-4])
    told("differs from what was saved")
    file.unlink()
    told("is missing. Build it anew")
    file.write_bytes(whole)
    mark.write_text(text.replace('"format": 1', '"format": 9'))
    told("has format 9, this version reads 1")
    mark.write_text("{")
    told("cannot be read")
    mark.write_text(text)
    load_index(run, "Flat", items_Vd, checkpoint)


def test_runs_that_cannot_be_measured_are_told(run: Path, tmp_path: Path) -> None:
    def told(message: str, folder: Path = run, *arguments: str, **settings: Any) -> None:
        with pytest.raises(FindRecError, match=message):
            measure_indexes(folder, *([arguments] if arguments else []), **settings)

    told("cannot build an index 'IVF64,Flat' of 60 items", run, "IVF64,Flat")
    told("cannot build an index 'Flatt'", run, "Flatt")
    told("FAISS finds no GPU here", gpus="shard")
    nobody = write_data_folder(tmp_path / "nobody", [[1], [2], [3]])  # one event each: no test set
    config = (run / "config.yaml").read_text()
    data = str(read_run_config(run).data.folder)
    other = tmp_path / "runs" / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(config.replace(data, str(nobody.path)))
    told("no user with an event in the test split", other)
    shutil.rmtree(other / "checkpoints")
    (other / "config.yaml").write_text(config)
    told("no usable checkpoint", other)
    saved = best_checkpoint(run / "checkpoints")
    assert saved is not None
    table = dict(saved.table)
    table["weight"][3] = np.nan
    save_checkpoint(other / "checkpoints", saved.state, tower=saved.tower, moments={}, table=table)
    told("1 of 60 item vectors are not finite .* item 3", other)


def test_lists_longer_than_the_catalogue_are_as_long_as_it_is(run: Path) -> None:
    curve = measure_indexes(run, ["HNSW4"], users=5, k=500, threads=1)
    assert curve.k == NUM_ITEMS
    assert all(point.recall == 1 for point in curve.points), "lists an index cannot fill are made exactly"
