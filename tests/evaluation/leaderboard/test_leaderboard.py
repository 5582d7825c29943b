"""`findrec leaderboard`, for real: trained, continued, and refused before training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from clusters import environment
from planted import planted_folder

from findrec.cli.app import main
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints

Write = Callable[..., Path]


def test_mistakes_end_with_code_2_before_training(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", str(write()), "seed=[0]"]) == 2
    assert "unknown key 'seed'" in capsys.readouterr().err
    assert main(["leaderboard", str(write(data={"shops": {"data.folder": "nowhere"}}))]) == 2
    assert "'shops' of the leaderboard cannot be opened" in capsys.readouterr().err
    assert main(["leaderboard", "nothing.yaml"]) == 2
    assert "nothing.yaml cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def leaderboard(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "findrec.cli", "leaderboard", "table.yaml", *arguments]
    done = subprocess.run(
        command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
def test_rows_are_trained_once(tmp_path: Path) -> None:
    planted_folder(tmp_path / "data" / "planted", num_users=60)
    tree = {
        "name": "tiny",
        "base": {
            "model": {"name": "sasrec", "dim": 16, "layers": 1, "heads": 1},
            "training": {"epochs": 1, "microbatches": 2, "tokens": 128, "optim.lr": 0.01},
            "cluster": {"workers": 1, "threads": 1},
            "tracking.enabled": False,
        },
        "seeds": [0, 1],
        "data": {"planted": {"data": {"folder": "data/planted", "max_length": 16}}},
        "rows": {"wide": {}, "narrow": {"model.dim": 4}},
        "reference": "wide",
        "baselines": ["popularity"],
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    runs = tmp_path / "runs" / "tiny"
    said = leaderboard(tmp_path, "--only", "wide", "seeds=[1]")
    assert "0 of 1 runs are finished" in said
    assert {path.name for path in runs.glob("tiny*")} == {
        *("tiny-wide.md", "tiny-wide.json", "tiny-wide.html"),
        "tiny-wide-configs",
    }
    (
        runs / "planted" / "wide-s1" / "metrics.json"
    ).unlink()  # as if it had been stopped before its evaluation
    said = leaderboard(tmp_path, "--jobs", "0")
    assert "0 of 4 runs are finished, 4 are to be trained" in said
    assert "tiny.md" in said
    first = {path.name: path.read_bytes() for path in runs.glob("tiny.*")}
    assert first.keys() == {"tiny.md", "tiny.json", "tiny.html"}
    (table,) = json.loads(first["tiny.json"])["tables"]
    for cost in json.loads(first["tiny.json"])["costs"]["planted"]["wide"]:
        assert 0 < cost["seconds_to_share"] <= cost["seconds"] < 120
        assert cost["targets_per_s"] > 10
        assert 0.1 < cost["memory_gib"] < 8
    assert [line["label"] for line in table["lines"]] == ["wide", "narrow", "popularity"]
    assert len(table["lines"][0]["metrics"]["ndcg@10"]["seeds"]) == 2
    for name in ("wide-s0", "wide-s1", "narrow-s0", "narrow-s1"):
        run = runs / "planted" / name
        row = json.loads((run / "metrics.json").read_text())["test"][0]
        line = table["lines"][name.startswith("narrow")]
        assert line["metrics"]["ndcg@10"]["seeds"][int(name[-1])] == pytest.approx(row["ndcg@10"])
        assert len(list_checkpoints(checkpoint_folder(run))) == 1
        assert "joining the Ray cluster at 127.0.0.1:" in (run / "train.log").read_text()
    again = leaderboard(tmp_path)
    assert "4 of 4 runs are finished, 0 are to be trained" in again
    assert "placing" not in again
    assert {path.name: path.read_bytes() for path in runs.glob("tiny.*")} == first
