"""Order of the tests, and what each leaves behind."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import emulated_card
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


@pytest.fixture(scope="session")
def card():
    """`card(function, *arguments)` runs a function of a module in a process with an emulated GPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=emulated_card.register) as process:
        yield lambda function, *args, **kwargs: process.submit(function, *args, **kwargs).result(120)
