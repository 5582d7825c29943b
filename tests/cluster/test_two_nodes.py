"""One job on two machines that share neither addresses nor disks: network namespaces with a cable between.

What both see is the checkpoint store alone.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid

import pytest
from clusters import BIN, UNTRACKED, command_of, environment, ip, kill_node, wait_until
from planted import planted_home

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]

ADDRESS = ("10.213.77.1", "10.213.77.2")
PORT = "6379"


@pytest.fixture
def machines():
    """Names of two network namespaces, each with a loopback and one end of a cable called eth0."""
    names = [f"findrec-{uuid.uuid4().hex[:6]}-{i}" for i in range(2)]
    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("network namespaces can only be made by root")
        assert ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESS, strict=True):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            assert ip("-n", name, "link", "set", "eth0", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def on(machine: str, disk, home, command: list[str], **options) -> subprocess.Popen:
    """Start a command on one of the machines, where `disk` is what lies at `home`."""
    script = 'mount --bind "$1" "$2" && cd "$2" && shift 2 && exec "$@"'
    return subprocess.Popen(
        ["ip", "netns", "exec", machine, "sh", "-c", script, "sh", str(disk), str(home), *command],
        env=environment(home, RAY_AUTH_MODE="disabled", GLOO_SOCKET_IFNAME="eth0", **options.pop("more", {})),
        start_new_session=True,
        text=True,
        **options,
    )


def test_two_machines_train_one_run(machines, tmp_path):
    home, store = tmp_path / "home", tmp_path / "store"
    disks = [tmp_path / f"disk{i}" for i in range(2)]
    for path in (home, store, *disks):
        path.mkdir()
    planted_home(disks[0], f"training.checkpoint_store={store.as_uri()}", "cluster.wait_s=60", UNTRACKED)
    shutil.copytree(disks[0] / "data", disks[1] / "data")

    ray = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = [*ray, "--head", f"--port={PORT}", f"--node-ip-address={ADDRESS[0]}", "--include-dashboard=false"]
    nodes = [on(machines[0], disks[0], home, head, **quiet)]
    try:
        probe = ["ip", "netns", "exec", machines[0], sys.executable, "-c"]
        probe += [f"import socket; socket.create_connection(('{ADDRESS[0]}', {PORT}), 2)"]
        wait_until(lambda: subprocess.run(probe, capture_output=True).returncode == 0, 90, "no head node")
        other = [*ray, f"--address={ADDRESS[0]}:{PORT}", f"--node-ip-address={ADDRESS[1]}"]
        nodes.append(on(machines[1], disks[1], home, other, **quiet))
        join = {"RAY_ADDRESS": f"{ADDRESS[0]}:{PORT}"}
        run = on(
            *(machines[0], disks[0], home, command_of(home, "name=far")),
            more=join,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = run.communicate(timeout=400)
    finally:
        for node in reversed(nodes):
            kill_node(node)
    assert run.returncode == 0, output[-6000:]
    (row, _) = json.loads((disks[0] / "runs" / "far" / "metrics.json").read_text())["test"]
    assert row["ndcg@10"] > 0.9
    assert os.listdir(store / "far")
    assert (disks[1] / "runs" / "far" / "checkpoints").is_dir()  # each of them took part
