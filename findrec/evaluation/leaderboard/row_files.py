"""Writes the run configuration of each row of a leaderboard beside its tables."""

from __future__ import annotations

from pathlib import Path

import yaml

from findrec.evaluation.leaderboard.config import Leaderboard, Run, folder_name
from findrec.files import replacing
from findrec.text import redacted


def row_file(stem: str, run: Run) -> str:
    """The path of the configuration of a run's row, relative to the tables, whose names begin with `stem`."""
    return f"{stem}-configs/{folder_name(run.data)}-{folder_name(run.row)}.yaml"


def write_row_files(folder: Path, stem: str, leaderboard: Leaderboard) -> dict[tuple[str, str], str]:
    """Write a configuration for each row; returns their relative paths by the labels of data set and row.

    Each is that of the first seed, so that `findrec train FILE` repeats this training, or finds it finished.
    Raises `OSError` if a file cannot be written.
    """
    files: dict[tuple[str, str], str] = {}
    for run in leaderboard.runs:
        if (run.data, run.row) in files:
            continue
        files[run.data, run.row] = name = row_file(stem, run)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(_text(leaderboard, run, name), encoding="utf-8")
    return files


def _text(leaderboard: Leaderboard, run: Run, name: str) -> str:
    seeds = ", ".join(str(seed) for seed in leaderboard.config.seeds)
    return (
        f"# The row {run.row!r} of the leaderboard {leaderboard.config.name} on {run.data}; its seeds are "
        f"{seeds}.\n#   findrec train {name}\n"
        + redacted(yaml.safe_dump(run.tree, sort_keys=False, allow_unicode=True))
    )
