"""Compile a C++ source of `csrc/` into a shared library at first use, and cache it.

The sources have a plain C interface and do not use torch's headers: a build needs only a compiler and takes
seconds. Libraries are cached below `TORCH_EXTENSIONS_DIR`, else `~/.cache/findrec`, or, where that cannot be
written, `.cache/findrec` in FindRec's home. Their names are derived from the source, the flags, the compiler
and the CPU. A file lock makes concurrent workers build only once; an atomic rename ensures that a killed
build leaves no partial library.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from findrec.files import replacing
from findrec.paths import home

SOURCES = Path(__file__).resolve().parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-march=native")
BUILD_SECONDS = 300  # time limit of a compiler run


class BuildError(RuntimeError):
    """The library cannot be built or loaded; the message says why and how to fix it."""


def load_library(name: str) -> ctypes.CDLL:
    """Build (or take from the cache) and load `csrc/<name>.cpp`. Raises `BuildError`."""
    compiler = find_compiler()
    source = SOURCES / f"{name}.cpp"
    key = _key(source, compiler)
    folder = cache_folder()
    target = folder / f"{name}-{key}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.is_file():
            with FileLock(folder / f"{name}-{key}.lock"):
                if not target.is_file():  # another worker may have built it meanwhile
                    _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(
            f"the library {target} cannot be written or loaded ({error}); set TORCH_EXTENSIONS_DIR to a "
            "folder that can be written"
        ) from None


def find_compiler() -> str:
    """Path of the C++ compiler: `CXX` when set, else g++, else clang++. Raises `BuildError`."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++"):
        if candidate and (path := shutil.which(candidate)):
            return path
    raise BuildError("no C++ compiler was found; install g++ (Debian/Ubuntu: apt install g++) or set CXX")


def cache_folder() -> Path:
    """Folder of the built libraries."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    if extensions:
        return Path(extensions).expanduser() / "findrec"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    # In containers and on clusters the home of a user may be missing or read-only.
    return (cache if os.access(cache, os.W_OK | os.X_OK) else home() / ".cache") / "findrec"


def _key(source: Path, compiler: str) -> str:
    """Hash of all that decides the binary; with -march=native that includes the CPU."""
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


def _compile(compiler: str, source: Path, target: Path) -> None:
    with replacing(target) as part:
        command = [compiler, *FLAGS, str(source), "-o", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} did not finish {source.name} within {BUILD_SECONDS} s") from None
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise BuildError(f"{compiler} could not build {source}:\n{last}")
