"""Handlers of signals: called inside the context only, and never for a signal that is ignored."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from findrec.sigterm import handles_sigterm


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_terminal_is_handled_like_sigterm() -> None:
    received: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where the tests themselves run under nohup
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with handles_sigterm(lambda number, _: received.append(number)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == [signal.SIGTERM, signal.SIGHUP]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before


def test_nohup_stays_in_force() -> None:
    received: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handles_sigterm(lambda number, _: received.append(number)):
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert received == []
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
