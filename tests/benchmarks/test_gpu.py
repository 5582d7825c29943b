"""The GPU benchmark is rehearsed on the CPU: complete figures, whatever happens to single sections."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gpu import kernels, sections
from bench.gpu.search import planted_targets
from bench.gpu.sections import SECTIONS, run_all, run_section
from bench.gpu.setting import Setting, kill_tree

from findrec.ops.ranking.target_rank import target_rank

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield Setting("cpu", True, tmp_path)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def rows(setting: Setting, name: str) -> list[dict[str, Any]]:
    if name != "card":
        run_section("card", setting)
    run_section(name, setting)
    return setting.rows_of(name)


def test_the_card_is_what_others_are_compared_with(setting: Setting) -> None:
    assert [row["unit"] for row in rows(setting, "card")] == ["GB/s", "TFLOP/s", "TFLOP/s", "TFLOP/s"]
    for row in setting.rows_of("card"):
        assert setting.share(row["value"] / 4, row["what"]) == {"share": 0.25, "of": row["what"]}
    assert setting.share(1.0, "something else") == {}


@pytest.mark.parametrize(
    ("name", "whats"),
    [
        ("scan", {"torch"}),
        ("loss", {"F.cross_entropy", "findrec"}),
        ("ranking", {"product alone, bfloat16", "findrec, auto"}),
        ("steps", {"sampled loss, float32", "sampled loss, bfloat16", "exact loss, bfloat16"}),
    ],
)
def test_every_figure_has_a_value_and_a_share(setting: Setting, name: str, whats: set[str]) -> None:
    found = rows(setting, name)
    assert whats <= {row["what"] for row in found}
    for row in found:
        assert row["value"] > 0, row
        assert row["share"] > 0, row
        assert row.get("note", "exact") == "exact" or name == "steps", row


def test_faiss_finds_what_a_product_finds(setting: Setting) -> None:
    pytest.importorskip("faiss")
    notes = [row["note"] for row in rows(setting, "faiss") if row["what"].startswith("faiss")]
    assert len(notes) == 2
    assert all(note.startswith("recall 1.0000") for note in notes)  # all lists are searched


def test_planted_targets_have_the_planned_ranks() -> None:
    torch.manual_seed(0)
    users, items = torch.randn(300, 8), torch.randn(1001, 8)
    greater, _ = target_rank(users, items, torch.arange(300), planted_targets(users, items))
    assert abs((1.0 + greater).log().mean() / torch.tensor(1000.0).log() - 0.5) < 0.08


def test_an_implementation_that_fails_is_a_row_with_the_reason(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernels.make_loss

    def make(impl: str, shape: tuple[int, int, int], device: str) -> Any:
        if impl == "F.cross_entropy":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(impl, shape, device)

    monkeypatch.setattr(kernels, "make_loss", make)
    found = rows(setting, "loss")
    failed = [row for row in found if row["value"] is None]
    assert [(row["what"], row["note"]) for row in failed] == [("F.cross_entropy", "out of memory")] * 2
    assert all("times" not in row for row in found)
    assert [row["value"] > 0 for row in found if row["what"] == "findrec"] == [True, True]


PROGRAM = """
import json, sys, time
out, name = sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--section") + 1]
with open(f"{out}/{name}.jsonl", "w") as file:
    print(json.dumps({"what": name, "shape": "", "value": 1.0, "unit": "s"}), file=file)
if name == "scan":
    sys.exit("CUDA error: an illegal memory access")
if name == "loss":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    open(f"{out}/child", "w").write(str(child.pid))
    time.sleep(60)
"""


def test_a_section_that_fails_or_hangs_loses_nothing_else(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(Setting, "patience", 1.0)
    monkeypatch.setattr(sections, "LEAST_S", 1)
    short = sections.Section("slow one", SECTIONS["loss"].measure, 4.0)
    monkeypatch.setitem(SECTIONS, "loss", short)
    failed = run_all(["card", "scan", "loss", "nccl"], setting, limit_s=60, program=program)
    assert failed == 2
    report = json.loads((tmp_path / "report.json").read_text())
    ended = {name: section["ended"] for name, section in report["sections"].items()}
    assert "illegal memory access" in ended["scan"]
    assert "ended after 4 s" in ended["loss"]
    assert all(len(section["rows"]) == 1 for section in report["sections"].values())
    assert ended["nccl"].endswith(" s")
    assert {"torch", "gpu", "driver", "python", "revision"} <= set(report["machine"])
    text = (tmp_path / "report.md").read_text()
    assert "## slow one (ended after 4 s" in text
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the section had started still runs")


def test_nothing_is_begun_without_time(setting: Setting, tmp_path: Path) -> None:
    assert run_all(["card"], setting, limit_s=1, program=tmp_path / "none.py") == 1
    assert "not begun: no time was left" in (tmp_path / "report.md").read_text()


def test_ended_processes_are_no_error() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    kill_tree(done.pid)


@pytest.mark.slow
@pytest.mark.cluster
def test_the_whole_script_is_rehearsed(tmp_path: Path) -> None:
    """`gpu.sh` from doctor to report, with a run that is killed and resumed, and two processes.

    Without the sections that a test above runs.
    """
    sections = [name for name in SECTIONS if name not in ("loss", "ranking", "steps")]
    environment = {**os.environ, "PYTHON": sys.executable, "LIMIT_S": "900"}
    command = ["bash", str(ROOT / "evaluation" / "benchmarks" / "gpu.sh"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--dry-run", "--limit-s", "700", "--only", *sections],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    logs = "\n".join(f"{p.name}: {p.read_text()[-500:]}" for p in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    steps = [line.split("\t") for line in (tmp_path / "out" / "steps.tsv").read_text().splitlines()]
    assert [(name, code) for name, code, _ in steps] == [
        (name, "0") for name in ("setup", "doctor", "tests", "figures")
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["sections"]) == sections
    for name, section in report["sections"].items():
        assert section["ended"].endswith(" s"), (name, section["ended"])
        assert section["rows"], name
        assert all(row["value"] is not None for row in section["rows"]), name
    resumed = {row["what"]: row["value"] for row in report["sections"]["resume"]["rows"]}
    assert resumed["NDCG@10 of the resumed run"] > 0.4  # the planted order was learned
    assert "WRONG" not in (tmp_path / "out" / "report.md").read_text()
    assert "setup_env.py" in (tmp_path / "out" / "setup.log").read_text()
    assert not (tmp_path / "out" / "venv").exists()
