"""The HTTP service under load and with faults: shared passes, requests that are refused, errors as JSON."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_service import Client, served, wait_for

from findrec.datasets.folder.data_folder import DataFolder
from findrec.serving.http.app import Limits, create_app
from findrec.serving.http.events import EventStore
from findrec.serving.lists import Lists, Recommended
from findrec.serving.recommender import Recommender


def test_faults_of_the_service_are_json(
    recommender: Recommender, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Broken(Recommender):
        def answer(self, *arguments: Any, **keys: Any) -> Lists[Recommended]:
            raise FileNotFoundError("a bug")  # no fault of the state file, though an OSError

    broken = Broken(recommender.config, recommender.folder, recommender.scorer)
    store = EventStore(tmp_path / "events.sqlite")
    with served(create_app(broken, store)) as port:
        client = Client(port)
        assert client.refused("/recommend", users=["0"]) == (
            500,
            "an error of the service, which its log explains",
        )
        assert client.headers["x-content-type-options"] == "nosniff"
        assert 'findrec_requests_total{path="/recommend",status="500"} 1.0' in client.get("/metrics")
        printed = "".join(capsys.readouterr())
        assert "ERROR: POST /recommend failed" in printed
        assert "FileNotFoundError: a bug" in printed

        store._file.execute("DROP TABLE events")
        for path, body in (
            ("/recommend", {"users": ["new"]}),
            ("/append", {"user": "0", "events": [{"item": "1"}]}),
        ):
            status, detail = client.refused(path, **body)
            assert (status, "cannot be read or stored now" in detail) == (503, True)


def value(metrics: str, name: str) -> float:
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


class Held(Recommender):
    """A recommender whose lists wait until `go` is set."""

    go: threading.Event

    def answer(self, *arguments: Any, **keys: Any) -> Lists[Recommended]:
        assert self.go.wait(20)
        return super().answer(*arguments, **keys)


@pytest.fixture
def held(recommender: Recommender) -> Held:
    made = Held(recommender.config, recommender.folder, recommender.scorer)
    made.go = threading.Event()
    return made


def test_concurrent_requests_share_passes_and_get_their_own_lists(
    held: Held, tmp_path: Path, data: DataFolder
):
    app = create_app(held, EventStore(tmp_path / "events.sqlite"), Limits(batch=64, wait_s=0))
    users = [str(user) for user in range(data.num_users)]
    with served(app) as port, ThreadPoolExecutor(len(users)) as threads:

        def ask(user: str) -> dict[str, Any]:
            answer: dict[str, Any] = Client(port).post("/recommend", users=[user], k=5)["lists"][0]
            return answer

        def arrived() -> float:
            metrics = Client(port).get("/metrics")
            return value(metrics, "findrec_batch_lists_sum") + value(metrics, "findrec_waiting_lists")

        asked = {user: threads.submit(ask, user) for user in users}
        wait_for(lambda: arrived() == len(users))
        held.go.set()
        answers = {user: one.result() for user, one in asked.items()}
        metrics = Client(port).get("/metrics")
    for user, want in zip(users, held.recommend(users, k=5), strict=True):
        assert [one["item"] for one in answers[user]["items"]] == want.items
        np.testing.assert_allclose([one["score"] for one in answers[user]["items"]], want.scores, atol=1e-4)
    assert value(metrics, "findrec_batch_lists_sum") == len(users)
    assert value(metrics, "findrec_batch_lists_count") <= 2  # the first began before the others came
    assert value(metrics, 'findrec_requests_total{path="/recommend",status="200"}') == len(users)
    assert value(metrics, 'findrec_request_seconds_count{path="/recommend"}') == len(users)


def test_too_many_requests_are_refused(held: Held, tmp_path: Path):
    app = create_app(held, EventStore(tmp_path / "events.sqlite"), Limits(batch=2, wait_s=0, waiting=4))
    with served(app) as port, ThreadPoolExecutor(10) as threads:

        def ask(users: Sequence[str]) -> Any:
            client = Client(port)
            body = json.dumps({"users": users}).encode()
            return client.send("POST", "/recommend", body), client.headers.get("retry-after")

        first = threads.submit(ask, ["0", "1"])
        wait_for(lambda: "findrec_batch_lists_count 1.0" in Client(port).get("/metrics"))
        waiting = [threads.submit(ask, [str(user), "3"]) for user in (1, 2)]
        wait_for(lambda: "findrec_waiting_lists 4.0" in Client(port).get("/metrics"))
        (status, content), retry = ask(["5"])
        assert (status, retry) == (429, "1")
        assert "come again" in content["detail"]
        assert Client(port).get("/health")["status"] == "ok"  # alive all the while
        held.go.set()
        for one in (first, *waiting):
            assert one.result()[0][0] == 200
        assert ask(["5"])[0][0] == 200


def test_a_small_queue_refuses_no_request_for_ever(recommender: Recommender, tmp_path: Path):
    limits = Limits(waiting=1)
    with served(create_app(recommender, EventStore(tmp_path / "events.sqlite"), limits)) as port:
        assert len(Client(port).post("/recommend", users=["0", "1", "2"], k=1)["lists"]) == 3
        assert len(Client(port).post("/similar", items=["1", "2"], k=1)["lists"]) == 2


def test_too_many_connections_are_refused(recommender: Recommender, tmp_path: Path):
    limits = Limits(waiting=1)
    with (
        served(create_app(recommender, EventStore(tmp_path / "events.sqlite"), limits), limits) as port,
        ExitStack() as opened,
    ):
        for _ in range(limits.connections):
            opened.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert Client(port).send("GET", "/health")[0] == 503
        opened.close()
        wait_for(lambda: Client(port).send("GET", "/health")[0] == 200)
