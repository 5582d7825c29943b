"""Addresses and environments with which no session can start: one message that says what to change."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import environment, free_port

from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.local_cluster import _short_folder, local_cluster
from findrec.ray_session import ray_session

SESSION = """
import sys
from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.ray_session import ray_session
try:
    with ray_session(RunConfig()):
        import ray
        print("seven:", ray.get(ray.remote(lambda: 7).remote()))
except FindRecError as error:
    print("error:", error)
"""


def session(home: Path, **variables: str | None) -> str:
    given = environment(home) | variables
    env = {name: value for name, value in given.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refusal(address: str) -> str:
    config = parse_config({"cluster": {"address": address}})
    with pytest.raises(FindRecError) as refused, ray_session(config):
        pass
    return str(refused.value)


@pytest.mark.parametrize("address", ["http://head:8265", "https://ann:pass@head:8265/x"])
def test_the_dashboards_address_is_told_from_the_clusters(address):
    said = refusal(address)
    assert "dashboard" in said
    assert "RAY_ADDRESS to head:6379" in said
    assert "ann" not in said


@pytest.mark.parametrize("address", ["head", "127.0.0.1:x", "[", "127.0.0.1:9999999999999999999999"])
def test_what_is_no_address_is_refused(address):
    assert "cannot join the Ray cluster" in (said := refusal(address)) or "no address" in said


def test_auto_with_a_dead_cluster_is_refused_at_once(tmp_path, monkeypatch):
    from ray._private import services

    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # The clusters of other tests on this machine.
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    assert "no Ray cluster answers at" in refusal("auto")
    (tmp_path / "ray" / "ray_current_cluster").unlink()
    assert "cannot join the Ray cluster at 'auto'" in (said := refusal("auto"))
    assert "ray start --head" in said


@pytest.mark.ray
def test_a_long_tmpdir_and_no_home_do_no_harm(tmp_path):
    long = tmp_path / ("a" * 90)
    long.mkdir()
    said = session(tmp_path, TMPDIR=str(long), HOME=None, RAY_ADDRESS="local")
    assert "seven: 7" in said
    assert list(long.glob("findrec-ray-*")) == []


def test_no_short_folder_for_sockets_is_told(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FindRecError, match=r"no folder for Ray's sockets.*Set TMPDIR"):
        _short_folder()


def test_what_ray_raises_at_its_start_is_one_message():
    message = r"Ray does not start on this machine: .*TMPDIR"
    with pytest.raises(FindRecError, match=message), local_cluster(-1, {}):
        pass


def test_a_port_that_never_answers_is_a_dead_cluster():
    with socket.socket() as taken:  # bound, nobody listens
        taken.bind(("127.0.0.1", 0))
        assert "no Ray cluster answers" in refusal(f"127.0.0.1:{taken.getsockname()[1]}")
