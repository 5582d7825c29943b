"""The trained run of these tests."""

from pathlib import Path

import pytest
from small_run import data, run, trained

from findrec.serving.recommender import Recommender

__all__ = ["data", "run", "trained"]


@pytest.fixture(scope="module")
def recommender(trained: Path) -> Recommender:
    """It, loaded."""
    return Recommender.load(trained)
