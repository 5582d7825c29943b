"""Create the virtual environment and install FindRec into it; standard library only.

    python3 .ci/setup_env.py .venv

Called by `make setup`. Says what it needs and how to get it, what it does, and how long each step took.
The full output of pip is in `<venv>/setup.log`. Written so that an old Python can still read the message.

Environment variables: FINDREC_TORCH=cpu, cu126 or cu130 chooses the build of PyTorch, where a machine sets up
for others; by default it fits the driver. FINDREC_MAMBA=1 also compiles mamba-ssm.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, TOO_NEW = (3, 11), (3, 15)
DISK_GB_CPU, DISK_GB_GPU = 5, 14
STILL_EVERY_S = 20
INDEX = "https://download.pytorch.org/whl/"
BYTES_PER_COMPILER = 16 << 30  # nvcc compiles each of mamba-ssm's files for four architectures at a time


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


def load_nvidia():
    """`findrec/nvidia.py` by its path: the package itself is not installed yet."""
    path = os.path.join(ROOT, "findrec", "nvidia.py")
    spec = importlib.util.spec_from_file_location("findrec_nvidia", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def choose_torch(nvidia, driver, wanted=None):
    """The build of PyTorch (None: that for CPUs) and lines that tell why.

    `driver` is None without `nvidia-smi`; `wanted` names a build and wins.
    """
    if wanted:
        names = {build.name: build for build in nvidia.BUILDS}
        if wanted != "cpu" and wanted not in names:
            stop(f"FINDREC_TORCH={wanted} names no build of PyTorch: give cpu, " + " or ".join(sorted(names)))
        return names.get(wanted), [f"FINDREC_TORCH={wanted}"]
    if driver is None:
        return None, ["no NVIDIA driver: CPU build"]
    choice = nvidia.choose_build(driver)
    name = driver.gpus[0] if driver.gpus else "GPU"
    if choice.build is None:
        return None, [
            "CPU build",
            f"!! {name} is not used: {choice.reason}.",
            "!! Mend the driver (Ubuntu: sudo ubuntu-drivers install), restart, delete this environment",
            "!! and run `make setup` again. FINDREC_TORCH=cpu, cu126 or cu130 chooses a build by hand.",
        ]
    return choice.build, [f"{name}, driver {driver.version}: build {choice.build.name}"]


def torch_requirements(version, build, newest):
    """Arguments of `pip install` for PyTorch, to be tried in this order.

    Exact builds only: `torch==2.13.0` alone would fetch gigabytes of CUDA packages for a machine without a
    GPU, or take a CPU build that lies in a local folder for a machine with one. The configured indexes come
    first, as a closed network has its own; PyPI has the build of the `newest` CUDA, as the bare version.
    """
    if build is None and not sys.platform.startswith("linux"):
        return [["torch==" + version]]  # no CUDA elsewhere
    name = build.name if build else "cpu"
    local = f"torch=={version}+{name}"
    first = [["torch===" + version]] if build and build.name == newest else []
    return [*first, [local], [local, "--extra-index-url", INDEX + name]]


class Step:
    """One step: commands that are tried until one works, and what happens where none does.

    `says` are lines to print then, and `otherwise` a step to take; without them the set-up ends, with `stops`
    as advice. A step without commands only says its lines.
    """

    def __init__(self, what, *commands, environment=None, stops=(), says=(), otherwise=None):
        self.what, self.commands = what, commands
        self.environment = environment or {}
        self.stops, self.says, self.otherwise = stops, says, otherwise


def planned_steps(python, nvidia, build, nvcc, environ):
    """The steps that make a fresh virtual environment of `python` work, in order.

    `build` is the build of PyTorch (None: that for CPUs), `nvcc` the path and the CUDA version of a compiler.
    """
    # Byte code is made at first import, for what is imported: compiling all of it here costs a minute.
    pip = [python, "-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
    # DeepSpeed's source package imports torch while it is built, so it must not be built in isolation.
    locked = ["--no-build-isolation", "--no-deps", "--require-hashes", "-r", "requirements.lock"]
    version = pinned("torch", "constraints.txt").split("==")[1]
    name = build.name if build else "cpu"
    torch = [[*pip, *tried] for tried in torch_requirements(version, build, nvidia.BUILDS[0].name)]
    steps = [
        Step("build tools", [*pip, "setuptools>=77", "wheel", pinned("ninja"), pinned("uv")]),
        Step(
            f"PyTorch, build {name}",
            *torch,
            stops=(
                f"No index has this build of PyTorch {version}. In a closed network name one that has it:",
                "PIP_EXTRA_INDEX_URL=https://... make setup",
                "or take the build for CPUs:  FINDREC_TORCH=cpu make setup"
                if build
                else "or PyPI's for CUDA, gigabytes that run here too:  FINDREC_TORCH=cu130 make setup",
            ),
        ),
        Step(
            "DeepSpeed, Ray, MLflow and the rest",
            # uv is several times faster, but does not know pip's settings, such as a closed network's mirror.
            [python, "-m", "uv", "pip", "install", "--python", python, *locked],
            [*pip, *locked],
            # DeepSpeed's setup.py asks of every CUDA op whether it could be built, and with a GPU but no nvcc
            # ends with MissingCUDAException. With this variable it does not look for nvcc; it builds no op.
            environment={"DS_IGNORE_CUDA_DETECTION": "1"},
        ),
        Step("FindRec", [*pip, "--no-build-isolation", "--no-deps", "-e", "."]),
    ]
    if build is not None:
        steps += gpu_steps(python, pip, nvidia, build, nvcc, environ)
    if environ.get("PYTHONDONTWRITEBYTECODE"):  # as images of containers often say
        # Every process would compile torch and Ray anew. Files that cannot be compiled are none of ours.
        lib = os.path.join(os.path.dirname(os.path.dirname(python)), "lib")
        what = "byte code, which PYTHONDONTWRITEBYTECODE forbids to keep later"
        says = ("not all files could be compiled, which does no harm",)
        steps.append(Step(what, [python, "-m", "compileall", "-qq", "-j", "0", lib], says=says))
    return steps


def gpu_steps(python, pip, nvidia, build, nvcc, environ):
    """FAISS for GPUs, mamba-ssm where it is asked for, and a look whether PyTorch sees the GPU."""
    faiss = [*pip, "-c", "constraints.txt", pinned("faiss-gpu", "constraints.txt")]
    if build.cuda == 12:  # faiss-gpu needs CUDA 12 too: keep the libraries that this PyTorch pins
        faiss.append("{}+{}".format(pinned("torch", "constraints.txt"), build.name))
    steps = [
        # They own the same files.
        Step("without faiss-cpu", [python, "-m", "pip", "uninstall", "-y", "faiss-cpu"]),
        Step(
            "FAISS for GPUs",
            faiss,
            says=("!! faiss-gpu did not install (see setup.log): indexes are searched on the CPU.",),
            otherwise=Step("faiss-cpu", [*pip, "--no-deps", pinned("faiss-cpu")]),
        ),
    ]
    if environ.get("FINDREC_MAMBA", "0") not in ("", "0"):
        steps.append(mamba_step(pip, build, nvcc, environ))
    seen = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    says = ("!! PyTorch does not see a GPU: `findrec doctor` says why.",)
    return [*steps, Step("a look whether PyTorch sees the GPU", [python, "-c", seen], says=says)]


def mamba_step(pip, build, nvcc, environ):
    """mamba-ssm, compiled here: its own set-up would take a binary from GitHub that no hash protects.

    Without its dependencies: those that FindRec does not use (tilelang, quack-kernels with CUTLASS) take
    gigabytes.
    """
    what = "mamba-ssm, which is compiled for many minutes"
    if nvcc is None or nvcc[1] != build.cuda:
        found = f"{nvcc[0]} is of CUDA {nvcc[1]}" if nvcc else "there is no nvcc"
        needs = f"it needs the CUDA {build.cuda} toolkit, but {found}"
        return Step(what, says=(f"!! mamba-ssm is left out: {needs}. FindRec's own scan is used.",))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(os.cpu_count() or 1, memory // BYTES_PER_COMPILER))
    return Step(
        what,
        [*pip, "--no-build-isolation", "--no-deps", pinned("mamba-ssm", "constraints.txt")],
        environment={
            "MAMBA_FORCE_BUILD": "TRUE",
            "CUDA_HOME": os.path.dirname(os.path.dirname(nvcc[0])),
            "MAX_JOBS": environ.get("MAX_JOBS") or str(jobs),
        },
        says=("!! mamba-ssm did not compile (see setup.log): FindRec's own scan is used.",),
    )


class Runner:
    """Runs steps one after the other, their output in a log, a line on the screen for each."""

    def __init__(self, log_path):
        self.log_path = log_path
        open(log_path, "w").close()

    def run(self, step):
        """Run one step; leaves with the log's end where it fails and is needed."""
        print(f"  {step.what} ...", flush=True)
        start = time.time()
        for command in step.commands:
            if self._works(command, step.environment, start):
                print(f"    {time.time() - start:.0f} s", flush=True)
                return
        if not step.says and step.otherwise is None:
            with open(self.log_path) as log:
                tail = log.read().splitlines()[-25:]
            stop(f"this step failed; the end of {self.log_path}:", *tail, *step.stops)
        for line in step.says:
            print(f"    {line}", flush=True)
        if step.otherwise is not None:
            self.run(step.otherwise)

    def _works(self, command, environment, start):
        with open(self.log_path, "a") as log:
            settings = "".join(f"{name}={value} " for name, value in environment.items())
            log.write("\n$ {}{}\n".format(settings, " ".join(command)))
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
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
        return process.returncode == 0


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
    nvidia = load_nvidia()
    build, reasons = choose_torch(nvidia, nvidia.find_driver(), os.environ.get("FINDREC_TORCH"))
    parent = os.path.dirname(os.path.abspath(folder))
    need_gb = DISK_GB_GPU if build else DISK_GB_CPU
    python = os.path.join(os.path.abspath(folder), "bin", "python")
    works = (
        os.path.exists(python)
        and subprocess.call([python, "-m", "pip", "-V"], stdout=subprocess.DEVNULL) == 0
    )
    free_gb = shutil.disk_usage(parent).free / 1e9
    if not works and free_gb < need_gb:
        stop(f"needs about {need_gb} GB in {parent}, only {free_gb:.1f} GB are free.")

    begun = time.time()
    print(f"Setting up {folder} with Python {found} ({reasons[0]}); once, some minutes.", flush=True)
    for line in reasons[1:]:
        print(f"  {line}", flush=True)
    steps = planned_steps(python, nvidia, build, nvidia.find_nvcc(), os.environ)
    if not works:
        import venv

        venv.create(folder, clear=True, with_pip=True)
    runner = Runner(os.path.join(folder, "setup.log"))
    for step in steps:
        runner.run(step)
    print(f"Ready in {time.time() - begun:.0f} s.", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".venv")
