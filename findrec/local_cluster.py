"""Starts a Ray cluster on this machine that only the current process and its workers can use.

All its processes listen on the loopback address only and refuse clients without a random token. Token,
sockets and logs are in a folder that only this user can read and that is deleted with the cluster.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from findrec.errors import FindRecError, Preempted

LOOPBACK = "127.0.0.1"
_PREFIX = "findrec-ray-"
_START_HINT = (
    "Check that memory, disk and process limits leave room for it (`df -h /tmp /dev/shm`, `ulimit -a`); "
    "TMPDIR sets where its files are."
)
# `/r/session_<date>_<process>/sockets/plasma_store` is added; the system allows 107 bytes (macOS: 103).
_LONGEST_FOLDER = (107 if sys.platform.startswith("linux") else 103) - 70
_LONGEST_TMPDIR = 70  # `/pymp-12345678/listener-12345678` is added
_FRESH_S = 60.0  # a younger folder may belong to a session that has not locked it yet


@contextmanager
def ray_errors(what: str, hint: str) -> Iterator[None]:
    """Turn all that `ray.init` raises, which has no common class, into one `FindRecError`."""
    try:
        yield
    except FindRecError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise FindRecError(f"{what}: {reason.rstrip('.')}. {hint}") from error


@contextmanager
def local_cluster(num_cpus: int, environment: dict[str, str], **options: Any) -> Iterator[None]:
    """Start Ray on this machine and stop it at the end.

    Args:
        num_cpus: CPU cores that the cluster has.
        environment: Environment variables of the workers; the address of the cluster is added.
        options: Further arguments of `ray.init`.
    """
    port = _free_port()
    environment["RAY_ADDRESS"] = f"{LOOPBACK}:{port}"
    with _session_folder() as folder:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        variables: dict[str, str | None] = {
            # Ray's switch for machines without network: all its processes have the loopback address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_AUTH_TOKEN": None,  # would take precedence over the file
            # Ray Train's helpers look up the cluster of this machine and may find another one, or the address
            # of one that was killed. So all processes are given the address explicitly.
            "RAY_GCS_SERVER_PORT": str(port),
            # With Ray's default of 15 any other program on this machine would starve the training.
            "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112
            # Python's own sockets are in it.
            "TMPDIR": str(folder)
            if len(tempfile.gettempdir()) > _LONGEST_TMPDIR
            else os.environ.get("TMPDIR"),
            **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback_interface()),
        }
        with _environment(variables):
            import ray
            from ray._private import ray_constants

            network, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
            _read_environment_again()
            try:
                with ray_errors("Ray does not start on this machine", _START_HINT):
                    ray.init(
                        address="local",  # a new cluster even if another one runs on this machine
                        num_cpus=num_cpus,
                        include_dashboard=True,  # also serves the state API: Ray Train cleans up with it
                        dashboard_host=LOOPBACK,
                        _node_ip_address=LOOPBACK,
                        _temp_dir=str(folder / "r"),  # Ray lets everybody write to it; nobody can reach it
                        **options,
                    )
                yield
            finally:
                ray.shutdown()
                ray_constants.ENABLE_RAY_CLUSTER = network
        _read_environment_again()


def _read_environment_again() -> None:
    """Make Ray forget the authentication mode and the token that it keeps for a process."""
    from ray import _raylet

    internal: Any = _raylet  # compiled, without types
    internal.Config.initialize("")
    internal.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables (None: unset) inside the context."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set_environment(variables)
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _session_folder() -> Iterator[Path]:
    """A new private folder, deleted at the end; after an unexpected error kept until the next session."""
    parent = _short_folder()
    for left in parent.glob(f"{_PREFIX}*"):
        _delete_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    keep = False
    with FileLock(folder / "lock"):
        try:
            yield folder
        except Exception as error:
            keep = not isinstance(error, FindRecError | Preempted)
            if keep:
                error.add_note(f"Ray's logs are in {folder} until the next run.")
            raise
        finally:
            (folder / "token").unlink(missing_ok=True)
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _delete_if_abandoned(folder: Path) -> None:
    """Delete the folder of a session whose process was killed: nobody holds its lock."""
    with contextlib.suppress(OSError, Timeout):
        if time.time() - folder.stat().st_mtime > _FRESH_S and (folder / "lock").is_file():
            with FileLock(folder / "lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> Path:
    """The first usable folder for temporary files whose path leaves room for the names of Ray's sockets."""
    name, tried = f"{_PREFIX}12345678", []
    for parent in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")):
        tried.append(str(parent))
        if len(os.fsencode(parent / name)) <= _LONGEST_FOLDER and os.access(parent, os.W_OK | os.X_OK):
            return parent
    raise FindRecError(
        f"no folder for Ray's sockets: none of {', '.join(tried)} is writable and short enough. Set TMPDIR "
        f"to a writable folder whose path has at most {_LONGEST_FOLDER - len(name) - 1} characters."
    )


def _loopback_interface() -> str | None:
    """The name of the loopback network interface (`lo`, on macOS `lo0`)."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
