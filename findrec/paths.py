"""Resolves the paths of data, runs and bundled files to absolute paths.

Relative `data/`, `runs/` and MLflow paths are resolved against `FINDREC_HOME`. Without it the root of the
source checkout is used, or `~/findrec` for an installed package. A Ray job runs in a temporary copy of the
checkout, which is never used; instead it uses the checkout from which FindRec was installed in editable mode
(by `make setup`), so that the job finds the data and runs of the user who submitted it.
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
    """The absolute folder against which relative data, run and store paths are resolved."""
    configured = os.environ.get("FINDREC_HOME")
    if configured:
        return _without_tilde(configured).resolve()
    root = checkout()
    if root is not None and RAY_COPY not in root.parts:
        return root
    return _editable_checkout() or _without_tilde("~/findrec")


def _editable_checkout() -> Path | None:
    """The folder of an editable install, from the record written by pip (PEP 610)."""
    try:
        record = json.loads(importlib.metadata.distribution("findrec").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return None
    if not record.get("dir_info", {}).get("editable"):
        return None
    root = Path(unquote(urlparse(record["url"]).path))
    return root if (root / "configs").is_dir() else None


def _without_tilde(path: str | Path) -> Path:
    """A path with `~` replaced by the user's home; FindRecError if the system knows no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FindRecError(
            f"{path} cannot be found: this user has no home folder. Set FINDREC_HOME (or HOME) to a writable "
            "folder, or give an absolute path."
        ) from None


def resolve(path: str | Path) -> Path:
    """The absolute form of a path from a configuration; relative paths are below `home()`."""
    expanded = _without_tilde(path)
    return expanded if expanded.is_absolute() else home() / expanded


def find_run(name: str, runs: str = "runs", *, here: bool = True) -> Path:
    """The run folder for a path or a name below `runs`; FindRecError lists the known runs.

    With `here`, paths may also be relative to the working directory (for commands, never for jobs).
    """
    candidates = [resolve(name), resolve(runs) / name]
    if here:
        candidates.insert(0, _without_tilde(name).resolve())
    for candidate in candidates:
        if (candidate / "config.yaml").is_file():
            return candidate
    known = sorted(p.parent.name for p in resolve(runs).glob("*/config.yaml"))
    raise FindRecError(
        f"no run called {name!r}: there is no config.yaml in {candidates[0]} or {candidates[-1]}"
        f"{suggest(name, known)} (runs there: {', '.join(known) or 'none'}). "
        "A run folder is made by `findrec train CONFIG`."
    )


def data_folder_candidates(name: str) -> list[Path]:
    """Where a data folder called `name` may be: a path from here or the home, or a name below `data/`.

    The file name of a recipe stands for the folder that `findrec prepare` makes of it.
    """
    stem = name.removesuffix(".yaml")
    given = [Path(name).expanduser().resolve(), resolve(name), resolve("data") / name]
    return [*given, resolve("data") / Path(stem).name] if stem != name else given


def find_data_folder(name: str) -> Path:
    """The existing data folder for a path, a name below `data/` or a recipe's file; lists them otherwise."""
    candidates = data_folder_candidates(name)
    for candidate in candidates:
        if (candidate / "manifest.json").is_file():
            return candidate
    if (given := next((path for path in candidates if path.is_dir()), None)) is not None:
        return given  # its manifest is reported as missing
    known = sorted(path.parent.name for path in resolve("data").glob("*/manifest.json"))
    raise FindRecError(
        f"no data folder called {name!r}: looked for {candidates[0]} and {candidates[-1]}"
        f"{suggest(name, known)} (in {resolve('data')}: {', '.join(known) or 'none'}). "
        "A data folder is made by `findrec prepare RECIPE`."
    )


def find_asset(name: str, kind: str, suffix: str = ".yaml") -> Path:
    """The file for `name`: tried as a path, then in the checkout, then in the package.

    `kind` is the folder that contains it (`datasets`, `configs`, ...). Raises FindRecError if there is none.
    """
    folders = [root / kind for root in (checkout(), home(), PACKAGE / "assets") if root is not None]
    candidates = [_without_tilde(name), resolve(name)]
    if (root := checkout()) is not None:
        candidates.append(root / name)
    candidates += [folder / f"{name}{suffix}" for folder in folders]
    candidates += [PACKAGE / "assets" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    known = sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob(f"*{suffix}")})
    raise FindRecError(
        f"no {kind} file called {name!r}: looked for that path and for {name.removesuffix(suffix)}{suffix} "
        f"in {', '.join(str(f) for f in folders)}{suggest(Path(name).stem, known)} "
        f"(there: {', '.join(known) or 'none'}). Give one of these names or a path to a YAML file."
    )


def drop_checkout_from_sys_path() -> None:
    """Keep the checkout's `datasets/` folder from shadowing the Hugging Face package of that name.

    `python -m` puts the working directory on `sys.path`, where even a folder without `__init__.py` is found
    by `find_spec("datasets")`. FindRec's own submodules resolve through the imported package.
    """
    root = str(PACKAGE.parent)
    if checkout() is None:
        return
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != root]


@contextmanager
def checkout_hidden() -> Iterator[None]:
    """Apply `drop_checkout_from_sys_path` inside the context only.

    A process spawned later inherits `sys.path` and would not find an editable install of FindRec without it.
    """
    before = list(sys.path)
    drop_checkout_from_sys_path()
    try:
        yield
    finally:
        sys.path[:] = before
