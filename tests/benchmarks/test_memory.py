"""Peak memory is that of the function alone, measured in a fresh process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bench.memory import peak_bytes, peak_rss_bytes

from findrec.errors import FindRecError

MIB = 2**20


def test_peak_does_not_depend_on_the_parent() -> None:
    held = b"x" * (256 * MIB)
    peak = peak_bytes(_fill, 64 * MIB)
    assert len(held) == 256 * MIB
    assert 60 * MIB < peak < 70 * MIB


def test_failure_is_reported() -> None:
    with pytest.raises(FindRecError, match="ZeroDivisionError"):
        peak_bytes(_fail)


def test_peak_of_this_process_is_plausible() -> None:
    assert 10 * MIB < peak_rss_bytes() < 1 << 40


def _fill(size: int) -> Callable[[], object]:
    return lambda: b"x" * size


def _fail() -> Callable[[], object]:
    return lambda: 1 // 0
