"""Copies what people edit (recipes, configurations, cluster files) into the wheel as `findrec/assets/`.

The top-level folders are no packages: an importable `datasets` would shadow Hugging Face's. An editable
install reads them in place; `findrec.paths.find_asset` knows both. All else is in `pyproject.toml`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ASSETS = ("datasets", "configs", "cluster", "evaluation/protocols")


class BuildWithAssets(build_py):
    """`build_py`, then the assets."""

    def run(self) -> None:
        """Build, and copy the assets unless this is an editable install."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "findrec" / "assets"
        for folder in ASSETS:
            if (ROOT / folder).is_dir():
                shutil.copytree(
                    ROOT / folder,
                    target / folder,
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"),
                )


setup(cmdclass={"build_py": BuildWithAssets})
