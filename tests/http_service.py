"""An HTTP service of the tests: in a thread of this process, or a process that can be killed."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from findrec.serving.http.app import Limits
from findrec.serving.http.server import listen, server_config


class Client:
    """Sends requests over one connection and returns status and content."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.headers: dict[str, str] = {}  # of the last response

    def send(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        kind: str = "application/json",
    ) -> Any:
        """Status and content, which is parsed if it is JSON."""
        self._connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
        response = self._connection.getresponse()
        content = response.read()
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        is_json = self.headers.get("content-type") == "application/json"
        return response.status, json.loads(content) if is_json else content.decode()

    def post(self, path: str, **body: Any) -> Any:
        """The content of a response with status 200."""
        status, content = self.send("POST", path, json.dumps(body).encode())
        assert status == 200, content
        return content

    def get(self, path: str) -> Any:
        """The content of a response with status 200."""
        status, content = self.send("GET", path)
        assert status == 200, content
        return content

    def refused(self, path: str, **body: Any) -> tuple[int, str]:
        """Status and message of an error."""
        status, content = self.send("POST", path, json.dumps(body).encode())
        assert status >= 400
        return status, content["detail"]


@contextmanager
def served(app: FastAPI, limits: Limits | None = None) -> Iterator[int]:
    """Serve an application in a thread; yields the port."""
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app, limits or Limits()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(condition: Any, timeout_s: float = 30) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Process:
    """`findrec serve` in a process of its own."""

    def __init__(self, run: Path, state: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "findrec.cli",
            "serve",
            str(run),
            "--port",
            "0",
            "--state",
            str(state),
        ]
        self._process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if found := re.search(r"at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise AssertionError("".join(lines))

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> str:
        """Wait for its end; returns what else it printed."""
        output, _ = self._process.communicate(timeout=60)
        return output

    @property
    def code(self) -> int | None:
        """Its exit code; None before its end."""
        return self._process.returncode

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
