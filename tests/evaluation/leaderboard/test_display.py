"""The files and the printed tables of a leaderboard."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from findrec import __version__
from findrec.errors import FindRecError
from findrec.evaluation.leaderboard.checks import Checked
from findrec.evaluation.leaderboard.config import Leaderboard
from findrec.evaluation.leaderboard.display import (
    command_line,
    file_stem,
    print_leaderboard,
    write_leaderboard,
)
from findrec.evaluation.leaderboard.table import DataTable

Finished = tuple[Leaderboard, Checked]


def test_files_hold_what_reproduces_the_table(finished: Finished, table: DataTable, tmp_path: Path) -> None:
    leaderboard = finished[0]
    command = command_line("my table.yaml", replace(leaderboard, overrides=("seeds=[0, 1]",)))
    assert command == "findrec leaderboard 'my table.yaml' 'seeds=[0, 1]'"
    markdown, figures = write_leaderboard(tmp_path / "out", leaderboard, [table], command)
    assert (markdown.name, figures.name) == ("small.md", "small.json")
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
    assert "seconds" not in figures.read_text()
    row = next(line for line in text.splitlines() if line.startswith(r"| wide\|r | "))
    change = f"{value.change.value:+.4f}{'*' * value.change.real}"
    assert f"| {value.mean:.4f} ± {value.spread:.4f} | {change} | " in row
    assert "| row | as tested | noise 50 % | length 3 |" in text
    assert re.search(r"\| narrow \| \d\.\d{4} ± \d\.\d{4} \| – \| \d\.\d{4} ± ", text)
    assert "cold HR@50" in text


def test_equal_results_give_equal_bytes_but_for_times(
    finished: Finished, table: DataTable, tmp_path: Path
) -> None:
    slower = replace(table, lines=tuple(replace(line, seconds=(9.0, 11.0)) for line in table.lines))
    first, second = (
        [path.read_text() for path in write_leaderboard(tmp_path / str(n), finished[0], [one], "c")]
        for n, one in enumerate((table, slower))
    )
    assert first[1] == second[1]
    before, _, times = second[0].partition("## Training time")
    assert before == first[0].partition("## Training time")[0]
    assert "| films | narrow | 10.0 s | 9.0 s, 11.0 s |" in times


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
