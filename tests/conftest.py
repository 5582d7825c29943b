"""Order of the tests, and what each leaves behind."""

import os
import sys

import pytest
import torch

LONGEST = ("test_train_dist.py", "test_failures.py", "test_engine.py", "test_beside.py")

# Triton reads this when it is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """The longest files first: with several workers (`make test`) none of them is left over at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def same_import_path(monkeypatch):
    """Entry points take the checkout off `sys.path`; processes that later tests spawn need it there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
