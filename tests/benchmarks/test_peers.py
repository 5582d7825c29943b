"""Comparison with other libraries: exported data, settings, time to a level, and rows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from bench.peers import (
    BASELINE,
    Settings,
    Trained,
    bench_peers,
    default_peers,
    export_events,
    make_rows,
    our_config,
    seconds_to,
    setup_peers,
    train_ours,
    train_peer,
)
from planted import planted_folder

from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.models.sasrec.config import SASRecConfig

PROGRAMS = Path(__file__).resolve().parents[2] / "evaluation" / "benchmarks"
WORKER, REQUIREMENTS = PROGRAMS / "peers" / "worker.py", PROGRAMS / "peers.txt"
QUICK = Settings(width=16, length=16, blocks=1, dropout=0.0, lr=0.01, tokens=256, level=0.3, limit_s=20.0)


def test_events_are_exported_in_order(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "data", [[3, 1, 2], [2, 2, 1, 3]], num_items=3)
    export_events(folder, tmp_path / "events.csv")
    lines = (tmp_path / "events.csv").read_text().split()
    assert lines == ["user,item,position", "0,3,0", "0,1,1", "0,2,2", "1,2,0", "1,2,1", "1,1,2", "1,3,3"]


def test_splits_that_peers_do_not_support_are_refused(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "data", [[3, 1, 2], [2, 2]], num_items=3)
    with pytest.raises(FindRecError, match="fewer than three events"):
        export_events(folder, tmp_path / "events.csv")


def test_setup_installs_pytorch_first_and_recbole_without_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    broken = True

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        failed = broken and "rectools[torch]==0.19.0" in command
        return subprocess.CompletedProcess(command, int(failed), "", "no network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FindRecError, match="no network"):
        setup_peers(tmp_path, REQUIREMENTS)
    create, pytorch, rest = commands
    assert create[-1] == str(tmp_path)
    assert [part.split("==")[0] for part in pytorch if "==" in part] == ["torch"]
    assert "numpy<2" in rest
    assert not any(part.startswith(("recbole", "#")) for part in rest)
    broken = False
    setup_peers(tmp_path, REQUIREMENTS)
    assert commands[-1][-2:] == ["--no-deps", "recbole==1.2.1"]


def test_without_the_environment_a_message_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_data_folder(tmp_path / "data", [[3, 1, 2]], num_items=3)
    assert bench_peers(tmp_path / "none", WORKER, folder, Settings()) == []
    assert "--setup-peers" in "".join(capsys.readouterr())


def test_time_to_the_level_includes_its_epoch() -> None:
    trained = Trained((2.0, 3.0, 4.0), (10, 10, 10), (0.01, 0.05, 0.04), 1)
    assert seconds_to(trained, 0.05) == 5.0
    assert seconds_to(trained, 0.06) is None
    assert trained.timing().seconds == (200.0, 300.0, 400.0)


def test_rows_show_who_did_not_reach_the_level() -> None:
    actual = {
        BASELINE: Trained((4.0, 4.0), (1000, 1000), (0.01, 0.05), 7),
        "recbole sasrec": Trained((20.0,), (1000,), (0.02,), 8),
    }
    rows = make_rows(actual, "ml-100k", Settings(level=0.045))
    assert [row.median_s for row in rows] == [4.0, 8.0, 20.0, 20.0]
    assert [row.ratio for row in rows] == [1.0, 1.0, 0.2, 0.4]
    assert rows[3].impl == "recbole sasrec (not reached: 0.0200)"
    assert rows[0].shape == "ml-100k L200 d64"


def test_ours_gets_the_same_settings() -> None:
    config = our_config("sasrec", Settings(), ["model.repeat=false"])
    assert isinstance(config.model, SASRecConfig)
    assert (config.model.name, config.model.dim, config.model.layers, config.model.heads) == (
        "sasrec",
        64,
        2,
        2,
    )
    assert config.data.max_length == 200
    assert config.training.microbatches * config.training.tokens == 3200
    assert config.training.loss.kind == "exact"
    assert not config.model.repeat


@pytest.mark.slow
def test_ours_trains_until_the_level(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path / "data")
    trained = train_ours("sasrec", folder.path, QUICK)
    assert trained.ndcg[-1] >= QUICK.level > max((0.0, *trained.ndcg[:-1]))
    assert set(trained.targets) == {int(folder.valid_start.sum()) - folder.num_users}


@pytest.mark.slow
@pytest.mark.skipif(
    not (default_peers() / "bin" / "python").is_file(),
    reason="no .venv-peers (python evaluation/benchmarks/model.py --setup-peers)",
)
@pytest.mark.parametrize("peer", ["rectools", "recbole"])
def test_peers_count_their_targets_and_learn(tmp_path: Path, peer: str) -> None:
    folder = planted_folder(tmp_path / "data")
    export_events(folder, tmp_path / "events.csv")
    trained = train_peer(peer, default_peers() / "bin" / "python", WORKER, tmp_path, QUICK)
    assert trained.ndcg[-1] >= QUICK.level
    inputs = folder.valid_start - 1
    # RecTools asks every position of the last L + 1 events; RecBole makes a sample of each prefix.
    expected = inputs.clip(max=QUICK.length).sum() if peer == "rectools" else inputs.sum()
    assert set(trained.targets[:-1]) <= {int(expected)}
    assert trained.targets[0] == int(expected)
