"""The commands that `make setup` runs, by driver, with programs that stand in for those of a machine."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from findrec import nvidia

ROOT = Path(__file__).resolve().parents[1]
TORCH = next(
    line.split()[0].split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)

# Driver, GPU and compute capability (None: an nvidia-smi that does not know the field).
A100, H100, B200, V100 = (
    ("NVIDIA A100-SXM4-80GB", "8.0"),
    ("NVIDIA H100 80GB HBM3", "9.0"),
    ("NVIDIA B200", "10.0"),
    ("Tesla V100-SXM2-32GB", "7.0"),
)
MACHINES = {
    "470": (("470.256.02", A100[0], None), "cpu", "driver 470.256.02 is too old"),
    "535": (("535.183.01", *A100), "cu126", ""),
    "570": (("570.133.20", *H100), "cu126", ""),
    "570, new GPU": (("570.133.20", *B200), "cpu", "needs a driver of 580 or newer"),
    "580": (("580.65.06", *H100), "cu130", ""),
    "580, old GPU": (("580.65.06", *V100), "cu126", ""),
    "none": (None, "cpu", "no NVIDIA driver"),
    "broken": ("NVIDIA-SMI has failed because it couldn't communicate", "cpu", "couldn't communicate"),
    "no devices": ("No devices were found", "cpu", "No devices were found"),
}

VARIABLES = ("DS_IGNORE_CUDA_DETECTION", "MAMBA_FORCE_BUILD", "MAX_JOBS")
# Writes its arguments and these variables into calls.jsonl. Fails where FAILS names an argument, WORKS none.
PYTHON = f"""#!{sys.executable}
import json, os, sys
here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
kept = {{k: v for k, v in os.environ.items() if k in {VARIABLES}}}
with open(os.path.join(here, "calls.jsonl"), "a") as calls:
    calls.write(json.dumps([sys.argv[1:], kept]) + chr(10))

def named(variable):
    return any(one in argument for one in os.environ.get(variable, "").split() for argument in sys.argv)

sys.exit(named("FAILS") and not named("WORKS"))
"""


@pytest.fixture
def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / ".ci" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(tmp_path, monkeypatch, setup_env, capsys):
    """Runs the whole set-up on a machine with the given driver; returns its calls and what it says."""
    programs, folder = tmp_path / "bin", tmp_path / "venv"
    for at in (programs, folder / "bin"):
        at.mkdir(parents=True)
    write(programs / "g++", "#!/bin/sh\n")
    write(folder / "bin" / "python", PYTHON)
    monkeypatch.setenv("PATH", str(programs))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "FINDREC_TORCH", "FINDREC_MAMBA", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup_env, "load_nvidia", lambda: nvidia)
    monkeypatch.setattr(nvidia, "DEFAULT_CUDA_HOME", str(tmp_path / "no-cuda"))

    def run(driver=None, nvcc=None):
        if driver is not None:
            write(programs / "nvidia-smi", nvidia_smi(driver))
        if nvcc is not None:
            write(programs / "nvcc", f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
        (folder / "calls.jsonl").unlink(missing_ok=True)
        setup_env.main(str(folder))
        calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
        return calls, capsys.readouterr().out

    return run


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


def nvidia_smi(driver):
    if isinstance(driver, str):
        return f'#!/bin/sh\necho "{driver}"\nexit 9\n'
    version, name, capability = driver
    answer = f"echo {capability}" if capability else "echo not a valid field to query; exit 2"
    return (
        f'#!/bin/sh\ncase "$1" in\n*driver_version*) echo "{version}, {name}" ;;\n'
        f"*compute_cap*) {answer} ;;\nesac\n"
    )


def installed(calls, name):
    """The requirements of a package in the commands of pip, and in which command each is."""
    return [argument for arguments, _ in calls for argument in arguments if argument.startswith(name + "=")]


@pytest.mark.parametrize("case", MACHINES)
def test_the_build_of_torch_fits_the_driver(machine, case):
    driver, build, said = MACHINES[case]
    calls, text = machine(driver)
    (wanted,) = {f"torch==={TORCH}"} if build == "cu130" else {f"torch=={TORCH}+{build}"}
    assert set(installed(calls, "torch")) == {wanted}
    assert said in text
    assert bool(installed(calls, "faiss-gpu")) == (build != "cpu")
    assert ("!!" in text) == (build == "cpu" and driver is not None)
    assert not installed(calls, "mamba-ssm")


@pytest.mark.parametrize("case", ["580", "none"])
def test_deepspeed_is_built_without_a_look_for_nvcc(machine, case):
    calls, _ = machine(MACHINES[case][0])
    (step,) = [kept for arguments, kept in calls if "requirements.lock" in arguments]
    assert step == {"DS_IGNORE_CUDA_DETECTION": "1"}
    assert all(not kept for arguments, kept in calls if "requirements.lock" not in arguments)


def test_nothing_brings_cuda_to_a_machine_without_a_gpu(machine):
    """Every installation is without dependencies, or of PyTorch by its exact CPU build, or of build tools."""
    calls, _ = machine(None)
    installs = [arguments for arguments, _ in calls if "install" in arguments]
    assert len(installs) == 4
    for arguments in installs:
        tools = "setuptools>=77" in arguments
        assert tools or "--no-deps" in arguments or f"torch=={TORCH}+cpu" in arguments
    assert not installed(calls, "faiss-gpu")


@pytest.mark.parametrize(("case", "build"), [("535", "cu126"), ("none", "cpu")])
def test_the_public_index_is_asked_where_the_configured_ones_lack_the_build(
    machine, monkeypatch, case, build
):
    monkeypatch.setenv("FAILS", f"torch=={TORCH}")
    monkeypatch.setenv("WORKS", f"https://download.pytorch.org/whl/{build}")
    calls, _ = machine(MACHINES[case][0])
    first, second = [a for a, _ in calls if f"torch=={TORCH}+{build}" in a and "faiss-gpu==1.15.1" not in a]
    assert "--extra-index-url" not in first
    assert second[-2:] == ["--extra-index-url", f"https://download.pytorch.org/whl/{build}"]


def test_no_build_to_be_had_stops_with_advice(machine, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "torch==")
    with pytest.raises(SystemExit):
        machine(None)
    text = capsys.readouterr().err
    assert f"No index has this build of PyTorch {TORCH}" in text
    assert "PIP_EXTRA_INDEX_URL" in text
    assert "FINDREC_TORCH=cu130" in text


def test_without_faiss_for_gpus_that_for_cpus_is_installed(machine, monkeypatch):
    monkeypatch.setenv("FAILS", "faiss-gpu")
    calls, text = machine(MACHINES["580"][0])
    order = [one.split("==")[0] for a, _ in calls for one in a if one.startswith("faiss")]
    assert order == ["faiss-cpu", "faiss-gpu", "faiss-cpu"]  # removed, tried, installed again
    assert "faiss-gpu did not install" in text


@pytest.mark.parametrize(
    ("case", "nvcc", "compiled", "said"),
    [
        ("580", "13.0", True, ""),
        ("535", "12.4", True, ""),
        ("580", None, False, "there is no nvcc"),
        ("580", "12.8", False, "nvcc is of CUDA 12"),
    ],
)
def test_mamba_is_compiled_where_it_is_asked_for_and_can_be(machine, monkeypatch, case, nvcc, compiled, said):
    monkeypatch.setenv("FINDREC_MAMBA", "1")
    calls, text = machine(MACHINES[case][0], nvcc)
    assert said in text
    steps = [(arguments, kept) for arguments, kept in calls if installed([(arguments, 0)], "mamba-ssm")]
    assert len(steps) == compiled
    for arguments, kept in steps:
        assert kept["MAMBA_FORCE_BUILD"] == "TRUE"
        assert int(kept["MAX_JOBS"]) >= 1
        assert "--no-deps" in arguments


def test_a_build_can_be_chosen_by_hand(machine, monkeypatch, capsys):
    monkeypatch.setenv("FINDREC_TORCH", "cu126")
    calls, _ = machine(None)
    assert set(installed(calls, "torch")) == {f"torch=={TORCH}+cu126"}
    monkeypatch.setenv("FINDREC_TORCH", "cu999")
    with pytest.raises(SystemExit):
        machine(None)
    assert "give cpu, cu126 or cu130" in capsys.readouterr().err


def test_a_driver_that_does_not_answer_is_given_up(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(nvidia, "_ANSWER_S", 0.2)
    write(tmp_path / "bin" / "nvidia-smi", f"#!{sys.executable}\nimport time\ntime.sleep(20)\n")
    calls, text = machine(None)
    assert "does not answer" in text
    assert set(installed(calls, "torch")) == {f"torch=={TORCH}+cpu"}


def test_the_set_up_can_be_read_by_old_pythons():
    """So that they can say which Python is needed: no syntax after 3.6."""
    import ast

    ast.parse((ROOT / ".ci" / "setup_env.py").read_text(), feature_version=(3, 6))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels of PyTorch as the indexes have them: PyPI's brings CUDA packages, the CPU build does not."""
    folder = tmp_path_factory.mktemp("wheels")
    for version, needs in ((TORCH, "nvidia-cublas"), (f"{TORCH}+cpu", "")):
        make_wheel(folder, "torch", version, needs)
    make_wheel(folder, "nvidia_cublas", "13.0", "")
    return folder


def make_wheel(folder, name, version, needs):
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PyTorch has no builds to choose")
@pytest.mark.parametrize(
    ("build", "at_hand", "gets"),
    [
        ("cpu", "both", {f"torch-{TORCH}+cpu"}),
        ("cpu", "of PyPI", None),  # never the CUDA packages: rather the next index
        ("cu130", "both", {f"torch-{TORCH}", "nvidia_cublas-13.0"}),
    ],
)
def test_the_resolver_takes_the_exact_build(setup_env, wheels, tmp_path, build, at_hand, gets):
    for wheel in wheels.iterdir():
        if at_hand == "both" or "+cpu" not in wheel.name:
            (tmp_path / wheel.name).write_bytes(wheel.read_bytes())
    chosen = {b.name: b for b in nvidia.BUILDS}.get(build)
    first, *_ = setup_env.torch_requirements(TORCH, chosen, nvidia.BUILDS[0].name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--isolated"]
    done = subprocess.run(
        [*command, "--target", tmp_path / "target", "--no-index", "--find-links", tmp_path, *first],
        capture_output=True,
        text=True,
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("Would install ")]
    if gets is None:
        assert done.returncode != 0
        assert not found
    else:
        assert done.returncode == 0, done.stderr
        assert {one.replace("nvidia-cublas", "nvidia_cublas") for one in found[0].split()[2:]} == gets


def test_the_variable_is_one_that_deepspeed_heeds():
    """DeepSpeed's CUDA ops, asked as its setup.py does, for a GPU without nvcc, which is emulated here."""
    program = """
import importlib, os, pkgutil, torch, torch.utils.cpp_extension
torch.cuda.is_available, torch.version.cuda = (lambda: True), "13.0"
torch.utils.cpp_extension.CUDA_HOME = None
class Properties: major, minor, name = 9, 0, "NVIDIA H100"
torch.cuda.get_device_properties = lambda *_: Properties
torch.cuda.device_count = lambda: 1
import deepspeed.ops.op_builder as package
from deepspeed.ops.op_builder.builder import MissingCUDAException
names = [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
modules = [importlib.import_module(name) for name in names]
kinds = [k for m in modules for k in vars(m).values() if isinstance(k, type) and k.__module__ == m.__name__]
for value in ("", "1"):
    os.environ["DS_IGNORE_CUDA_DETECTION"] = value
    asked = refused = 0
    for kind in kinds:
        if hasattr(kind, "BUILD_VAR"):
            asked += 1
            try:
                kind().is_compatible()
            except MissingCUDAException:
                refused += 1
    print(asked, refused)
"""
    environment = dict(os.environ, DS_ACCELERATOR="cpu")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    without, given = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[-2:]]
    assert without[0] == given[0] > 15
    assert without[1] > 0
    assert given[1] == 0


@pytest.mark.network
@pytest.mark.parametrize("python", ["3.11", "3.14"])
def test_the_extras_for_gpus_resolve(python, tmp_path):
    """Only metadata are fetched. Skips where no index answers."""
    found = compile_requirements(["pyproject.toml", "--extra", "gpu", "--extra", "mamba"], python)
    held = {line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for name in ("faiss-gpu", "mamba-ssm"):
        (version,) = [line for line in found if line.startswith(f"{name}==")]
        assert version in held


def compile_requirements(arguments, python):
    given = [
        "--python-version",
        python,
        "--python-platform",
        "x86_64-manylinux_2_28",
        "-c",
        "constraints.txt",
    ]
    quiet = (
        ["-q", "--no-header", "--no-annotate", "--no-config"] if arguments[0] != "pyproject.toml" else ["-q"]
    )
    command = [sys.executable, "-m", "uv", "pip", "compile", *arguments, *given, *quiet]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if any(
        word in done.stderr for word in ("dns error", "Failed to fetch", "timed out", "Connection refused")
    ):
        pytest.skip(f"no package index answers: {done.stderr[-300:]}")
    done.check_returncode()
    return done.stdout.splitlines()
