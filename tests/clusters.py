"""Real Ray clusters of one machine, and runs on them, for tests that end workers, machines and drivers."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from findrec.training.checkpoints.checkpoint import latest_checkpoint

BIN = Path(sys.executable).parent
UNTRACKED = "tracking.enabled=false"  # saves each run that tests something else some seconds
# A dead machine is detected in seconds; by default Ray takes half a minute.
_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}

_OTHER_NODE = """
import ray
ray.init(log_to_driver=False)
(node,) = [n for n in ray.nodes() if n["Alive"] and "node:__internal_head__" not in n["Resources"]]
print(node["NodeID"])
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """That of a user whose FINDREC_HOME is `home`, without what Ray or a test left in ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "FINDREC_", "MLFLOW_"))}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    # Workers as nice as Ray makes them by default starve beside other tests.
    own = {"FINDREC_HOME": str(home), "OMP_NUM_THREADS": "1", "PATH": path, "RAY_worker_niceness": "0"}
    return kept | own | more


def ip(*arguments: str) -> bool:
    """Whether `ip` succeeds: for network namespaces, which only root may make."""
    return shutil.which("ip") is not None and subprocess.run(["ip", *arguments]).returncode == 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(what: Callable[[], object], seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"after {seconds} s: {message}"
        time.sleep(0.05)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        reached = probe.connect_ex(("127.0.0.1", port)) == 0
        # Nobody listens yet, and the system has given the probe this very port: it has reached itself.
        return reached and probe.getsockname() != probe.getpeername()


@dataclass
class Cluster:
    """A running head node, and the nodes that joined it."""

    home: Path
    address: str
    dashboard: str
    environment: dict[str, str]
    access: dict[str, str]
    nodes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def join(self) -> dict[str, str]:
        """Variables of a driver that joins it."""
        return {"RAY_ADDRESS": self.address} | self.access

    def add_node(self, cpus: int) -> subprocess.Popen:
        log = self.home / f"node.{time.monotonic_ns()}.log"
        node = _start(["--address", self.address, f"--num-cpus={cpus}"], self.environment, log)
        self.nodes.append(node)
        return node

    def drain_node(self) -> None:
        """Have Ray announce, as an autoscaler does, that the one living node beside the head will go."""
        env = self.environment | self.join
        ask = [sys.executable, "-c", _OTHER_NODE]
        result = subprocess.run(ask, env=env, stdout=subprocess.PIPE, text=True, check=True)
        command = [str(BIN / "ray"), "drain-node", f"--address={self.address}", "--reason-message=a test"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=120"]
        subprocess.run([*command, f"--node-id={result.stdout.strip()}"], env=env, check=True)


def _start(arguments: list[str], env: dict[str, str], log: Path) -> subprocess.Popen:
    command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments]
    with log.open("w") as output:
        return subprocess.Popen(
            command, env=env, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
        )


def kill_node(node: subprocess.Popen) -> None:
    """Everything of a node at once, as when the machine goes; asked politely it takes half a minute."""
    for pid in [*_descendants(node.pid), node.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def _descendants(pid: int) -> list[int]:
    result = []
    for child in subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True).stdout.split():
        result += [*_descendants(int(child)), int(child)]
    return result


@contextlib.contextmanager
def running_cluster(home: Path, cpus: int = 2, *, token: bool = False) -> Iterator[Cluster]:
    """`ray start --head` from the environment FindRec is installed in, as the README says.

    With `token`, nobody may join, or submit a job, who does not have the cluster's token.
    """
    gcs, dashboard = free_port(), free_port()
    access = {"RAY_AUTH_MODE": "disabled"}
    if token:
        secret = home / "token"
        secret.write_text(secrets.token_hex(32))
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret)}
    env = environment(home, **access, **_QUICK)
    arguments = ["--head", f"--port={gcs}", f"--num-cpus={cpus}"]
    arguments += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    log = home / f"head.{gcs}.log"
    head = _start(arguments, env, log)
    cluster = Cluster(home, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", env, access)
    try:
        for port in (gcs, dashboard):

            def there(port: int = port) -> bool:
                assert head.poll() is None, log.read_text()[-4000:]
                return _answers(port)

            wait_until(there, 120, "the head node does not answer")
        yield cluster
    finally:
        for node in [*cluster.nodes, head]:
            kill_node(node)


def command_of(home: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "findrec.train_dist", "--config", str(home / "run.yaml"), *overrides]


def train(home: Path, *overrides: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """A whole run, waited for."""
    env = environment(home, **more)
    done = subprocess.run(
        command_of(home, *overrides), env=env, cwd=home, capture_output=True, text=True, timeout=600
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


class Run:
    """A run under way on a cluster; its output goes to a file beside the run folders."""

    def __init__(self, cluster: Cluster, name: str, *overrides: str) -> None:
        self.home, self.folder = cluster.home, cluster.home / "runs" / name
        self._log = cluster.home / f"{name}.{time.monotonic_ns()}.log"
        command = command_of(cluster.home, f"name={name}", *overrides)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env=environment(cluster.home, **cluster.join),
                cwd=cluster.home,
                start_new_session=True,
                # Whatever starts the tests in the background may have switched Ctrl-C off for all below it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def step(self) -> int:
        """Steps of the run's own model that are logged."""
        log = self.folder / "metrics.jsonl"
        return log.read_text().count("train/loss") if log.is_file() else 0

    def reach(self, step: int) -> None:
        """Wait until so many steps are logged."""

        def there() -> bool:
            assert self.process.poll() is None, self.output[-6000:]
            return self.step() >= step

        wait_until(there, 200, f"step {step} is not reached")

    def wait_for(self, text: str, seconds: float = 120, times: int = 1) -> None:
        """Wait for something to be said, so often."""

        def there() -> bool:
            said = self.output.count(text) >= times
            assert said or self.process.poll() is None, self.output[-6000:]
            return said

        try:
            wait_until(there, seconds, f"{text!r} is not said")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output[-6000:]}") from None

    def end(self, code: int = 0, seconds: float = 300) -> str:
        """Wait for the end; everything that was said."""
        try:
            result = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"no end after {seconds} s:\n{self.output[-6000:]}") from None
        assert result == code, self.output[-6000:]
        return self.output

    def workers(self) -> list[int]:
        """Processes of the workers of the home's runs."""
        return processes_of(self.home, "ray::RayTrainWorker")


def weights(run_folder: Path) -> dict[str, bytes]:
    """The files of a run's newest checkpoint that hold numbers."""
    newest = latest_checkpoint(run_folder / "checkpoints")
    assert newest is not None
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def processes_of(home: Path, title: str) -> list[int]:
    """Those of the home's runs whose titles begin so."""
    result = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"FINDREC_HOME={home}\0".encode() in (proc / "environ").read_bytes()
            if mine and (proc / "cmdline").read_bytes().startswith(title.encode()):
                result.append(int(proc.name))
    return sorted(result)
