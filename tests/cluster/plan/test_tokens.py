"""`training.tokens=auto`: what is chosen on machines with GPUs of different memory, and that it stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from findrec.cluster.plan import dry_run, machines, plan, tokens
from findrec.cluster.plan.machines import Machine
from findrec.cluster.plan.plan import make_plan
from findrec.cluster.plan.tokens import CPU_TOKENS, GPU_TOKENS, MEMORY_SHARE, MIN_STEPS, resolve_tokens
from findrec.config import RunConfig, load_config, parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.training.resume import plan_digest
from findrec.training.runs import open_run_folder, read_run_config, run_folder, training_jobs, with_tokens

AUTO: dict[str, Any] = {"tokens": "auto", "microbatches": 1, "epochs": 1}


@pytest.fixture(autouse=True)
def _build_for_gpus_and_small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "built_for_gpus", lambda: True)
    monkeypatch.setattr(plan, "MAX_MEASURED", 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Enough events for 100 steps of 3,200 and of 6,400 positions, not of 12,800."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 300, 101) for _ in range(7200)]
    return write_data_folder(tmp_path_factory.mktemp("tokens") / "data", histories)


def config_of(folder: DataFolder, *overrides: str) -> RunConfig:
    tree = {
        "model": {"name": "sasrec", "dim": 16, "layers": 1},
        "data": {"folder": str(folder.path), "max_length": 100},
        "training": AUTO,
        "cluster": {"workers": 1},
    }
    return parse_config(tree, overrides)


def with_gpu(memory: int | None, gpus: int = 1) -> list[Machine]:
    return [Machine("m", 16, 64 << 30, gpus, memory)]


def test_on_cpus_the_number_is_fixed(folder: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve_tokens(config_of(folder), folder, [Machine("m", 16, 64 << 30)])
    assert config.training.tokens == CPU_TOKENS == RunConfig().training.tokens
    assert "auto: 3,200 positions per microbatch (the number for CPUs)" in "".join(capsys.readouterr())
    number = with_tokens(config, 77)
    assert resolve_tokens(number, folder, with_gpu(80 << 30)) is number
    hidden = config_of(folder, "cluster.gpu=false")
    assert resolve_tokens(hidden, folder, with_gpu(80 << 30)).training.tokens == CPU_TOKENS


def test_an_epoch_keeps_its_steps_on_a_large_gpu(
    folder: DataFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = resolve_tokens(config_of(folder), folder, with_gpu(80 << 30))
    assert chosen.training.tokens == 6400
    assert f"with more, an epoch has less than {MIN_STEPS} steps" in "".join(capsys.readouterr())
    assert make_plan(chosen, folder, with_gpu(80 << 30)).num_steps >= MIN_STEPS
    # With few events the steps of CPU_TOKENS are kept, however few they are.
    assert resolve_tokens(config_of(folder, "training.microbatches=4"), folder, with_gpu(80 << 30)) == (
        with_tokens(config_of(folder, "training.microbatches=4"), CPU_TOKENS)
    )
    monkeypatch.setattr(tokens, "MIN_STEPS", 1)
    assert resolve_tokens(config_of(folder), folder, with_gpu(80 << 30)).training.tokens == GPU_TOKENS[0]


@pytest.mark.parametrize(
    ("gib", "alone", "beside"),
    [(40.0, 51_200, 51_200), (1.6, 51_200, 25_600), (1.1, 12_800, 6400), (0.8, 200, 200)],
)
def test_every_training_fits_the_smallest_gpu(
    folder: DataFolder,
    gib: float,
    alone: int,
    beside: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the run alone, and beside a baseline that needs more memory."""
    monkeypatch.setattr(tokens, "MIN_STEPS", 1)
    memory = int(gib * 2**30)
    for overrides, want in (
        ([], alone),
        (["evaluation.baselines=[{name: sasrec, label: wide, dim: 64}]"], beside),
    ):
        config = config_of(folder, *overrides)
        assert resolve_tokens(config, folder, with_gpu(memory)).training.tokens == want
        said = "".join(capsys.readouterr()).replace("\n", " ")
        jobs = training_jobs(with_tokens(config, want), Path())
        used = max(_on_gpu(job.config, folder) for job in jobs)
        assert f"{used / 2**30:.1f} GiB of a GPU" in said
        assert (used <= MEMORY_SHARE * memory) == (gib > 1)
        if GPU_TOKENS[-1] < want < GPU_TOKENS[0]:
            assert re.search(r"twice as many take \d\.\d GiB of a GPU", said)
            twice = training_jobs(with_tokens(config, 2 * want), Path())
            assert max(_on_gpu(job.config, folder) for job in twice) > MEMORY_SHARE * memory
    two = ["cluster.workers=2", "training.microbatches=2"]
    unequal = [*with_gpu(80 << 30), *with_gpu(memory)]
    assert resolve_tokens(config_of(folder, *two), folder, unequal).training.tokens == alone


def _on_gpu(config: RunConfig, folder: DataFolder) -> int:
    return make_plan(config, folder, with_gpu(80 << 30)).memory.total("device")


def test_unknown_memory_and_missing_room(folder: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(folder)
    assert resolve_tokens(config, folder, with_gpu(None)).training.tokens == CPU_TOKENS
    assert "the memory of the GPUs is unknown" in "".join(capsys.readouterr()).replace("\n", " ")
    config = config_of(folder, "cluster.gpu=true", "cluster.workers=2", "training.microbatches=2")
    with pytest.raises(FindRecError, match=r"tokens=auto cannot be chosen: 2 workers.*to a number\."):
        resolve_tokens(config, folder, with_gpu(80 << 30))


def test_the_choice_is_saved_with_the_run_and_kept_on_other_machines(
    folder: DataFolder, tmp_path: Path
) -> None:
    auto = config_of(folder, f"runs={tmp_path}")
    with pytest.raises(FindRecError, match="has no number before a run is started"):
        open_run_folder(auto)
    chosen = resolve_tokens(auto, folder, with_gpu(80 << 30))
    run = open_run_folder(chosen)
    assert read_run_config(run).training.tokens == chosen.training.tokens == 6400
    # Until there is a checkpoint, the run may be started with another number.
    assert read_run_config(open_run_folder(with_tokens(auto, 3200))).training.tokens == 3200
    open_run_folder(chosen)
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "checkpoints" / "step-00000004" / "manifest.json").write_text("{}")
    assert read_run_config(open_run_folder(auto)).training.tokens == 6400, "whatever the machines"
    with pytest.raises(FindRecError, match=r"training\.tokens: 6400 before, 3200 now"):
        open_run_folder(with_tokens(auto, 3200))
    assert run_folder(auto) == run


def test_the_checkpoints_are_those_of_the_number(folder: DataFolder) -> None:
    """A checkpoint is only continued with the plan of the tokens that were chosen."""
    digests = []
    for tokens_ in (3200, 6400):
        config = with_tokens(config_of(folder), tokens_)
        source: Any = object.__new__(_NoExamples)
        digests.append(plan_digest(config, folder, source))
    assert digests[0] != digests[1]
    with pytest.raises(FindRecError, match=r"training\.tokens=auto"):
        plan_digest(config_of(folder), folder, object.__new__(_NoExamples))  # type: ignore[arg-type]


class _NoExamples:
    def identity(self) -> list[object]:
        return []


def test_a_dry_run_says_what_is_chosen_and_why(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(machines, "this_machine", lambda: with_gpu(80 << 30)[0])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    dry_run.dry_run(config_of(folder, f"runs={tmp_path}", "evaluation.baselines=[]"))
    said = "".join(capsys.readouterr()).replace("\n", " ")
    assert re.search(r"auto: 6,400 positions per microbatch \(\d+\.\d GiB of a GPU; with more", said)
    assert "of up to 6,370 positions (65 x 98)" in said


@pytest.mark.parametrize("given", ["0", "-1", "many", "true"])
def test_other_values_are_refused(given: str) -> None:
    with pytest.raises(FindRecError, match=r"training\.tokens: .*number"):
        parse_config({}, [f"training.tokens={given}"])


def test_the_shipped_configurations_have_numbers() -> None:
    for name in ("demo", "shop", "complete-journey"):
        assert isinstance(load_config(name).training.tokens, int)
