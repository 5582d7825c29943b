"""Implements `findrec doctor`: reports what is installed and usable on this machine, with advice."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from findrec import __version__
from findrec.errors import FindRecError
from findrec.nvidia import Driver, choose_build, driver_problem, find_driver, find_nvcc
from findrec.paths import checkout, home

PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "mlflow", "duckdb", "pyarrow", "sentence-transformers")
NEEDED_DISK_GB = 2.0
NEEDED_MEMORY_GB = 4.0


@dataclass(frozen=True)
class Finding:
    """One line of the report: `advice` says how to fix a problem, `fatal` that it prevents training."""

    what: str
    value: str
    advice: str = ""
    fatal: bool = False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        version = _version(name)
        advice = "" if version else "run `make setup`, or `pip install` FindRec into this Python"
        findings.append(Finding(name, version or "missing", advice, fatal=version is None))
    faiss = [f"{name} {version}" for name in ("faiss-cpu", "faiss-gpu") if (version := _version(name))]
    advice = {
        0: "install exactly one of the extras `cpu` and `gpu`",
        1: "",
        2: "both own the same files: `pip uninstall faiss-cpu faiss-gpu`, then install one extra",
    }[len(faiss)]
    findings.append(Finding("faiss", ", ".join(faiss) or "missing", advice or _faiss_problem(faiss)))
    findings.append(Finding("mamba_ssm", _version("mamba-ssm") or "none (optional, on CUDA only)"))
    return findings


def _faiss_problem(installed: list[str]) -> str:
    """Why the installed FAISS does not work; empty if it does."""
    from findrec.evaluation.search.faiss_library import need_faiss

    try:
        need_faiss()
    except FindRecError as error:
        return str(error) if installed else ""
    return ""


def _compiler() -> Finding:
    name = next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and shutil.which(c)), None)
    if name is None:
        advice = "the CPU scan falls back to a slower one; Debian/Ubuntu: sudo apt install g++"
        return Finding("C++ compiler", "missing", advice)
    shown = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    return Finding("C++ compiler", shown.splitlines()[0] if shown else name)


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return None


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    findings = [
        Finding("CPU cores usable", str(cores), "" if cores else "no CPU may be used", fatal=not cores)
    ]
    memory = _memory_gb()
    if memory is not None:
        small = memory < NEEDED_MEMORY_GB
        findings.append(
            Finding(
                "memory", f"{memory:.1f} GB", f"under {NEEDED_MEMORY_GB:.0f} GB is tight" if small else ""
            )
        )
    if os.path.isdir("/dev/shm"):
        shm = shutil.disk_usage("/dev/shm").total / 1e9
        advice = (
            "Ray falls back to slow files on disk: start the container with --shm-size=2g" if shm < 1 else ""
        )
        findings.append(Finding("shared memory", f"{shm:.1f} GB", advice))
    home_folder = home()
    existing = next(folder for folder in (home_folder, *home_folder.parents) if folder.is_dir())
    writable = os.access(existing, os.W_OK)
    findings.append(
        Finding(
            "home (data, runs)",
            str(home_folder),
            "" if writable else "not writable: set FINDREC_HOME to a folder that is",
            fatal=not writable,
        )
    )
    free = shutil.disk_usage(existing).free / 1e9
    advice = f"under {NEEDED_DISK_GB:.0f} GB is little for data and runs" if free < NEEDED_DISK_GB else ""
    findings.append(Finding("disk free in home", f"{free:.1f} GB", advice))
    findings.append(
        Finding("Ray cluster", os.environ.get("RAY_ADDRESS", "not set: one is started for each run"))
    )
    return findings


def _accelerator() -> list[Finding]:
    driver = find_driver()
    findings = [_driver(driver)] if driver is not None else []
    if _version("torch") is None:
        return findings
    import torch

    from findrec.ops.scan.selective_scan import scan_backend

    device = "cpu"
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus]
        findings.append(Finding("GPUs", f"{', '.join(names)}; PyTorch for CUDA {torch.version.cuda}"))
        nvcc = find_nvcc()
        shown = f"{nvcc[0]} of CUDA {nvcc[1]}" if nvcc else "none (only mamba-ssm needs it)"
        findings.append(Finding("CUDA compiler", shown))
        device = "cuda"
    else:
        findings.append(Finding("GPUs", "none", _why_no_gpu(driver, torch.version.cuda)))
    try:
        findings.append(Finding("selective scan", f"{scan_backend(device)} on {device}"))
    except FindRecError as error:
        findings.append(Finding("selective scan", "unusable", str(error), fatal=True))
    return findings


def _driver(driver: Driver) -> Finding:
    if driver.version:
        return Finding("NVIDIA driver", f"{driver.version}, {', '.join(driver.gpus)}")
    advice = "mend or install the driver (Ubuntu: sudo ubuntu-drivers install) and restart the machine"
    return Finding("NVIDIA driver", f"does not work: {driver.problem}", advice)


def _why_no_gpu(driver: Driver | None, cuda: str | None) -> str:
    """Why PyTorch, built for CUDA version `cuda` or for CPUs, sees no GPU though there is a driver."""
    if driver is None or not driver.version:
        return ""
    choice = choose_build(driver)
    if choice.build is None:
        return f"training uses the CPU: {choice.reason}. Install a newer driver, then set up anew"
    anew = f"delete .venv and run `make setup`, which installs the build for CUDA {choice.build.cuda}"
    if cuda is None:
        return f"there is a GPU, but this PyTorch is the build for CPUs: {anew}"
    if problem := driver_problem(driver, cuda):
        return f"{problem}: {anew}; or install a newer driver"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} may hide the GPUs"
    return f"CUDA does not start: {_cuda_error()}"


def _cuda_error() -> str:
    """What PyTorch says when it starts CUDA."""
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:300]
    return "no reason is given"


def examine() -> list[Finding]:
    """Run all checks; may compile the CPU scan once, which takes a minute."""
    kind = "checkout" if checkout() else "installed"
    return [
        Finding("findrec", f"{__version__} ({kind})"),
        Finding("python", f"{platform.python_version()} {sys.executable}"),
        *_packages(),
        _compiler(),
        *_machine(),
        *_accelerator(),
    ]


def format_findings(findings: list[Finding]) -> str:
    """Aligned lines, each followed by its advice, and a final summary line."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        mark = "!!" if finding.fatal else " !" if finding.advice else "  "
        lines.append(f"{mark} {finding.what:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"   {'':<{width}}  -> {finding.advice}")
    fatal = sum(finding.fatal for finding in findings)
    hints = sum(bool(finding.advice) and not finding.fatal for finding in findings)
    verdict = f"{fatal} to fix before training" if fatal else "ready to train"
    lines.append(f"{verdict}{f', {hints} to consider' if hints else ''}")
    return "\n".join(lines)
