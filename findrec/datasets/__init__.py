"""Data sets: sources, preparation, data folders, features and batches."""

from findrec.datasets.folder.webdataset_pipeline import as_webdataset

__all__ = ["as_webdataset"]
