"""`findrec serve` in a process of its own: killed, terminated, restarted."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from pathlib import Path

import pytest
from http_service import Client, Process, wait_for

from findrec.cli.app import main


def test_a_killed_server_loses_no_acknowledged_event(trained: Path, tmp_path: Path):
    state = tmp_path / "events.sqlite"
    acknowledged: dict[str, list[str]] = {f"user {n}": [] for n in range(4)}
    sent: dict[str, list[str]] = {user: [] for user in acknowledged}

    def send(port: int, user: str) -> None:
        client = Client(port)
        try:
            for number in range(100_000):
                item = str(1 + number % 60)
                sent[user].append(item)
                client.post("/append", user=user, events=[{"item": item, "time": number}])
                acknowledged[user].append(item)
        except (OSError, http.client.HTTPException):
            return

    with Process(trained, state) as server:
        threads = [threading.Thread(target=send, args=(server.port, user)) for user in acknowledged]
        for thread in threads:
            thread.start()
        while min(map(len, acknowledged.values())) < 20:
            assert all(thread.is_alive() for thread in threads)
            time.sleep(0.01)
        server.kill()
        for thread in threads:
            thread.join()
    with Process(trained, state) as server:
        client = Client(server.port)
        for user, items in acknowledged.items():
            kept = [
                one["item"]
                for one in client.get(f"/history?last=100&user={user.replace(' ', '%20')}")["events"]
            ]
            total = client.get(f"/history?user={user.replace(' ', '%20')}")["total"]
            assert total in (len(items), len(items) + 1)  # the last one may be stored but not acknowledged
            assert kept == sent[user][:total][-100:]
            assert client.post("/recommend", users=[user], k=1)["lists"][0]["ranked_by"] == "findrec"


def test_open_requests_are_answered_after_sigterm(trained: Path, tmp_path: Path):
    with Process(trained, tmp_path / "events.sqlite", "--wait-ms", "3000") as server:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(Client(server.port).post("/recommend", users=["0"], k=2))
        )
        thread.start()  # its request waits for others to share its pass
        wait_for(lambda: "findrec_waiting_lists 1.0" in Client(server.port).get("/metrics"))
        server.terminate()
        thread.join(30)
        assert len(answers[0]["lists"][0]["items"]) == 2
        assert "Traceback" not in server.wait()
        assert server.code == -signal.SIGTERM  # as docs/troubleshooting.md says
        with pytest.raises(OSError, match="refused"):
            Client(server.port).get("/health")


def test_an_address_in_use_is_reported(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Process(trained, tmp_path / "events.sqlite") as server:
        assert main(["serve", str(trained), "--port", str(server.port)]) == 2
        assert f"cannot listen on 127.0.0.1:{server.port}" in capsys.readouterr().err
    assert main(["serve", str(trained), "--host", "no.such.host.invalid"]) == 2
    assert "Choose another --host or --port" in capsys.readouterr().err
    assert main(["serve", "nothing"]) == 2
    assert "no run called 'nothing'" in capsys.readouterr().err
