"""Which workers are reported as hung; what is known of a thread from outside."""

import threading

import pytest

from findrec.cluster.heartbeat import find_hung, thread_position
from findrec.cluster.heartbeat_registry import HeartbeatRegistry, ObservedStatus, WorkerStatus
from findrec.cluster.plan.placement import min_workers, shareable
from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.progress import progress
from findrec.training.worker import Heartbeat


def seen(rank, *, silent_s=0.0, still_s=0.0, doing="training", waits=False, longest_s=0.1):
    status = WorkerStatus(rank, "n", "h", 100 + rank, doing, 7, 21, longest_s, waits, "loop.py:1 (step)")
    return ObservedStatus(status, silent_s, still_s)


def hung(*workers, hang_s=60, timeout_s=300):
    return [s.status.rank for s in find_hung(workers, hang_s=hang_s, timeout_s=timeout_s)]


def test_no_worker_hangs_while_one_makes_progress():
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


def test_the_registry_keeps_the_last_status_and_passes_the_stop_request_on():
    registry = HeartbeatRegistry()
    assert registry.beat(seen(1).status) is False
    assert registry.beat(seen(0).status) is False
    registry.request_stop()
    assert registry.beat(seen(1).status) is True
    assert [s.status.rank for s in registry.statuses()] == [0, 1]
    assert all(s.still_s >= s.silent_s >= 0 for s in registry.statuses())


def test_a_heartbeat_reports_what_the_worker_does():
    heartbeat = Heartbeat()
    assert heartbeat.doing == "starting"
    heartbeat.tick(step=1)
    with heartbeat.busy("saving"):
        assert heartbeat.doing == "saving"
    assert (heartbeat.doing, heartbeat.step, heartbeat.ticks) == ("training", 1, 2)


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
    waits, line = thread_position(thread.ident)
    done.set()
    thread.join()
    assert not waits
    assert line.startswith("findrec/progress.py:")


@pytest.mark.parametrize(("room", "workers"), [(8, 6), (6, 6), (5, 4), (3, 3), (1, 1), (0, 0)])
def test_workers_divide_the_microbatches(room, workers):
    config = parse_config({"training": {"microbatches": 12}, "cluster": {"workers": 6, "min_workers": 1}})
    assert shareable(config, room) == workers
    assert min_workers(config) == 1


def test_more_at_least_than_at_most_is_refused():
    with pytest.raises(FindRecError, match=r"cluster\.min_workers=4 is more than cluster.workers=2"):
        parse_config({"cluster": {"workers": 2, "min_workers": 4}})
