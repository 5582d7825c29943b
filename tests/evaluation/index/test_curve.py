"""`findrec index` on a trained run: saving, loading and measuring; mismatches are refused."""

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

from findrec.cli.app import main
from findrec.datasets.folder.configured import open_data_folder
from findrec.datasets.folder.data_folder import ALWAYS, NEVER
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.index.curve import (
    EXACT,
    Point,
    applicable,
    choose,
    default_factories,
    measure_indexes,
    recall,
)
from findrec.evaluation.index.display import advise, format_curve, index_curve_figure, read_curve, write_curve
from findrec.evaluation.index.index import build_index
from findrec.evaluation.index.store import index_folder, load_index, read_metadata, save_index, saved_indexes
from findrec.evaluation.scoring.load import load_scorer
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.training.checkpoints.checkpoint import save_checkpoint
from findrec.training.checkpoints.validations import best_checkpoint, best_checkpoint_path
from findrec.training.runs import read_run_config, training_jobs

faiss = pytest.importorskip("faiss")


def vectors(run: Path) -> tuple[Tensor, Path]:
    config = read_run_config(run)
    job = training_jobs(config, run)[0]
    checkpoint = best_checkpoint_path(run / "checkpoints")
    assert checkpoint is not None
    return load_scorer(job, open_data_folder(config.data)).items_Vd, checkpoint


def test_command_saves_measures_and_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines_file = run / "rows.jsonl"
    arguments = ["--factory", "Flat", "--factory", "IVF4,Flat", "--factory", "HNSW4", "--threads", "1"]
    assert main(["index", str(run), *arguments, "--users", "60", "--k", "5", "--json", str(lines_file)]) == 0
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
        assert read_metadata(index_folder(run, factory)).setting == served["setting"]
        assert served["recall"] >= 0.99
    assert (run / "index" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "index" / "curve.svg").read_text().rstrip().endswith("</svg>")
    assert not [path for path in run.rglob(".*") if path.is_file()], "nothing half written is left"


def test_the_report_has_the_figure(run: Path, tmp_path: Path) -> None:
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
    with pytest.raises(FindRecError, match="'nprobe' is not a setting"):
        applicable(flat, ["nprobe"])
    assert default_factories(30) == ["Flat", "IVF1,Flat", "HNSW32"]
    assert default_factories(1_000_000)[1] == "IVF4096,Flat"
    for num_items in (1, 39, 78, 1682, 68_509):  # each can be trained, without FAISS asking for more items
        lists_of = int(default_factories(num_items)[1].removeprefix("IVF").removesuffix(",Flat"))
        assert lists_of == 1 or lists_of * 39 <= num_items


def test_recall_is_the_share_of_the_true_list() -> None:
    true = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
    actual = torch.tensor([[4, 3, 9, 8], [6, 7, 0, 0], [0, 0, 0, 0]])
    assert recall([actual], [true]) == 0.5
    assert recall([true[2:]], [true[2:]]) == 1


def test_the_fastest_setting_with_enough_recall_is_chosen(run: Path) -> None:
    point = measure_indexes(run, ["Flat"], users=5, threads=1).points[1]
    made = [
        replace(point, setting=name, recall=actual, queries_per_s=rate)
        for name, actual, rate in (("a", 0.9, 9.0), ("b", 0.995, 5.0), ("c", 1.0, 2.0))
    ]
    assert choose(made).setting == "b"
    assert choose(made[:1]).setting == "a"


def test_exact_search_is_advised_where_it_is_faster(run: Path) -> None:
    curve = measure_indexes(run, ["Flat"], users=5, threads=1)
    exact, flat = (replace(point, queries_per_s=1000.0) for point in curve.points)

    def advice(*points: Point) -> str:
        return advise(replace(curve, points=list(points)))

    slow = replace(flat, factory="HNSW32", recall=0.995, queries_per_s=400.0)
    assert "Exact search is faster" in advice(exact, slow)
    assert "1,000 against 400 queries/s): 60 items need no index" in advice(exact, slow)
    fast = replace(slow, queries_per_s=2500.0)
    assert "HNSW32 answers 2.5 times as many" in advice(exact, slow, fast)
    assert "findrec recommend tiny --index HNSW32" in advice(exact, fast)
    assert "No index has a recall of 0.99" in advice(exact, replace(fast, recall=0.9))


def test_a_loaded_index_gives_the_same_lists(run: Path) -> None:
    items_Vd, checkpoint = vectors(run)
    since_V = torch.full((NUM_ITEMS + 1,), ALWAYS)
    since_V[5] = NEVER
    built = build_index(items_Vd, "IVF4,Flat", since_V)
    built.set("nprobe=3")
    save_index(built, run, checkpoint)
    loaded = load_index(run, "IVF4,Flat", items_Vd, checkpoint, since_V)
    assert loaded.setting == "nprobe=3"
    queries = UserVectors(torch.randn(9, items_Vd.shape[1]))
    for actual, expected in zip(loaded.top(queries, 20), built.top(queries, 20), strict=True):
        assert torch.equal(actual, expected)


def test_an_index_of_another_model_is_refused(run: Path) -> None:
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
    with pytest.raises(FindRecError, match="number of available items was 60"):
        load(since_V=since_V)
    with pytest.raises(FindRecError, match=r"no index in .*IVF9.* \(available: HNSW4\)\. Build .*'IVF9'"):
        load_index(run, "IVF9", items_Vd, checkpoint)
    # Training went on: a later checkpoint is the best one now.
    saved = best_checkpoint(run / "checkpoints")
    assert saved is not None
    state = replace(saved.state, step=saved.state.step + 1000, best_step=saved.state.step + 1000)
    parts: dict[str, Any] = {"tower": saved.tower, "optimizer_state": {}, "tables": saved.tables}
    later = save_checkpoint(run / "checkpoints", state, **parts)
    with pytest.raises(FindRecError, match=r"not belong to this model: the checkpoint was .*Build it with"):
        load(at=later)
    # The run was trained again from the start and got as far.
    parts["tables"] = {"items": {name: value + 1 for name, value in saved.table.items()}}
    again = save_checkpoint(run / "checkpoints", saved.state, **parts)
    assert again == checkpoint
    with pytest.raises(FindRecError, match="the checkpoint's manifest was"):
        load()
    assert folder.is_dir()


def test_a_damaged_index_is_refused(run: Path) -> None:
    items_Vd, checkpoint = vectors(run)
    folder = save_index(build_index(items_Vd, "Flat"), run, checkpoint)
    file, mark = folder / "index.faiss", folder / "index.json"

    def check_error(message: str) -> None:
        with pytest.raises(FindRecError, match=message):
            load_index(run, "Flat", items_Vd, checkpoint)

    whole, text = file.read_bytes(), mark.read_text()
    file.write_bytes(whole[:-4] + b"evil")
    check_error("has changed since it was saved")
    file.write_bytes(whole[:-4])
    check_error("has changed since it was saved")
    file.unlink()
    check_error("is missing. Build it with")
    file.write_bytes(whole)
    mark.write_text(text.replace('"format": 1', '"format": 9'))
    check_error("has format 9, this version reads 1")
    mark.write_text("{")
    check_error("cannot be read")
    mark.write_text(text)
    load_index(run, "Flat", items_Vd, checkpoint)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW4"])
def test_an_index_of_other_vectors_is_refused_even_with_a_matching_record(run: Path, factory: str) -> None:
    """Its record is written by `save_index` for this checkpoint, so every hash in it is right."""
    items_Vd, checkpoint = vectors(run)
    other = items_Vd.clone()
    other[1:] = items_Vd[1:].flip(0)
    for forged in (other, 2 * items_Vd):
        save_index(build_index(forged, factory), run, checkpoint)
        with pytest.raises(FindRecError, match=r"holds other vectors than .*Build it with"):
            load_index(run, factory, items_Vd, checkpoint)
    save_index(build_index(items_Vd, factory), run, checkpoint)
    load_index(run, factory, items_Vd, checkpoint)


def test_invalid_runs_are_refused(run: Path, tmp_path: Path) -> None:
    def check_error(message: str, folder: Path = run, *arguments: str, **settings: Any) -> None:
        with pytest.raises(FindRecError, match=message):
            measure_indexes(folder, *([arguments] if arguments else []), **settings)

    check_error("cannot build an index 'IVF64,Flat' of 60 items", run, "IVF64,Flat")
    check_error("cannot build an index 'Flatt'", run, "Flatt")
    check_error("FAISS finds no GPU here", gpus="shard")
    nobody = write_data_folder(tmp_path / "nobody", [[1], [2], [3]])  # one event each: no test set
    config = (run / "config.yaml").read_text()
    data = str(read_run_config(run).data.folder)
    other = tmp_path / "runs" / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(config.replace(data, str(nobody.path)))
    check_error("no user with an event in the test split", other)
    shutil.rmtree(other / "checkpoints")
    (other / "config.yaml").write_text(config)
    check_error("no usable checkpoint", other)
    saved = best_checkpoint(run / "checkpoints")
    assert saved is not None
    table = dict(saved.table)
    table["weight"][3] = np.nan
    save_checkpoint(
        other / "checkpoints", saved.state, tower=saved.tower, optimizer_state={}, tables={"items": table}
    )
    check_error("1 of 60 item vectors are not finite .* item 3", other)


def test_lists_longer_than_the_catalogue_are_cut(run: Path) -> None:
    curve = measure_indexes(run, ["HNSW4"], users=5, k=500, threads=1)
    assert curve.k == NUM_ITEMS
    assert all(point.recall == 1 for point in curve.points), "unfilled lists are made by exact search"
