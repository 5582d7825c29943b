"""The looks that all pages share: one file each, no scripts, nothing fetched, light and dark, any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from findrec.files import replacing

_TEMPLATES = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
    loader=jinja2.PackageLoader("findrec", "evaluation"),
)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template below `findrec/evaluation/` and write the page atomically.

    The template extends `display/frame.html.j2`; all values are escaped.
    """
    with replacing(path) as part:
        part.write_text(_TEMPLATES.get_template(template).render(**values), encoding="utf-8")
    return path
