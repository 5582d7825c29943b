"""The report page is complete, escapes text from the data, and works offline."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.display.wording import draw_users, format_table, sample_recommendations
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, write_results
from findrec.evaluation.report.page import write_report
from findrec.evaluation.scoring.baselines import OwnFrequent, Popularity


@pytest.fixture
def run(folder: DataFolder, tmp_path: Path) -> Path:
    rows, ranks = evaluate_scorers([Popularity(folder), OwnFrequent(folder)], folder, RankingProtocol())
    write_results(tmp_path, rows, ranks, folder)
    lines = [
        json.dumps({"step": s, "epoch": 0, "time": 1.0 * s, "train/loss": 5.0 / s, "aux/stein": 0.1})
        for s in range(1, 20)
    ]
    lines.append(json.dumps({"step": 19, "epoch": 0, "valid/ndcg@10": 0.25}))
    lines.append('{"step": 20, "train/lo')  # a run killed while it wrote
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    return tmp_path


def test_page_is_complete(folder: DataFolder, run: Path) -> None:
    users = draw_users(folder, "test", 3)
    samples = sample_recommendations(OwnFrequent(folder), folder, "test", users, RankingProtocol(), k=5)
    page = write_report(run, folder=folder, samples=samples).read_text()
    for text in ("popularity", "own_frequent", "leave-one-out, full catalogue (40 items)", "ndcg@10"):
        assert text in page
    for title in ("training loss", "validation NDCG@10", "aux/stein"):
        assert f'alt="{title}"' in page
    assert "targets a second" not in page, "a curve without values is left out"
    assert page.count("<article>") == 3
    assert "<script" not in page
    assert "<b>film" not in page
    assert "&lt;b&gt;film&lt;/b&gt; &amp; " in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"@import|url\(", page)
    assert "popularity minus" in page, "the first model is compared with the others"
    svg = base64.b64decode(re.findall(r"svg\+xml;base64,([^\"]+)", page)[0]).decode()
    assert svg.rstrip().endswith("</svg>")
    again = write_report(run, folder=folder, samples=samples).read_text()
    assert again == page
    assert not list(run.glob(".report*"))
    plots = {path.name for path in (run / "plots").iterdir()}
    for name in ("train-loss", "valid-ndcg-at-10", "aux-stein", "strata", "lists-coverage", "lists-gini"):
        assert {f"{name}.png", f"{name}.svg"} <= plots


def test_page_of_an_empty_run(folder: DataFolder, tmp_path: Path) -> None:
    page = write_report(tmp_path, folder=folder).read_text()
    for text in ("Not evaluated yet", "No logged values", "None drawn", "(no config.yaml)", "Not measured"):
        assert text in page


def test_samples_show_the_right_items(folder: DataFolder, histories: list[list[int]]) -> None:
    users = draw_users(folder, "test", 4)
    assert users.tolist() == draw_users(folder, "test", 4).tolist()
    actual = sample_recommendations(
        OwnFrequent(folder), folder, "test", users, RankingProtocol(), k=3, history=4
    )
    for sample, user in zip(actual, users, strict=True):
        known, target = histories[user][:-1], histories[user][-1]
        assert sample.user == str(user)
        assert [one.text for one in sample.history] == [f"<b>film</b> & {i}" for i in known[-4:]]
        assert [(one.item, one.text) for one in sample.target] == [(target, f"<b>film</b> & {target}")]
        most = max(known.count(i) for i in known)
        assert known.count(sample.recommended[0].item) == most
        assert sample.recommended[0].text == f"<b>film</b> & {sample.recommended[0].item}"
        assert len(sample.recommended) == 3
    assert sample_recommendations(OwnFrequent(folder), folder, "test", [], RankingProtocol(), k=3) == []


def test_terminal_table(folder: DataFolder) -> None:
    rows, _ = evaluate_scorers(
        [Popularity(folder), OwnFrequent(folder)], folder, RankingProtocol(), splits=["test"]
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_table(rows["test"], "results"))
    text = console.export_text()
    assert "own_frequent" in text
    assert "test: leave-one-out, full catalogue (40 items), seen items kept" in text
    assert f"{rows['test'][0]['ndcg@10']:.4f}" in text
