"""The HTTP service gives the lists of the `Recommender` and checks its input."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_service import Client, served
from saved_run import save_run

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.serving.export.export import export_run
from findrec.serving.http.app import create_app
from findrec.serving.http.events import Append, Event, EventStore
from findrec.serving.lists import Lists, Recommended
from findrec.serving.recommender import Recommender


@pytest.fixture(scope="module")
def port(recommender: Recommender, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    store = EventStore(tmp_path_factory.mktemp("state") / "events.sqlite")
    with served(create_app(recommender, store)) as port:
        yield port


@pytest.fixture
def client(port: int) -> Client:
    return Client(port)


def same(answer: dict[str, Any], lists: Lists[Recommended]) -> None:
    """The response has the items and scores of the lists, digit for digit."""
    assert len(answer["lists"]) == len(lists)
    for got, want in zip(answer["lists"], lists, strict=True):
        assert [one["item"] for one in got["items"]] == want.items
        assert [one["score"] for one in got["items"]] == want.scores
        assert [one["title"] for one in got["items"]] == want.titles
        assert [one["columns"]["price"] for one in got["items"]] == want.more["price"]
        assert (got["time"], got["ranked_by"]) == (want.time, want.ranked_by)


def test_lists_are_those_of_the_recommender(client: Client, recommender: Recommender):
    for given in ({}, {"k": 3}, {"only": ["category=third 1", "price<30"]}, {"exclude_seen": True}):
        want = recommender.recommend(["4", "0"], **given)  # type: ignore[arg-type]
        same(client.post("/recommend", users=["4", "0"], **given), want)
    histories = [["5", "17"], ["9"], []]
    answer = client.post("/recommend", histories=[{"items": one} for one in histories], k=4)
    same(answer, recommender.recommend(histories=histories, k=4))
    assert answer["lists"][2]["ranked_by"] == "popularity"
    items, times = ["5", "17", "9"], [60, 120, 600]
    answer = client.post("/recommend", histories=[{"items": items, "times": times}])
    same(answer, recommender.recommend(histories=[items], times=[times]))
    assert client.post("/recommend", users=[]) == {"lists": []}


def test_unknown_items_of_a_history_are_named(client: Client, recommender: Recommender):
    answer = client.post("/recommend", histories=[{"items": ["5", "no", "17", "nor"], "times": [1, 2, 3, 4]}])
    same(answer, recommender.recommend(histories=[["5", "no", "17", "nor"]], times=[[1, 2, 3, 4]]))
    assert answer["lists"][0]["unknown_items"] == ["no", "nor"]


def test_similar_items(client: Client, recommender: Recommender):
    answer = client.post("/similar", items=["5", "17"], k=4, only=["price<30"])
    for got, want in zip(
        answer["lists"], recommender.similar_items(["5", "17"], 4, only=["price<30"]), strict=True
    ):
        assert (got["item"], got["title"]) == (want.item, want.title)
        assert [(one["item"], one["score"]) for one in got["items"]] == list(
            zip(want.items, want.scores, strict=True)
        )


def test_appended_events_extend_the_history(client: Client, recommender: Recommender, data: DataFolder):
    past = data.histories([7])
    items, times = list(map(str, past.item.tolist())), past.timestamp.tolist()
    before = client.post("/recommend", users=["7"])
    assert client.post("/append", user="7", events=[{"item": "33", "time": times[-1] + 60}]) == {"stored": 1}
    assert client.post("/append", user="7", events=[{"item": "12", "time": times[-1] + 90}]) == {"stored": 1}
    after = client.post("/recommend", users=["7"])
    assert after != before
    more = {"histories": [[*items, "33", "12"]], "times": [[*times, times[-1] + 60, times[-1] + 90]]}
    same(after, recommender.recommend(**more))  # type: ignore[arg-type]
    history = client.get("/history?user=7&last=3")
    assert history["total"] == len(items) + 2
    assert [(one["item"], one["title"], one["appended"]) for one in history["events"]] == [
        (items[-1], f"item {items[-1]}", False),
        ("33", "item 33", True),
        ("12", "item 12", True),
    ]


def test_a_new_user_begins_with_an_event(client: Client, recommender: Recommender):
    assert client.refused("/recommend", users=["anna"])[0] == 404
    began = int(time.time())
    assert client.post("/append", user="anna", events=[{"item": "5", "key": "a-1"}]) == {"stored": 1}
    assert client.post("/append", user="anna", events=[{"item": "5", "key": "a-1"}]) == {"stored": 0}
    (event,) = client.get("/history?user=anna")["events"]
    assert began <= event["time"] <= time.time()
    want = recommender.recommend(histories=[["5"]], times=[[event["time"]]])
    same(client.post("/recommend", users=["anna"]), want)
    assert "anna" in client.get("/users?q=an")


def test_events_of_a_later_model_are_not_counted_twice(
    recommender: Recommender, data: DataFolder, tmp_path: Path
):
    """A state file may hold events that the data has by now, and items that it has no more."""
    last = int(data.histories([7]).timestamp[-1])
    store = EventStore(tmp_path / "events.sqlite")
    new = [Event("8", last - 60), Event("gone", last), Event("9", last)]
    store.append([Append("7", new, None)])
    with served(create_app(recommender, store)) as port:
        history = Client(port).get("/history?user=7&last=2")
    assert [(one["item"], one["appended"]) for one in history["events"]][1] == ("9", True)
    assert history["total"] == int(data.length[7]) + 1


def test_events_that_the_data_has_by_now_are_not_counted_twice(
    recommender: Recommender, data: DataFolder, tmp_path: Path
):
    """Also in the last second of the data, in which it may have some of the appended events only."""
    past = data.histories([7])
    last, item = int(past.timestamp[-1]), str(past.item[-1])
    other = str(1 + int(past.item[-1]) % data.num_items)
    store = EventStore(tmp_path / "events.sqlite")
    store.append([Append("7", [Event(item, last), Event(other, last), Event(item, last)], None)])
    with served(create_app(recommender, store)) as port:
        history = Client(port).get("/history?user=7&last=3")
        answer = Client(port).post("/recommend", users=["7"])
    assert [(one["item"], one["appended"]) for one in history["events"]] == [
        (item, False),
        (other, True),
        (item, True),
    ]
    items, times = [*map(str, past.item.tolist()), other, item], [*past.timestamp.tolist(), last, last]
    same(answer, recommender.recommend(histories=[items], times=[times]))


def test_the_time_of_an_event_is_bounded(client: Client, recommender: Recommender):
    ahead = max(int(time.time()), recommender.latest) + 3600
    status, detail = client.refused("/append", user="eve", events=[{"item": "5", "time": ahead * 1000}])
    assert (status, "give seconds since 1970, not milliseconds" in detail) == (422, True)
    assert client.post("/append", user="eve", events=[{"item": "5", "time": ahead}]) == {"stored": 1}
    # After it, the time now would be refused as too early.
    assert client.post("/append", user="eve", events=[{"item": "6"}, {"item": "7"}]) == {"stored": 2}
    assert [one["time"] for one in client.get("/history?user=eve")["events"]] == [ahead] * 3


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/recommend", {}, 422, "give either users or histories"),
        ("/recommend", {"users": ["0"], "histories": []}, 422, "give either users or histories"),
        ("/recommend", {"users": ["0"], "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ("/recommend", {"users": ["0"], "k": 1001}, 422, "k: Input should be less than or equal to 1000"),
        ("/recommend", {"users": ["0"], "kk": 3}, 422, "kk: Extra inputs are not permitted"),
        ("/recommend", {"users": ["0"] * 257}, 422, "users: List should have at most 256 items"),
        ("/recommend", {"users": ["x" * 300]}, 422, "users.0: String should have at most 256 characters"),
        ("/recommend", {"users": [0]}, 422, "users.0: Input should be a valid string"),
        ("/recommend", {"users": ["0", "ghost"]}, 404, "user 'ghost' has no events"),
        ("/recommend", {"users": ["0"], "only": ["categories=x"]}, 422, "did you mean 'category'"),
        ("/recommend", {"users": ["0"], "only": ["category=x"]}, 422, "no item of the data has that value"),
        ("/recommend", {"users": ["0"], "only": ["file:/etc/passwd"]}, 422, "requests do not read files"),
        ("/recommend", {"histories": [{"items": ["1"] * 10_001}]}, 422, "at most 10000 items"),
        (
            "/recommend",
            {"histories": [{"items": ["1"], "times": [1, 2]}]},
            422,
            "times has 2 values for 1 items",
        ),
        (
            "/recommend",
            {"histories": [{"items": ["1", "2"], "times": [2, 1]}]},
            422,
            "times decrease at position 1",
        ),
        ("/recommend", {"histories": [{"items": ["1"], "times": [1e300]}]}, 422, "histories.0.times.0"),
        ("/recommend", {"histories": [{"items": ["1"], "events": ["buy"]}]}, 422, "unknown event type 'buy'"),
        ("/recommend", {"histories": [["1"]]}, 422, "histories.0"),
        (
            "/recommend",
            {"histories": [{"items": ["1"], "events": ["b" * 300]}]},
            422,
            "at most 256 characters",
        ),
        (
            "/append",
            {"user": "0", "events": [{"item": "1", "event": "b" * 300}]},
            422,
            "at most 256 characters",
        ),
        (
            "/recommend",
            {"users": ["0"] * 21, "k": 1000},
            422,
            "21 lists of 1000 items are more than the 20000",
        ),
        ("/similar", {"items": ["1"] * 201, "k": 100}, 422, "201 lists of 100 items are more than the 20000"),
        ("/similar", {"items": ["ghost"]}, 404, "no item 'ghost'"),
        ("/similar", {"items": []}, 422, "at least 1 item"),
        ("/similar", {"items": ["1"], "only": ["file:x"]}, 422, "requests do not read files"),
        ("/append", {"user": "0", "events": [{"item": "ghost"}]}, 404, "no item 'ghost'"),
        (
            "/append",
            {"user": "0", "events": [{"item": "1", "time": 0}]},
            422,
            "earlier than the last event of user",
        ),
        (
            "/append",
            {"user": "0", "events": [{"item": "1", "event": "buy"}]},
            422,
            "(types: the data has none)",
        ),
        (
            "/append",
            {"user": "", "events": [{"item": "1"}]},
            422,
            "user: String should have at least 1 character",
        ),
        ("/append", {"user": "0", "events": []}, 422, "events: List should have at least 1 item"),
    ],
)
def test_wrong_input_is_explained(
    client: Client, data: DataFolder, path: str, body: dict[str, Any], status: int, message: str
):
    got, detail = client.refused(path, **body)
    assert (got, message in detail) == (status, True), detail
    assert str(data.path) not in detail


def test_bodies_that_are_no_requests(client: Client):
    assert client.send("POST", "/recommend", b"{")[0] == 422
    assert client.send("POST", "/recommend", b"[" * 100_000)[0] in (400, 422)
    assert client.send("POST", "/recommend", b"\xff\xfe")[0] in (400, 422)
    assert client.send("POST", "/recommend", b'{"users": ["0"]}', kind="text/plain")[0] == 422
    assert client.send("POST", "/recommend", b" " * (5 << 20))[0] == 413
    assert client.send("POST", "/recommend", (b" " * (1 << 20) for _ in range(5)))[0] == 413  # in chunks
    assert client.send("GET", "/recommend")[0] == 405
    assert client.send("GET", "/page/../app.py")[0] == 404
    assert client.send("GET", "/page/%2e%2e%2fapp.py")[0] == 404
    assert client.send("GET", "/history?user=ghost")[0] == 404
    assert client.send("GET", "/items?q=x&limit=1000")[0] == 422
    assert client.get("/health")["status"] == "ok"


def test_a_client_that_goes_away_or_sends_half_a_request_disturbs_nobody(port: int, client: Client):
    for sent in (
        b"",
        b"POST /recommend HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"\x16\x03\x01 nonsense\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
    assert client.post("/recommend", users=["0"], k=1)["lists"]


def test_an_export_without_users_is_served(run: Path, recommender: Recommender, tmp_path: Path):
    copy = Recommender.load(export_run(run, tmp_path / "export"))
    with served(create_app(copy, EventStore(tmp_path / "events.sqlite"), page=False)) as port:
        client = Client(port)
        assert client.get("/health")["users"] == 0
        same(
            client.post("/recommend", histories=[{"items": ["5", "17"]}]),
            recommender.recommend(histories=[["5", "17"]]),
        )
        assert client.refused("/recommend", users=["3"])[0] == 404
        client.post("/append", user="3", events=[{"item": "5", "time": 60}])
        same(client.post("/recommend", users=["3"]), recommender.recommend(histories=[["5"]], times=[[60]]))
        for path in ("/", "/page/page.js", "/items?q=item", "/users", "/history?user=3"):
            assert client.send("GET", path)[0] == 404


def test_types_of_events_reach_the_model(tmp_path: Path):
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 20, size=6).tolist() for _ in range(8)]
    kinds = [[("view", "buy")[v % 2] for v in one] for one in histories]
    data = write_data_folder(tmp_path / "data", histories, events=kinds, num_items=20)
    model = {"dim": 8, "stream": {"layers": 1}, "events": True}
    (tmp_path / "run").mkdir()
    run = save_run(tmp_path / "run", data, model=model, evaluation={"baselines": []})
    recommender = Recommender.load(run)
    with served(create_app(recommender, EventStore(tmp_path / "events.sqlite"))) as port:
        client = Client(port)
        answers = [
            client.post("/recommend", histories=[{"items": ["3", "4"], "events": ["view", kind]}])["lists"][0]
            for kind in ("view", "buy", None)
        ]
        client.post("/append", user="0", events=[{"item": "3", "event": "buy", "time": 600}])
        assert client.get("/history?user=0&last=1")["events"][0]["event"] == "buy"
        got = client.post("/recommend", users=["0"])["lists"][0]
    times = [*(60 * np.arange(6)).tolist(), 600]
    raw = [str(v) for v in histories[0]]
    (want,) = recommender.recommend(histories=[[*raw, "3"]], times=[times], events=[[*kinds[0], "buy"]])
    assert [one["score"] for one in got["items"]] == want.scores
    assert len({json.dumps(answer["items"]) for answer in answers}) == 3


def test_openapi_and_headers(client: Client):
    paths = client.get("/openapi.json")["paths"]
    assert {"/recommend", "/append", "/similar", "/health"} <= set(paths)
    assert "429" in paths["/recommend"]["post"]["responses"]
    for path in ("/", "/page/page.js", "/page/page.css", "/health", "/nothing"):
        client.send("GET", path)
        assert "default-src 'none'" in client.headers["content-security-policy"]
        assert client.headers["x-content-type-options"] == "nosniff"
    for path in ("/docs", "/redoc"):
        assert client.send("GET", path)[0] == 404


def test_the_page_asks_no_other_host(client: Client):
    page = client.get("/")
    texts = [page, client.get("/page/page.js"), client.get("/page/page.css")]
    assert not any("http:" in text or "https:" in text or "//cdn" in text for text in texts)
    assert "<script>" not in page
    assert 'style="' not in page
    assert "innerHTML" not in texts[1]
    assert [item["item"] for item in client.get("/items?q=ITEM%205&limit=2")] != []
    assert client.get("/items?q=17")[0] == {"item": "17", "title": "item 17"}
    assert client.get("/items?q=%20") == []
