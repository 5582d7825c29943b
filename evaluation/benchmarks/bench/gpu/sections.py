"""Runs the sections of the GPU benchmark, each in its own process and time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.gpu import card, collectives, kernels, resume, search, steps
from bench.gpu.report import write_report
from bench.gpu.setting import Figures, Setting, kill_tree

from findrec.progress import say


@dataclass(frozen=True)
class Section:
    """What is measured, and the seconds it may take."""

    title: str
    measure: Callable[[Setting], Iterator[Figures]]
    limit_s: float


# By what one wants to know first, as time may run out; the others compare with the card.
SECTIONS = {
    "card": Section("the card", card.bench_card, 40),
    "steps": Section("training steps", steps.bench_steps, 120),
    "scan": Section("selective scan", kernels.bench_scan, 90),
    "loss": Section("exact catalogue loss", kernels.bench_loss, 90),
    "resume": Section("a run that is killed and resumed", resume.bench_resume, 150),
    "ranking": Section("full-catalogue ranking", search.bench_ranking, 60),
    "faiss": Section("lists by FAISS", search.bench_faiss, 60),
    "nccl": Section("two processes", collectives.bench_two_processes, 60),
}
LEAST_S = 15  # a section is not begun with less


def run_section(name: str, setting: Setting) -> None:
    """Measure one section in this process; each figure is written as soon as it is known."""
    if setting.device == "cpu":
        torch.set_num_threads(1)
    with (setting.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for figures in SECTIONS[name].measure(setting):
            file.write(json.dumps(figures) + "\n")
            file.flush()


def run_all(names: Sequence[str], setting: Setting, *, limit_s: float, program: Path) -> int:
    """Run sections one after the other within `limit_s`; returns the number of those that failed."""
    end = time.monotonic() + limit_s
    ended: dict[str, str] = {}
    for name in names:
        (setting.out / f"{name}.jsonl").unlink(missing_ok=True)
        left = min(SECTIONS[name].limit_s * setting.patience, end - time.monotonic())
        if left < LEAST_S:
            ended[name] = "not begun: no time was left"
        else:
            start = time.monotonic()
            problem = _run_child(name, setting, program, left)
            ended[name] = problem or f"{time.monotonic() - start:.0f} s"
            say(f"{name}: {ended[name]}")
        try:
            write_report({name: SECTIONS[name].title for name in names}, ended, setting)
        except Exception:  # the next section writes it again
            traceback.print_exc()
    return sum(not status.endswith(" s") for status in ended.values())


def _run_child(name: str, setting: Setting, program: Path, limit_s: float) -> str:
    """Run a section in a process of its own; returns why it failed, or an empty text."""
    command = [sys.executable, str(program), "--out", str(setting.out), "--section", name]
    command += ["--device", setting.device, *(["--small"] if setting.small else [])]
    log = setting.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        code: int | None = None
        try:
            code = child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill_tree(child.pid)
            child.wait()
    if code is None:
        return f"ended after {limit_s:.0f} s; what it measured until then counts"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"failed with code {code}: {lines[-1][:200] if lines else 'no output'}" if code else ""
