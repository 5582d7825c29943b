"""The report of the GPU benchmark: report.json, and the same as Markdown tables in report.md."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from bench.gpu.setting import Figures, Setting

from findrec.environment import machine, source_revision
from findrec.nvidia import find_driver

PACKAGES = ("triton", "mamba-ssm", "liger-kernel", "faiss-gpu", "faiss-cpu", "deepspeed", "ray")


def describe_card() -> Figures:
    """The card, its driver, and the versions that figures depend on."""
    driver = find_driver()
    found: Figures = {**machine(), "system": platform.platform(), "revision": source_revision()}
    found["driver"] = driver.version if driver else None
    found["CUDA of PyTorch"] = torch.version.cuda
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu memory, GiB"] = round(properties.total_memory / 2**30, 1)
        found["gpus"] = torch.cuda.device_count()
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_report(titles: Mapping[str, str], ended: Mapping[str, str], setting: Setting) -> None:
    """Write both files from what the sections have measured so far; `ended` says how each one ended."""
    card = describe_card()
    sections = {name: {"ended": ended.get(name), "rows": setting.rows_of(name)} for name in titles}
    whole = {"machine": card, "small": setting.small, "device": setting.device, "sections": sections}
    _replace(setting.out / "report.json", json.dumps(whole, indent=1) + "\n")
    lines = [f"# {card['gpu'] or 'No GPU: ' + str(card['cpu'])}", ""]
    if setting.small:
        lines += ["A rehearsal with small sizes: the figures mean nothing.", ""]
    lines += [f"* {name}: {value}" for name, value in card.items() if value is not None]
    for name, title in titles.items():
        lines += ["", f"## {title} ({ended.get(name, 'not begun yet')})", ""]
        lines += _table(setting.rows_of(name))
    _replace(setting.out / "report.md", "\n".join(lines) + "\n")


def _table(rows: Sequence[Figures]) -> list[str]:
    if not rows:
        return ["No figures."]
    head = ("what", "shape", "figure", "share of the card's", "times faster than", "memory, MiB", "note")
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---|---|---:|---|"]
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:,.4g} {row['unit']}".strip()
        share = f"{row['share']:.1%} {row['of']}" if "share" in row else ""
        times = f"{row['times']:.2f} {row['against']}" if "times" in row else ""
        peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else ""
        cells = (row["what"], row["shape"], value, share, times, peak, str(row.get("note", "")))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return lines


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
