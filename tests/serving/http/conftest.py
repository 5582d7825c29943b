"""The trained run of these tests."""

from small_run import data, run, trained

__all__ = ["data", "run", "trained"]
