"""Create the virtual environment and install FindRec into it; standard library only.

    python3 .ci/setup_env.py .venv

Called by `make setup`. Says what it needs and how to get it, what it does, and how long each step took.
The full output of pip is in `<venv>/setup.log`. Written so that an old Python can still read the message.
"""

import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, TOO_NEW = (3, 11), (3, 15)
DISK_GB_CPU, DISK_GB_GPU = 4, 14
STILL_EVERY_S = 20


def stop(problem, *ways):
    """Leave with one message: what is missing and how to get it."""
    print("\nsetup: " + problem, file=sys.stderr)
    for way in ways:
        print("    " + way, file=sys.stderr)
    sys.exit(1)


def check_machine():
    """Python, its venv module and a C++ compiler: everything else is installed from the index."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        stop(
            f"needs Python 3.11 to 3.14, but {sys.executable} is Python {found}. Install one, then name it:",
            "Debian/Ubuntu:  sudo apt install python3.12 python3.12-venv",
            "Fedora:         sudo dnf install python3.12",
            "macOS:          brew install python@3.12",
            "then:           make setup PYTHON=python3.12",
        )
    try:
        import ensurepip  # noqa: F401  # Debian leaves it out of python3
        import venv  # noqa: F401
    except ImportError:
        stop(
            "this Python has no venv module. Install it:",
            "Debian/Ubuntu:  sudo apt install python{}.{}-venv".format(*sys.version_info[:2]),
            "Fedora:         sudo dnf install python3-libs",
            "macOS:          brew install python@3.12",
        )
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if name):
        stop(
            "needs a C++ compiler (the CPU scan is built at first use). Install one:",
            "Debian/Ubuntu:  sudo apt install g++",
            "Fedora:         sudo dnf install gcc-c++",
            "macOS:          xcode-select --install",
        )
    return found


def has_gpu():
    """Whether an NVIDIA driver answers and lists a device."""
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return listing.returncode == 0 and b"GPU" in listing.stdout


class Steps:
    """Runs commands one after the other, their output in a log, a line on the screen for each."""

    def __init__(self, log_path):
        self.log_path = log_path
        open(log_path, "w").close()

    def run(self, what, command, needed=True):
        """Run one command; returns whether it worked, or leaves with the log's end when it was needed."""
        print(f"  {what} ...", flush=True)
        start = time.time()
        with open(self.log_path, "a") as log:
            log.write("\n$ {}\n".format(" ".join(command)))
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                while True:
                    try:
                        process.wait(timeout=STILL_EVERY_S)
                        break
                    except subprocess.TimeoutExpired:
                        print(f"    still at it, {time.time() - start:.0f} s", flush=True)
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                stop("stopped by you; `make setup` continues.")
        if process.returncode == 0:
            print(f"    {time.time() - start:.0f} s", flush=True)
            return True
        if needed:
            with open(self.log_path) as log:
                tail = log.read().splitlines()[-25:]
            stop(f"this step failed; the end of {self.log_path}:", *tail)
        return False


def pinned(name, file="requirements.lock"):
    """The exact requirement of `name` in `file`, such as `torch==2.13.0`."""
    with open(os.path.join(ROOT, file)) as lines:
        for line in lines:
            if line.startswith(name + "=="):
                return line.split()[0]
    stop(f"{file} pins no {name}: the file is damaged.")


def main(folder):
    """Make `folder` a working environment; safe to repeat."""
    found = check_machine()
    gpu = has_gpu()
    parent = os.path.dirname(os.path.abspath(folder))
    need_gb = DISK_GB_GPU if gpu else DISK_GB_CPU
    python = os.path.join(os.path.abspath(folder), "bin", "python")
    works = (
        os.path.exists(python)
        and subprocess.call([python, "-m", "pip", "-V"], stdout=subprocess.DEVNULL) == 0
    )
    free_gb = shutil.disk_usage(parent).free / 1e9
    if not works and free_gb < need_gb:
        stop(f"needs about {need_gb} GB in {parent}, only {free_gb:.1f} GB are free.")

    begun = time.time()
    kind = "GPU found: CUDA build" if gpu else "no NVIDIA GPU: CPU build"
    print(f"Setting up {folder} with Python {found} ({kind}); once, some minutes.", flush=True)
    if not works:
        import venv

        venv.create(folder, clear=True, with_pip=True)
    steps = Steps(os.path.join(folder, "setup.log"))
    # Byte code is made at first import, for what is imported: compiling all of it here costs a minute.
    pip = [python, "-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
    steps.run("build tools", [*pip, "setuptools>=77", "wheel", pinned("ninja"), pinned("uv")])
    # By exact pin and on its own: a range could fetch gigabytes of CUDA packages for a machine without a GPU.
    steps.run("PyTorch", [*pip, pinned("torch", "constraints.txt")])
    # DeepSpeed's source package imports torch while it is built, so it must not be built in isolation.
    locked = ["--no-build-isolation", "--no-deps", "--require-hashes", "-r", "requirements.lock"]
    uv = [python, "-m", "uv", "pip", "install", "--python", python]
    what = "DeepSpeed, Ray, MLflow and the rest"
    # uv is several times faster, but does not know pip's settings, such as the mirror of a closed network.
    if not steps.run(what, [*uv, *locked], needed=False):
        steps.run(what + ", by pip", [*pip, *locked])
    steps.run("FindRec", [*pip, "--no-build-isolation", "--no-deps", "-e", "."])
    if gpu:
        # faiss-cpu and faiss-gpu own the same files.
        steps.run("without faiss-cpu", [python, "-m", "pip", "uninstall", "-y", "faiss-cpu"])
        extras = [*pip, "--no-build-isolation", "-c", "constraints.txt", "-e", ".[gpu]"]
        if not steps.run("GPU extras (may compile mamba-ssm)", extras, needed=False):
            print("    !! GPU extras did not install (see setup.log): going on with FindRec's own scan and")
            print(
                "    !! faiss-cpu; training still runs on the GPU. A CUDA toolkit (nvcc) is usually missing."
            )
            steps.run("faiss-cpu", [*pip, "--no-deps", pinned("faiss-cpu")])
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):  # as images of containers often say
        # Every process would compile torch and Ray anew. Files that cannot be compiled are none of ours.
        lib = os.path.join(os.path.abspath(folder), "lib")
        compile_all = [python, "-m", "compileall", "-qq", "-j", "0", lib]
        steps.run("byte code, which PYTHONDONTWRITEBYTECODE forbids to keep later", compile_all, needed=False)
    print(f"Ready in {time.time() - begun:.0f} s.", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".venv")
