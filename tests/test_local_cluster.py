"""A cluster that a run starts on this machine can be reached and used by that run alone."""

import os
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import psutil
import pytest
from clusters import UNTRACKED, command_of, environment, ip, wait_until
from planted import planted_home

from findrec.config import RunConfig
from findrec.ray_session import ray_session

pytestmark = pytest.mark.ray

STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
print("run by", ray.get(ray.remote(num_cpus=0)(lambda: "a stranger").remote()))
"""
CALLER = """
import socket, sys
for port in map(int, sys.argv[2:]):
    with socket.socket() as caller:
        caller.settimeout(2)
        if caller.connect_ex((sys.argv[1], port)) == 0:
            print(port)
"""


def listeners(root: psutil.Process) -> dict[tuple[str, int], str]:
    """The addresses on which a process and those that it started accept connections, with their commands."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    address = connection.laddr.ip.removeprefix("::ffff:")
                    found[address, connection.laddr.port] = " ".join(process.cmdline())
        except psutil.Error:  # it has ended
            continue
    return found


def other_addresses() -> list[str]:
    """Addresses of this machine that others can reach."""
    every = (a for interface in psutil.net_if_addrs().values() for a in interface)
    return [a.address for a in every if a.family == socket.AF_INET and not a.address.startswith("127.")]


@pytest.fixture(scope="module")
def session():
    """The address of a running session and the listeners of its processes."""
    import ray

    with ray_session(RunConfig()):
        actor = ray.remote(num_cpus=0)(dict).remote()
        ray.get(actor.__ray_ready__.remote())
        address = ray.get_runtime_context().gcs_address
        yield address, listeners(psutil.Process())


def test_every_part_listens_on_the_loopback_address_only(session):
    address, found = session
    commands = " ".join(found.values())
    for part in ("gcs_server", "raylet", "dashboard.py", "ray::DashboardAgent", "ray::RuntimeEnvAgent"):
        assert part in commands
    assert {ip for ip, _ in found} == {"127.0.0.1"}
    assert address.startswith("127.0.0.1:")


def test_no_other_address_of_this_machine_answers(session):
    _, found = session
    for address in other_addresses():
        for _, port in found:
            with socket.socket() as caller:
                caller.settimeout(5)
                if caller.connect_ex((address, port)) == 0:  # somebody else's listener on the same port
                    assert (address, port) in listeners_of_machine()


@pytest.fixture
def neighbour():
    """The name of a network namespace that is another machine for this one, and this one's address for it."""
    name, ours, theirs = f"findrec-{uuid.uuid4().hex[:6]}", "10.213.78.1", "10.213.78.2"
    cable = f"fr{uuid.uuid4().hex[:6]}"
    try:
        if not ip("netns", "add", name):
            pytest.skip("network namespaces can only be made by root")
        assert ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        assert ip("addr", "add", f"{ours}/24", "dev", cable)
        assert ip("link", "set", cable, "up")
        assert ip("-n", name, "addr", "add", f"{theirs}/24", "dev", "eth0")
        assert ip("-n", name, "link", "set", "eth0", "up")
        yield name, ours
    finally:
        ip("link", "del", cable)
        ip("netns", "del", name)


def test_no_other_machine_reaches_a_part(session, neighbour):
    _, found = session
    name, ours = neighbour
    with socket.create_server((ours, 0)) as open_to_all:
        ports = [open_to_all.getsockname()[1], *(port for _, port in found)]
        command = ["ip", "netns", "exec", name, sys.executable, "-c", CALLER, ours, *map(str, ports)]
        answers = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert [int(port) for port in answers.split()] == ports[:1]  # the one that this test opened


def listeners_of_machine() -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in psutil.net_connections("tcp4") if c.status == psutil.CONN_LISTEN}


def stranger(address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-c", STRANGER, address]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=120)


def test_only_callers_with_the_token_run_code(session, tmp_path):
    address, _ = session
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    for access in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)},
    ):
        done = stranger(address, **loopback, **access)
        assert done.returncode != 0
        assert "run by" not in done.stdout
        assert "uthenticat" in done.stderr
    access = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    done = stranger(address, **loopback, **access)
    assert "run by a stranger" in done.stdout, done.stderr


def test_the_dashboard_takes_no_job_without_the_token(session):
    from ray._private.worker import get_dashboard_url

    url = f"http://{get_dashboard_url()}/api/jobs/"  # on another port than asked for if that one is taken
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, b'{"entrypoint": "id"}'), timeout=30)
    assert refused.value.code in (401, 403)


def test_token_and_folder_are_private(session):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_a_session_leaves_nothing_behind(tmp_path):
    code = """
import os, sys
from findrec.config import RunConfig
from findrec.ray_session import ray_session
before = dict(os.environ)
tokens = []
for _ in range(2):  # a second one in the same process has a token of its own
    with ray_session(RunConfig()):
        import ray
        tokens.append(open(os.environ["RAY_AUTH_TOKEN_PATH"]).read())
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
assert not {k for k in changed if "AUTH" in k or "SOCKET" in k or "PORT" in k}, changed
assert tokens[0] != tokens[1]
"""
    env = environment(tmp_path, TMPDIR=str(short := Path("/tmp") / f"fr{os.getpid()}"), HOME=str(tmp_path))
    short.mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert list(short.glob("findrec-ray-*")) == []
        assert not (tmp_path / ".ray").exists()
    finally:
        subprocess.run(["rm", "-r", str(short)], check=True)


@pytest.mark.slow
def test_workers_of_a_local_training_listen_on_the_loopback_address_only(tmp_path):
    home = planted_home(tmp_path)
    log = (tmp_path / "log").open("w")
    # Settings for a cluster's network must not open the workers of a local run.
    env = environment(home, GLOO_SOCKET_IFNAME="eth0")
    run = subprocess.Popen(command_of(home, "name=a", UNTRACKED), env=env, stdout=log, stderr=log)
    root, workers, found = psutil.Process(run.pid), set(), set()
    metrics = home / "runs" / "a" / "metrics.jsonl"

    def trained() -> bool:
        for address, command in listeners(root).items():
            found.add((address[0], command))
            workers.update([address] if "RayTrainWorker" in command else [])
        time.sleep(0.2)
        return run.poll() is not None or (metrics.is_file() and "train/loss" in metrics.read_text())

    try:
        wait_until(trained, 200, "no step was trained")
        assert run.wait(300) == 0, Path(log.name).read_text()[-4000:]
    finally:
        run.kill()
    assert len(workers) > 2  # Ray's listener of each worker, and those of the process group
    assert {ip for ip, _ in found} == {"127.0.0.1"}, found
