"""Resolution of paths and assets; the checkout shadows no package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from findrec import paths
from findrec.errors import FindRecError
from findrec.paths import checkout, find_asset, home, resolve

ROOT = Path(__file__).resolve().parents[1]


def test_home_is_given_or_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    assert home() == tmp_path
    assert resolve("runs/x") == tmp_path / "runs" / "x"
    assert resolve("/abs") == Path("/abs")
    monkeypatch.delenv("FINDREC_HOME")
    assert checkout() == ROOT
    assert home() == ROOT


def test_home_is_never_a_ray_jobs_throw_away_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "pkg"
    (copy / "configs").mkdir(parents=True)
    (copy / "pyproject.toml").touch()
    monkeypatch.delenv("FINDREC_HOME", raising=False)
    monkeypatch.setattr(paths, "PACKAGE", copy / "findrec")
    assert checkout() == copy
    assert home() == ROOT  # where pip's record of the editable install points
    monkeypatch.setattr(paths, "_editable_checkout", lambda: None)
    assert home() == Path.home() / "findrec"


def test_assets_are_found_by_path_name_and_in_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_asset("demo", "configs") == ROOT / "configs" / "demo.yaml"
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    own.touch()
    assert find_asset("own.yaml", "configs") == own
    assert find_asset("configs/demo.yaml", "configs") == ROOT / "configs" / "demo.yaml"

    package = tmp_path / "site-packages" / "findrec"
    (package / "assets" / "datasets").mkdir(parents=True)
    shipped = package / "assets" / "datasets" / "shipped.yaml"
    shipped.touch()
    monkeypatch.setattr(paths, "PACKAGE", package)
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path / "home"))
    assert find_asset("shipped", "datasets") == shipped
    assert find_asset("datasets/shipped.yaml", "datasets") == shipped
    with pytest.raises(FindRecError, match=r"'shiped'.*did you mean 'shipped'.*there: shipped"):
        find_asset("shiped", "datasets")


PROBE = """
import importlib.util, runpy, sys
sys.argv = ["findrec", "version"]
try:
    runpy.run_module("findrec.cli", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
spec = importlib.util.find_spec("datasets")
print("spec", spec.origin if spec else None)
import findrec.datasets.batches.batch
print("ours", findrec.datasets.batches.batch.__file__)
"""


def test_checkout_does_not_shadow_hugging_face_datasets() -> None:
    before = "import importlib.util; s = importlib.util.find_spec('datasets'); print(s and s.origin)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(code: str, folder: Path) -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    outside = run(before, ROOT.parent)  # None, or Hugging Face's where it is installed
    spec, ours = run(PROBE, ROOT).splitlines()[-2:]
    assert spec == f"spec {outside}"
    assert ours == f"ours {ROOT / 'findrec' / 'datasets' / 'batches' / 'batch.py'}"


def test_a_hidden_checkout_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), "/elsewhere"])
    with paths.checkout_hidden():
        assert sys.path == ["/elsewhere"]
    assert sys.path == [str(ROOT), "/elsewhere"]


def test_entry_points_drop_the_checkout_before_anything_heavy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "findrec.cli", "version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torch" not in done.stderr


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINDREC_HOME", "~nobody-of-this-name/findrec")
    with pytest.raises(FindRecError, match=r"no home folder. Set FINDREC_HOME"):
        home()
    monkeypatch.setenv("FINDREC_HOME", "/tmp")
    with pytest.raises(FindRecError, match="no home folder"):
        resolve("~nobody-of-this-name/runs")
