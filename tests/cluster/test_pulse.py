"""Who is to blame when workers stand still; what is known of a thread from outside."""

import threading

import pytest

from findrec.cluster.board import Board, Seen, Sign
from findrec.cluster.placement import least, shareable
from findrec.cluster.pulse import find_hung, whereabouts
from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.progress import progress
from findrec.training.worker import Pulse


def seen(rank, *, silent_s=0.0, still_s=0.0, doing="training", waits=False, longest_s=0.1):
    sign = Sign(rank, "n", "h", 100 + rank, doing, 7, 21, longest_s, waits, "loop.py:1 (step)")
    return Seen(sign, silent_s, still_s)


def hung(*workers, hang_s=60, timeout_s=300):
    return [s.sign.rank for s in find_hung(workers, hang_s=hang_s, timeout_s=timeout_s)]


def test_nobody_is_blamed_while_somebody_moves():
    assert hung() == []
    assert hung(seen(0, still_s=5), seen(1, still_s=500)) == []
    assert hung(seen(0, still_s=500), seen(1, still_s=500, doing="validating")) == []
    assert hung(seen(0, still_s=500, doing="starting"), seen(1, still_s=500, doing="starting")) == []


def test_the_one_the_others_wait_for_is_blamed():
    assert hung(seen(0, still_s=61, waits=True), seen(1, still_s=61)) == [1]
    assert hung(seen(0, still_s=61)) == [0]
    everybody = [seen(rank, still_s=61, waits=True) for rank in range(3)]
    assert hung(*everybody) == [0, 1, 2]


def test_slow_steps_are_no_hang():
    assert hung(seen(0, still_s=200, longest_s=50)) == []
    assert hung(seen(0, still_s=251, longest_s=50)) == [0]


def test_a_silent_process_is_blamed_whatever_it_did():
    for doing in ("training", "validating", "saving"):
        assert hung(seen(0), seen(1, silent_s=61, doing=doing)) == [1]
    assert hung(seen(0), seen(1, silent_s=61, doing="starting")) == []
    assert hung(seen(0), seen(1, silent_s=301, doing="starting")) == [1]


def test_the_board_keeps_the_last_sign_and_passes_the_stop_on():
    board = Board()
    assert board.beat(seen(1).sign) is False
    assert board.beat(seen(0).sign) is False
    board.ask_to_stop()
    assert board.beat(seen(1).sign) is True
    assert [s.sign.rank for s in board.look()] == [0, 1]
    assert all(s.still_s >= s.silent_s >= 0 for s in board.look())


def test_a_pulse_says_what_it_does():
    pulse = Pulse()
    assert pulse.doing == "starting"
    pulse.tick(step=1)
    with pulse.busy("saving"):
        assert pulse.doing == "saving"
    assert (pulse.doing, pulse.step, pulse.ticks) == ("training", 1, 2)


def test_a_thread_is_seen_from_outside():
    entered, done = threading.Event(), threading.Event()

    def clock():
        entered.set()
        done.wait(30)
        return 0.0

    def work():
        with progress("waiting", clock=clock):
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    entered.wait(30)
    waits, place = whereabouts(thread.ident)
    done.set()
    thread.join()
    assert not waits
    assert place.startswith("findrec/progress.py:")


@pytest.mark.parametrize(("room", "workers"), [(8, 6), (6, 6), (5, 4), (3, 3), (1, 1), (0, 0)])
def test_workers_divide_the_microbatches(room, workers):
    config = parse_config({"training": {"microbatches": 12}, "cluster": {"workers": 6, "min_workers": 1}})
    assert shareable(config, room) == workers
    assert least(config) == 1


def test_more_at_least_than_at_most_is_refused():
    with pytest.raises(FindRecError, match=r"cluster\.min_workers=4 is more than cluster.workers=2"):
        parse_config({"cluster": {"workers": 2, "min_workers": 4}})
