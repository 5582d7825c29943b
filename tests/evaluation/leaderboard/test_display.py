"""The files and the printed tables of a leaderboard."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from findrec import __version__
from findrec.config import load_config
from findrec.errors import FindRecError
from findrec.evaluation.leaderboard.checks import Checked
from findrec.evaluation.leaderboard.config import Leaderboard
from findrec.evaluation.leaderboard.costs import Cost
from findrec.evaluation.leaderboard.display import (
    command_line,
    file_stem,
    print_leaderboard,
    write_leaderboard,
)
from findrec.evaluation.leaderboard.sheets import sheets_of
from findrec.evaluation.leaderboard.table import DataTable

Finished = tuple[Leaderboard, Checked]


def test_files_hold_what_reproduces_the_table(finished: Finished, table: DataTable, tmp_path: Path) -> None:
    leaderboard = finished[0]
    command = command_line("my table.yaml", replace(leaderboard, overrides=("seeds=[0, 1]",)))
    assert command == "findrec leaderboard 'my table.yaml' 'seeds=[0, 1]'"
    markdown, figures, page = write_leaderboard(tmp_path / "out", leaderboard, [table], command)
    assert (markdown.name, figures.name, page.name) == ("small.md", "small.json", "small.html")
    text, tree = markdown.read_text(), json.loads(figures.read_text())
    for piece in (command, leaderboard.source.strip(), f"FindRec {__version__}", table.events_sha256):
        assert piece in text
    assert "Seeds: 0, 1." in text
    assert yaml.safe_load(text.split("```yaml\n")[2].split("```")[0]) == leaderboard.shared
    assert (tree["command"], tree["file"], tree["seeds"]) == (command, leaderboard.source, [0, 1])
    assert (tree["version"], tree["shared"]) == (__version__, leaderboard.shared)
    assert [line["label"] for line in tree["tables"][0]["lines"]] == [line.label for line in table.lines]
    value = table.lines[1].metrics["ndcg@10"]
    assert tree["tables"][0]["lines"][1]["metrics"]["ndcg@10"]["change"]["p"] == value.change.p
    row = next(
        line for line in text.splitlines() if line.startswith(r"| [wide\|r](small-configs/films-wide-r.y")
    )
    change = f"{value.change.value:+.4f}{'*' * value.change.real}"
    assert f"| {value.mean:.4f} ± {value.spread:.4f} | {change} | " in row
    assert "| row | as tested | noise 50 % | length 3 |" in text
    assert re.search(r"\| \[narrow\]\(.*?\) \| \d\.\d{4} ± \d\.\d{4} \| – \| \d\.\d{4} ± ", text)
    assert "cold HR@50" in text


def test_equal_results_give_equal_bytes_but_for_times(
    finished: Finished, table: DataTable, tmp_path: Path
) -> None:
    costs = (Cost(9.0, 100.0, 3.0, 0.5, None), Cost(11.0, 300.0, 5.0, 0.6, None))
    lines = tuple(replace(line, costs=costs) if line.trained else line for line in table.lines)
    slower = replace(table, lines=lines)
    first, second = (
        [path.read_text() for path in write_leaderboard(tmp_path / str(n), finished[0], [one], "c")]
        for n, one in enumerate((table, slower))
    )
    assert first[1].partition('"costs"')[0] == second[1].partition('"costs"')[0]
    assert json.loads(second[1])["costs"]["films"]["narrow"][1]["seconds"] == 11.0
    before, _, times = second[0].partition("## films, cost")
    assert before == first[0].partition("## films, cost")[0]
    assert "| row | weights | targets/s | time to 95 % | time | memory |" in times
    assert re.search(r"\| \[narrow\]\(.*\) \| [0-9,]+ \| 200 \| 4.0 s \| 10.0 s \| 0.60 GiB \|", times)
    unknown = replace(table, lines=tuple(replace(line, costs=(None, costs[0])) for line in lines))
    text = write_leaderboard(tmp_path / "3", finished[0], [unknown], "c")[0].read_text()
    assert re.search(r"\| \[narrow\]\(.*\) \| [0-9,]+ \| – \| – \| – \| – \|", text)
    gpu = replace(
        table, lines=tuple(replace(line, costs=(replace(costs[0], gpu_gib=3.0),)) for line in lines)
    )
    text = write_leaderboard(tmp_path / "4", finished[0], [gpu], "c")[0].read_text()
    assert "memory | GPU memory |" in text
    assert "| 0.50 GiB | 3.00 GiB |" in text


def test_published_results_stand_beside_and_are_marked(
    finished: Finished, table: DataTable, tmp_path: Path
) -> None:
    assert [one.name for one in table.published] == ["GRU", "narrow"]
    markdown, figures, page = write_leaderboard(tmp_path, finished[0], [table], "c")
    text = markdown.read_text()
    assert "| GRU (published) | 0.9000 |  |  |  | – |  |  |  |  |  |" in text
    assert "| narrow (published) | 0.8000 |  |  |  | 0.8500 |  |  |  |  |  |" in text
    assert "* GRU (published): A. Author (2020)" in text
    assert "* narrow (published): <b>Author</b> (2021). NOT COMPARABLE: other split" in text
    (tree,) = json.loads(figures.read_text())["tables"]
    assert [line["label"] for line in tree["lines"]] == ["narrow", "wide|r", "popularity", "text_knn"]
    assert tree["published"][1]["metrics"] == {"ndcg@10": 0.8, "recall@5": 0.85, "mrr": 0.7}
    html = page.read_text()
    assert "<small>published, not comparable</small>" in html
    assert "<b>" not in html


def test_rows_link_to_configurations_that_can_be_trained(
    finished: Finished, table: DataTable, tmp_path: Path
) -> None:
    _, figures, page = write_leaderboard(tmp_path, finished[0], [table], "c")
    html = page.read_text()
    for line in json.loads(figures.read_text())["tables"][0]["lines"]:
        assert (line["config"] is not None) == line["trained"]
        if line["trained"]:
            assert f'<a href="{line["config"]}">{line["label"]}</a>' in html
            runs = finished[0].of("films", line["label"])
            assert load_config(str(tmp_path / line["config"]), []) == runs[0].config


def test_the_page_fetches_nothing_and_has_all_tables(
    finished: Finished, table: DataTable, tmp_path: Path
) -> None:
    line = table.lines[1]
    change = line.metrics["recall@5"].change
    assert change is not None
    value = replace(line.metrics["recall@5"], change=replace(change, real=True))
    lines = (table.lines[0], replace(line, metrics={**line.metrics, "recall@5": value}), *table.lines[2:])
    table = replace(table, lines=lines)
    page = write_leaderboard(tmp_path, finished[0], [table], "findrec leaderboard <file>")[2]
    html = page.read_text()
    assert "findrec leaderboard &lt;file&gt;" in html
    assert not re.search(r"https?:|<script|@import|url\(", html)
    for sheet in sheets_of(finished[0], table):
        assert f"<h2>{sheet.title}</h2>" in html
        for row in sheet.rows:
            for number, cell in enumerate(row.cells):
                best = ' class="best"' if number in row.significant else ""
                assert f"<td{best}>{cell}</td>" in html
    assert f'<td class="best">{change.value:+.4f}*</td>' in html


def test_a_table_of_some_rows_does_not_replace_the_whole(finished: Finished) -> None:
    some = replace(finished[0], only=("wide|r",))
    assert file_stem(some) == "small-wide-r"
    assert command_line("t.yaml", some) == "findrec leaderboard t.yaml --only 'wide|r'"


def test_tables_are_printed(finished: Finished, table: DataTable, capsys: pytest.CaptureFixture[str]) -> None:
    few = replace(table, resamples=200)
    print_leaderboard(finished[0], [few])
    text = capsys.readouterr().out
    for piece in ("films, robustness: ndcg@10", "vs. narrow", "wide|r", "200 resamples are too few"):
        assert piece in text
    one_seed = replace(finished[0], config=finished[0].config.model_copy(update={"seeds": [0]}))
    print_leaderboard(one_seed, [replace(table, cold_cases=0)])
    text = capsys.readouterr().out
    assert "of one seed" in text
    assert "cold HR@50" not in text


def test_a_folder_that_cannot_be_written_is_named(
    finished: Finished, table: DataTable, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FindRecError, match=r"cannot write the tables to .*file/out.*--out"):
        write_leaderboard(tmp_path / "file" / "out", finished[0], [table], "c")
