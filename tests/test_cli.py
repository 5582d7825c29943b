"""Every command reaches its target with what was typed; mistakes give one message and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import findrec.train_dist
from findrec import __version__
from findrec.cli import doctor
from findrec.cli.app import main
from findrec.cli.doctor import Finding
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.nvidia import Driver
from findrec.paths import find_run


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # names are looked up there first
    monkeypatch.setattr(sys, "path", list(sys.path))  # main() takes the checkout off it


def make_run(home: Path, name: str = "demo") -> Path:
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {name}\n")
    return folder


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("version", "--version"):
        assert main([command]) == 0
        assert capsys.readouterr().out == f"{__version__}\n"


def test_help_is_also_h(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-h"], ["stats", "-h"]):
        assert main(arguments) == 0
        assert "--help" in capsys.readouterr().out


def test_shells_complete_the_commands() -> None:
    asked = {"_FINDREC_COMPLETE": "complete_bash", "COMP_WORDS": "findrec re", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "findrec.cli"], capture_output=True, text=True, env=os.environ | asked
    )
    assert done.stdout.split() == ["report", "recommend"]


def test_data_folders_are_found_by_name_and_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "my-shop"
    write_data_folder(folder, [[1, 2, 3], [2, 1, 3]], texts=["a", "b", "c"])
    (tmp_path / "my-shop").mkdir()  # raw files in a folder of the same name
    np.save(tmp_path / "v.npy", np.ones((3, 4), dtype=np.float32))
    for number, name in enumerate(("my-shop", "data/my-shop", str(folder), "my-shop.yaml")):
        assert main(["verify", name]) == 0
        assert str(folder) in capsys.readouterr().out
        assert main(["features", name, "--vectors", "v.npy", "--modality", f"clip{number}"]) == 0
    assert main(["verify", "my-shp"]) == 2
    assert re.search("no data folder called 'my-shp'.*did you mean 'my-shop'", capsys.readouterr().err)


def test_help_names_every_command_quickly() -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "findrec.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 5  # under a second on an idle machine; importing torch takes longer
    for command in (
        "prepare",
        "features",
        "synthesize",
        "stats",
        "verify",
        "train",
        "evaluate",
        "report",
        "compare",
        "inspect",
        "index",
        "recommend",
        "doctor",
    ):
        assert command in done.stdout
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, findrec.cli; print('torch' in sys.modules, 'ray' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("arguments", "target"), [([], "data/ml-100k"), (["--folder", "elsewhere/x"], "elsewhere/x")]
)
def test_prepare_passes_recipe_folder_force_and_parent(
    arguments: list[str], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import findrec.datasets.prepare.pipeline as prepare
    from findrec.datasets.sources.duckdb_engine import Limits

    calls: list[tuple[str, Path, bool, Path | None]] = []
    given: list[Limits] = []

    def fake(recipe: Any, folder: Path, force: bool, limits: Limits, grow: Path | None) -> None:
        calls.append((recipe.name, folder, force, grow))
        given.append(limits)

    monkeypatch.setattr(prepare, "prepare", fake)
    for name in ("FINDREC_MEMORY_GIB", "FINDREC_THREADS", "FINDREC_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    assert main(["prepare", "ml-100k", *arguments]) == 0
    limits = ["--memory-gib", "1.5", "--threads", "1", "--scratch", str(tmp_path)]
    assert main(["prepare", "ml-100k", "--force", *limits, *arguments]) == 0
    (tmp_path / "data/old").mkdir(parents=True)
    assert main(["prepare", "ml-100k", "--grow", "old", *arguments]) == 0
    rest = [(False, None), (True, None), (False, tmp_path / "data/old")]
    assert calls == [("ml-100k", tmp_path / target, *how) for how in rest]
    assert given == [Limits.of(), Limits(1.5, 1, tmp_path), Limits.of()]


def test_train_hands_on_overrides_and_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def fake(argv: list[str]) -> int:
        calls.append(argv)
        return 130

    monkeypatch.setattr(findrec.train_dist, "main", fake)
    assert main(["train", "demo", "training.epochs=3", "cluster.workers=1", "--fresh"]) == 130
    assert calls == [["--config", "demo", "--fresh", "training.epochs=3", "cluster.workers=1"]]


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_runs_are_found_by_name_and_path(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path)
    calls: list[Path] = []
    fake = SimpleNamespace(evaluate_run=lambda run, _: calls.append(run), rebuild_report=calls.append)
    monkeypatch.setitem(sys.modules, "findrec.evaluation.run", fake)  # type: ignore[arg-type]
    for name in ("demo", "runs/demo", str(folder)):
        assert main([command, name]) == 0
    assert calls == [folder] * 3
    assert str(folder / "report.html") in capsys.readouterr().out


def test_suites_are_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calls = make_run(tmp_path), []

    def run_suites(*given: Any) -> list[Path]:
        calls.append(given)
        return [folder / "suites" / "noise.json"]

    fake = SimpleNamespace(run_suites=run_suites)
    monkeypatch.setitem(sys.modules, "findrec.evaluation.run", fake)  # type: ignore[arg-type]
    assert (
        main(["evaluate", "demo", "--suite", "noise", "--suite", "length", "--level", "5", "--level", "9"])
        == 0
    )
    assert calls == [(folder, ["noise", "length"], [5, 9])]
    assert "noise.json" in capsys.readouterr().out


def test_unknown_run_names_the_nearest(tmp_path: Path) -> None:
    make_run(tmp_path, "demo")
    make_run(tmp_path, "long")
    with pytest.raises(FindRecError, match=r"no run called 'demp'.*did you mean 'demo'.*demo, long"):
        find_run("demp")


MISTAKES: list[tuple[list[str], str]] = [
    (["prepare", "ml-100"], "did you mean 'ml-100k'"),
    (["train", "dem"], "did you mean 'demo'"),
    (["train", "demo", "training.epoch=3"], "did you mean 'training.epochs'"),
    (["train", "demo", "epochs"], "write dotted.key=value"),
    (["train", "demo", "training.epochs=none"], "training.epochs"),
    (["evaluate", "nowhere"], "no run called 'nowhere'"),
    (["verify", "nowhere"], "nowhere"),
    (["evalute", "demo"], "evaluate"),
    (["prepare"], "recipe"),
    (["prepare", "x" * 300], "File name too long"),
    (["train", "x" * 300], "File name too long"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_mistakes_get_one_message(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert not any(tmp_path.iterdir())


def test_the_module_ends_with_the_exit_code() -> None:
    done = subprocess.run([sys.executable, "-m", "findrec.cli", "verify", "nowhere"], capture_output=True)
    assert done.returncode == 2


def test_missing_permission_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path)

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(folder / "metrics.json"))

    monkeypatch.setitem(
        sys.modules,
        "findrec.evaluation.run",
        SimpleNamespace(evaluate_run=refuse),  # type: ignore[arg-type]
    )
    assert main(["evaluate", "demo"]) == 2
    assert f"Permission denied: {folder / 'metrics.json'}. Change its rights" in capsys.readouterr().err


def test_doctor_looks_at_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "selective scan" in text
    assert text.splitlines()[-1].startswith("ready to train")


def test_doctor_fails_when_something_needed_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("ray", "missing", "install it", fatal=True), Finding("memory", "1 GB", "tight")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "!! ray     missing",
        "           -> install it",
        " ! memory  1 GB",
        "           -> tight",
        "1 to fix before training, 1 to consider",
    ]


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        (None, None, ""),
        (Driver("470.256.02", ("A100",)), None, "driver 470.256.02 is too old for PyTorch"),
        (Driver("535.183.01", ("A100",), (8.0,)), None, "the build for CPUs: .* the build for CUDA 12"),
        (Driver("535.183.01", ("A100",), (8.0,)), "13.0", "needs a driver of 580 .* the build for CUDA 12"),
        (Driver("535.183.01", ("A100",), (8.0,)), "12.6", "CUDA does not start"),
        (Driver("580.65.06", ("H100",), (9.0,)), "13.0", "CUDA does not start"),
    ],
)
def test_doctor_says_why_pytorch_sees_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, cuda: str | None, said: str
) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "find_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (gpus,) = [finding for finding in doctor._accelerator() if finding.what == "GPUs"]
    assert gpus.value == "none"
    assert re.search(said, gpus.advice) if said else not gpus.advice


def test_doctor_sees_a_driver_that_does_not_work() -> None:
    finding = doctor._driver(Driver(problem="couldn't communicate with the NVIDIA driver"))
    assert "couldn't communicate" in finding.value
    assert "restart" in finding.advice


def test_doctor_sees_a_faiss_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from findrec.evaluation.search import faiss_library

    monkeypatch.setattr(faiss_library, "_failures", ["FAISS is installed but does not work (libcudart)"])
    (faiss,) = [finding for finding in doctor._packages() if finding.what == "faiss"]
    assert "libcudart" in faiss.advice


def test_doctor_sees_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    (home,) = [f for f in doctor._machine() if f.what.startswith("home")]
    assert home.fatal
    assert "FINDREC_HOME" in home.advice
