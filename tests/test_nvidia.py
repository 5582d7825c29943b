"""Which build of PyTorch fits a driver; tests/test_setup_env.py has it with stand-ins for `nvidia-smi`."""

import pytest
import torch

from findrec.nvidia import BUILDS, Driver, choose_build, driver_problem, gpu_memory


@pytest.mark.parametrize(
    ("version", "capabilities", "build"),
    [
        ("580.65.06", (9.0,), "cu130"),
        ("580.65.06", (12.0,), "cu130"),
        ("580.65.06", (6.1,), "cu126"),
        ("580.65.06", (9.0, 3.5), "cu130"),  # an old card for the screen
        ("580.65.06", (9.0, 7.0), "cu126"),  # that has kernels for both
        ("580.65.06", (), "cu130"),
        ("570.133.20", (9.0,), "cu126"),
        ("570.133.20", (12.0,), None),
        ("525.60.13", (), "cu126"),
        ("515.105.01", (8.0,), None),
        ("535.183.01", (3.5,), None),
    ],
)
def test_the_build_runs_on_the_driver_and_has_kernels_for_the_gpus(version, capabilities, build):
    choice = choose_build(Driver(version, ("a GPU",) * len(capabilities), capabilities))
    assert (choice.build.name if choice.build else None) == build
    assert bool(choice.reason) == (build is None)


def test_a_driver_is_judged_by_the_cuda_that_pytorch_was_built_for():
    old, new = Driver("535.183.01"), Driver("580.65.06")
    assert "needs a driver of 580" in driver_problem(old, "13.0")
    assert not driver_problem(old, "12.6")
    assert not driver_problem(new, "13.0")
    assert not driver_problem(new, "14.1"), "unknown, so not judged"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machine_has_a_build_that_fits_its_driver():
    from findrec.nvidia import find_driver

    driver = find_driver()
    assert driver is not None
    assert len(driver.capabilities) == len(driver.gpus) >= torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability()
    assert float(f"{major}.{minor}") in driver.capabilities
    assert not driver_problem(driver, torch.version.cuda)
    build = choose_build(driver).build
    assert build in BUILDS


@pytest.mark.parametrize(
    ("answer", "size"),
    [("81559 MiB\n24564 MiB", 24564 << 20), ("[N/A]", None), ("No devices were found", None)],
)
def test_the_memory_of_the_smallest_gpu(tmp_path, monkeypatch, answer, size):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_memory() == size


def test_without_a_driver_the_memory_of_gpus_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() is None
