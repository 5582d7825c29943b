"""Hooks of MkDocs: the guides beside what they describe become pages, at their paths in the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from findrec.cli.config import documented
from findrec.models.configs import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "*.md",
    "docs/*.md",
    "datasets/*.md",
    "cluster/*.md",
    "evaluation/*.md",
    "evaluation/*/*.md",
    "findrec/models/README.md",
    "findrec/models/*/README.md",
)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
KEYS = "docs/keys.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages and the files they link to, in place of the files of `docs_dir`."""
    for file in [one for one in files if one.src_dir == config.docs_dir]:
        files.remove(file)
    found = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    linked = {target for page in found for target in links(page) if target.suffix != ".md"}
    for path in [*found, *sorted(linked)]:
        place = path.relative_to(ROOT).as_posix()
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, KEYS, content=keys()))
    return files


def links(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path


def keys() -> str:
    """A page with all keys of a run configuration, and those of every model."""
    page = [
        "# Keys of a configuration",
        "",
        "Everything that `findrec train` accepts, with its default, as `findrec config` prints it. With the "
        "JSON schema of `findrec config --schema` editors complete and check configuration files.",
    ]
    for name in CONFIGS:
        lines = [line for line in documented(None, [f"model.name={name}"]) if not line.startswith("# Models")]
        if name != next(iter(CONFIGS)):
            lines = section(lines, "model:")
        page += ["", f"## {name}", "", "```yaml", *lines, "```"]
    return "\n".join(page) + "\n"


def section(lines: list[str], key: str) -> list[str]:
    """The lines of one section of the highest level."""
    begin = lines.index(key)
    further = (n for n in range(begin + 1, len(lines)) if not lines[n].startswith(" "))
    return lines[begin : next(further, len(lines))]
