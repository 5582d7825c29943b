"""Which workers are reported as hung; what is known of a thread from outside."""

import json
import threading
import time

import pytest
from forked import forked
from hanging_on_workers import CALLS, work

from findrec.cluster.heartbeat import describe_hang, find_hung, thread_position
from findrec.cluster.heartbeat_registry import HeartbeatRegistry, ObservedStatus, WorkerStatus
from findrec.cluster.plan.placement import min_workers, shareable
from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.progress import progress
from findrec.training.worker import Heartbeat


def seen(rank, *, silent_s=0.0, still_s=0.0, doing="training", waits=False, longest_s=0.1, **collectives):
    status = WorkerStatus(
        *(rank, "n", "h", 100 + rank, doing, 7, 21, longest_s, waits, "loop.py:1 (step)"), **collectives
    )
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


def on_gpu(rank, collectives, name, **values):
    """A worker that makes no progress, after a number of asynchronous collective calls."""
    values |= {"asynchronous": True, "collectives": collectives, "collective": name}
    return seen(rank, still_s=61, **values)


def test_on_gpus_the_one_that_did_not_enter_a_collective_call_is_blamed():
    blocked = [on_gpu(rank, 9, "sum of the losses") for rank in (0, 2)]  # in `tolist`, not in a call
    behind = on_gpu(1, 8, "update of the tower")
    assert hung(blocked[0], behind, blocked[1]) == [1]
    text = describe_hang([behind], [blocked[0], behind, blocked[1]])
    assert text == (
        "rank 1 (process 101 on h), training, step 7, at loop.py:1 (step): no progress for 61 s, "
        "while the others wait in: sum of the losses"
    )


def test_on_gpus_workers_that_entered_the_same_calls_are_told_apart_by_where_they_are():
    inside, outside = (on_gpu(rank, 9, "update of the tower", waits=rank == 0) for rank in (0, 1))
    assert hung(inside, outside) == [1]
    assert hung(inside, on_gpu(1, 9, "update of the tower", waits=True)) == [0, 1]


def test_on_a_cpu_the_number_of_calls_does_not_matter():
    worker = seen(1, still_s=61, waits=True, collectives=3, collective="sum of the losses")
    other = seen(0, still_s=61, collectives=4, collective="update of the tower")
    assert hung(other, worker) == [0]
    assert "while the others wait" not in describe_hang([other], [other, worker])


@pytest.mark.parametrize("late", [0, 2])
def test_the_worker_that_did_not_join_is_named_though_all_wait_outside_of_the_call(tmp_path, late):
    """Three processes; the calls return at once, as with NCCL, and each waits for its result later."""
    with forked(work, 3, str(tmp_path / "meeting"), str(tmp_path), late):
        statuses, deadline = [], time.monotonic() + 60
        while not statuses or {s.collectives for s in statuses if s.rank != late} != {CALLS}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            files = list(tmp_path.glob("status-*.json"))
            statuses = [WorkerStatus(**json.loads(file.read_text())) for file in files if len(files) == 3]
        assert not any(status.waits for status in statuses)
        observed = [ObservedStatus(status, 0, 61) for status in statuses]
        named = find_hung(observed, hang_s=60, timeout_s=300)
        assert [s.status.rank for s in named] == [late]
        assert describe_hang(named, observed).endswith("wait in: sum of the losses > reduction of values")
        (tmp_path / "go").touch()


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
