"""The small data folder and the trained run of these tests."""

from small_run import data, folder, histories, run, trained

__all__ = ["data", "folder", "histories", "run", "trained"]
