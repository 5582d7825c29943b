"""FindRec: training and full-catalogue evaluation of multimodal recommenders on very long histories.

`findrec.prepare`, `findrec.train` and `findrec.load` are described in `findrec.api`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from findrec.api import Run, load, prepare, train

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load", "prepare", "train"]


def __getattr__(name: str) -> Any:
    # Imported when used, so that commands and workers do not import what they do not need.
    if name in ("Run", "load", "prepare", "train"):
        return getattr(importlib.import_module("findrec.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
