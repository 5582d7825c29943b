"""Build a C++ source of `csrc/` into a shared library at first use, and keep it.

The sources have a plain C interface, so they need nothing but a compiler: a build takes seconds and does not
depend on torch's headers. Libraries live below `TORCH_EXTENSIONS_DIR`, else `~/.cache/findrec`, under a name
that changes with the source, the flags, the compiler and the CPU. A lock lets workers that start at once
build only once; the library appears by a rename, so a killed build leaves nothing half-written behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-march=native")
BUILD_SECONDS = 300  # a compiler that takes longer hangs


class BuildError(RuntimeError):
    """The library cannot be had; the message says why and how to mend it."""


def load_library(name: str) -> ctypes.CDLL:
    """The library made of `csrc/<name>.cpp`. Raises `BuildError`."""
    compiler = find_compiler()
    source = SOURCES / f"{name}.cpp"
    key = _key(source, compiler)
    folder = cache_folder()
    target = folder / f"{name}-{key}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.is_file():
            with _locked(folder / f"{name}-{key}.lock"):
                if not target.is_file():  # another worker may have built it meanwhile
                    _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(
            f"the library {target} cannot be written or loaded ({error}); set TORCH_EXTENSIONS_DIR to a "
            "folder that can be written"
        ) from None


def find_compiler() -> str:
    """The C++ compiler: `CXX` when set, else g++, else clang++. Raises `BuildError`."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++"):
        if candidate and (path := shutil.which(candidate)):
            return path
    raise BuildError("no C++ compiler was found; install g++ (Debian/Ubuntu: apt install g++) or set CXX")


def cache_folder() -> Path:
    """Where built libraries are kept."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given).expanduser() / "findrec"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "findrec"


def _key(source: Path, compiler: str) -> str:
    """-march=native makes a library fit one kind of CPU: its name must say which."""
    digest = hashlib.blake2b(source.read_bytes(), digest_size=8)
    for header in sorted(source.parent.glob("*.h")):  # any of them may be included
        digest.update(header.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for part in (*FLAGS, compiler, version, platform.machine(), _cpu_flags()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield


def _compile(compiler: str, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *FLAGS, str(source), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} did not finish {source.name} within {BUILD_SECONDS} s") from None
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise BuildError(f"{compiler} could not build {source}:\n{last}")
        os.replace(built, target)
