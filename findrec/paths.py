"""Where things are: every path becomes absolute here, never from a job's throw-away directory.

`FINDREC_HOME` is the folder below which relative `data/`, `runs/` and the MLflow store lie. Without it,
a checkout's root is the home, and an installed package uses `~/findrec`. A Ray job runs in a throw-away copy
of the checkout, which is never a home: there the checkout that FindRec was installed from in editable mode
(`make setup` does that) is used, so that a job finds the data and runs of the one who submitted it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from findrec.errors import FindRecError, suggest

PACKAGE = Path(__file__).resolve().parent
RAY_COPY = "runtime_resources"  # Ray unpacks a job's working directory below a folder of this name


def checkout() -> Path | None:
    """The root of the source checkout this package is run from, or None when it is installed."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "configs").is_dir() else None


def home() -> Path:
    """The absolute folder that relative data, run and store paths are resolved against."""
    given = os.environ.get("FINDREC_HOME")
    if given:
        return Path(given).expanduser().resolve()
    root = checkout()
    if root is not None and RAY_COPY not in root.parts:
        return root
    return _editable_checkout() or Path.home() / "findrec"


def _editable_checkout() -> Path | None:
    """The folder an editable install points to, from the record pip leaves (PEP 610)."""
    try:
        record = json.loads(importlib.metadata.distribution("findrec").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return None
    if not record.get("dir_info", {}).get("editable"):
        return None
    root = Path(unquote(urlparse(record["url"]).path))
    return root if (root / "configs").is_dir() else None


def resolve(path: str | Path) -> Path:
    """Absolute form of a path given in a configuration (relative ones lie below `home()`)."""
    given = Path(path).expanduser()
    return given if given.is_absolute() else home() / given


def find_run(name: str, runs: str = "runs", *, here: bool = True) -> Path:
    """The run folder a user means, a path or a name below `runs`; FindRecError lists the known ones.

    `here`: a path may be relative to the working directory (a command's, never a job's).
    """
    candidates = [resolve(name), resolve(runs) / name]
    if here:
        candidates.insert(0, Path(name).expanduser().resolve())
    for candidate in candidates:
        if (candidate / "config.yaml").is_file():
            return candidate
    known = sorted(p.parent.name for p in resolve(runs).glob("*/config.yaml"))
    raise FindRecError(
        f"no run called {name!r}: there is no config.yaml in {candidates[0]} or {candidates[-1]}"
        f"{suggest(name, known)} (runs there: {', '.join(known) or 'none'}). "
        "A run folder is made by `findrec train CONFIG`."
    )


def find_asset(name: str, kind: str, suffix: str = ".yaml") -> Path:
    """The file a user means by `name`: a path, then one in the checkout, then one in the package.

    `kind` is the folder it belongs to (`datasets`, `configs`, ...).
    """
    folders = [root / kind for root in (checkout(), home(), PACKAGE / "assets") if root is not None]
    candidates = [Path(name).expanduser(), resolve(name)]
    if (root := checkout()) is not None:
        candidates.append(root / name)
    candidates += [folder / f"{name}{suffix}" for folder in folders]
    candidates += [PACKAGE / "assets" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    known = sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob(f"*{suffix}")})
    raise FindRecError(
        f"no {kind} file called {name!r}: looked for that path and for {name}{suffix} in "
        f"{', '.join(str(f) for f in folders)}{suggest(Path(name).stem, known)} "
        f"(there: {', '.join(known) or 'none'}). Give one of these names or a path to a YAML file."
    )


def drop_checkout_from_sys_path() -> None:
    """Keep the checkout's plain `datasets/` folder from shadowing Hugging Face's package of that name.

    Started as `python -m` from the root, Python puts the root on `sys.path`, where even a plain folder
    answers `find_spec("datasets")`. FindRec's own submodules resolve through the imported package.
    """
    root = str(PACKAGE.parent)
    if checkout() is None:
        return
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != root]


@contextmanager
def checkout_hidden() -> Iterator[None]:
    """`drop_checkout_from_sys_path` for a while: a process spawned later takes over `sys.path`, and would not
    find an editable install of FindRec itself.
    """
    before = list(sys.path)
    drop_checkout_from_sys_path()
    try:
        yield
    finally:
        sys.path[:] = before
