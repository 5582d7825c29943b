"""Order of the tests."""

LONGEST = ("test_train_dist.py", "test_engine.py")


def pytest_collection_modifyitems(items):
    """The longest files first: with several workers (`make test`) none of them is left over at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
