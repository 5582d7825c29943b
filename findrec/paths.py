"""Where things are: every path becomes absolute here, never from a job's throw-away directory.

`FINDREC_HOME` is the folder below which relative `data/`, `runs/` and the MLflow store lie. Without it,
a checkout's root is the home, and an installed package uses `~/findrec`. A Ray job runs in a copy of
the checkout below Ray's session folder; the submitter's home must therefore be handed over
(`RAY_JOB_HOME_HINT`: see `findrec/cluster/launch.py`), and a home below a Ray session folder is refused.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from findrec.errors import FindRecError, suggest

PACKAGE = Path(__file__).resolve().parent
ASSET_KINDS = ("datasets", "configs", "cluster", "evaluation")


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
    if root is None or "runtime_resources" in root.parts:
        # Inside a Ray job the checkout is a throw-away copy: what is written there is lost.
        return Path.home() / "findrec"
    return root


def resolve(path: str | Path) -> Path:
    """Absolute form of a path given in a configuration (relative ones lie below `home()`)."""
    given = Path(path).expanduser()
    return given if given.is_absolute() else home() / given


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
