"""The documentation: the site builds, the tutorial runs as printed, quoted messages exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from findrec.baseline_configs import BASELINES
from findrec.cli.app import main
from findrec.config import parse_config
from findrec.evaluation.leaderboard.config import LeaderboardConfig
from findrec.models.configs import CONFIGS
from findrec.paths import PACKAGE
from findrec.schema import Part, validate
from findrec.serving.http.schemas import AppendRequest, RecommendRequest, SimilarRequest

ROOT = PACKAGE.parent
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in tmp_path.rglob("index.html")}
    assert {"index.html", "docs/tutorial/index.html", "docs/keys/index.html", "datasets/index.html"} <= pages
    assert "exclude_seen" in (tmp_path / "site/docs/reference/index.html").read_text(encoding="utf-8")
    foreign = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://")
    for page in tmp_path.rglob("*.html"):
        assert not foreign.search(page.read_text(encoding="utf-8")), f"{page} loads files of other hosts"


@pytest.mark.slow
@pytest.mark.ray
def test_the_tutorial_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("tutorial.md", "python"):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "findrec" in printed
    assert "leave-one-out, full catalogue (60 items)" in printed
    (commands,) = blocks("tutorial.md", "sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "findrec"
        assert main(arguments) == 0
    assert "SKU-" in capsys.readouterr().out


@pytest.mark.parametrize("page", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_leaderboards_and_keys_of_the_pages_are_valid(page: str) -> None:
    for block in blocks(page, "yaml"):
        validate(LeaderboardConfig, yaml.safe_load(block), page)
    text = (DOCS / page).read_text(encoding="utf-8")
    sections = "|".join(name for name, section in parse_config({}) if isinstance(section, Part))
    for span in re.findall(rf"`((?:{sections})\.[a-z_.]+=[^`]+)`", text):
        parse_config({}, span.split())


def test_requests_of_the_pages_are_valid() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    kinds: dict[str, type[BaseModel]] = {
        "/recommend": RecommendRequest,
        "/append": AppendRequest,
        "/similar": SimilarRequest,
    }
    shown = re.findall(r"^`(/\w+)`.*?```json\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert {path for path, _ in shown} == set(kinds)
    for path, body in shown:
        kinds[path].model_validate_json(body)


def messages() -> Iterator[str]:
    """All texts of the package; values that are inserted are left out."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_quoted_messages_are_those_of_the_program() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\*\*\"(.+?)\"\*\*:", text, re.MULTILINE)
    assert len(quoted) > 10
    known = "\n".join(messages())
    assert [one for one in quoted if one not in known] == []


def test_the_map_has_every_model_and_baseline() -> None:
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[?`([\w-]+)`", text, re.MULTILINE))
    assert listed == {*CONFIGS, *BASELINES}
