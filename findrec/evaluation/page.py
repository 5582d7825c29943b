"""The looks that all pages share: one file each, no scripts, nothing fetched, light and dark, any width."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{% block title %}{% endblock %}</title>
<style>
:root { --paper: #fdfdfb; --ink: #1d2329; --soft: #5b646d; --line: #dcdfe3; --tint: #f1f3f2;
        --mark: #0b6e69; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15191d; --ink: #e4e7ea; --soft: #9aa4ae; --line: #323940; --tint: #1e2429;
          --mark: #55c2b8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem clamp(.9rem, 3vw, 1.25rem) 4rem; max-width: 68rem;
       background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
body.broad { max-width: 100rem; }
h1 { margin: 0; font-size: 1.9rem; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p.note, figcaption, dt, .soft { color: var(--soft); font-size: .9rem; }
p.note { max-width: 52rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .5rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
a { color: var(--mark); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { width: 100%; }
.dense { font-size: .82rem; }
th, td { padding: .35rem .5rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
.dense th, .dense td { padding: .2rem .4rem; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.words { text-align: left; max-width: 18rem; overflow: hidden; text-overflow: ellipsis; }
.first { border-left: 3px solid var(--paper); }
td.best { color: var(--mark); font-weight: 650; }
td small { color: var(--soft); }
.curves { display: grid; gap: 1.25rem;
          grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.broad-figure { grid-column: 1 / -1; }
figure { margin: 0 0 1rem; } figure img { width: 100%; height: auto; }
article { margin: 1rem 0; padding: 1rem 1.2rem; background: var(--tint); border-radius: .5rem; }
article h3 { margin-top: 0; }
.columns { display: grid; gap: 1.5rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
ol, ul { margin: 0; padding-left: 1.4rem; } li { overflow-wrap: anywhere; }
li img { height: 2.6rem; width: auto; vertical-align: middle; border-radius: .2rem; margin: .1rem .3rem; }
li.hit { color: var(--mark); font-weight: 650; }
pre { padding: 1rem; background: var(--tint); border-radius: .5rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body{% block body_class %}{% endblock %}>
{% block body %}{% endblock %}
</body>
</html>
"""


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill in a template that extends `frame` (everything is escaped) and write it in one rename."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.DictLoader({"frame": _FRAME, "page": template}),
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(environment.get_template("page").render(**values), encoding="utf-8")
    return temporary.replace(path)
