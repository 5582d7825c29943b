"""The memory that is logged is that of the worker that holds most."""

from forked import forked
from memory_on_workers import work


def test_all_workers_log_what_the_largest_holds(tmp_path):
    with forked(work, 3, str(tmp_path / "meeting"), str(tmp_path / "logged"), 300):
        pass
    first, *others = [float((tmp_path / f"logged.{rank}").read_text()) for rank in range(3)]
    assert others == [first, first]
    assert 0.58 < first < 0.58 + 2  # 600 MiB of numbers, and the libraries
