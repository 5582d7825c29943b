"""The Triton kernels: what they keep, that they compile for GPUs, and the interpreter they are tested in.

Their results are compared with the plain loop in `test_selective_scan.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_interpreter import INSTALLED, fast_scans, needs_interpreter  # noqa: F401

from findrec.errors import FindRecError
from findrec.ops.scan import _scan_triton
from findrec.ops.scan._scan_triton import MAX_STATES, _tile
from findrec.ops.scan.selective_scan import scan_backend, selective_scan

CHECKOUT = Path(__file__).parents[3]


def make_inputs(rows: int, length: int, channels: int, states: int) -> list[Tensor]:
    torch.manual_seed(0)
    u, delta, z = (torch.rand(rows, length, channels) for _ in range(3))
    B, C = (torch.randn(rows, length, states) for _ in range(2))
    inputs = [u, delta, -torch.rand(channels, states), B, C, torch.randn(channels), z]
    return [x.requires_grad_() for x in inputs]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the package triton")
def test_compiled_kernels_agree_with_the_loop(tmp_path: Path) -> None:
    capability = 90
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(CHECKOUT / "tests/compiled_kernels.py"), str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(calls) == 5
    for call in calls:
        tolerance = {"float32": 5e-6, "bfloat16": 2**-7}[call["dtype"]]
        assert max(call["errors"].values()) < tolerance, call["errors"]
        assert [x["kernel"] for x in call["kernels"]] == ["scan_forward", "scan_backward"]
        for kernel in call["kernels"]:
            assert kernel["target"].startswith(f".target sm_{capability}")
            assert kernel["stack"] == 0  # all states stay in registers
            assert not kernel["atomic"]  # the order of programs would decide about the last bits


@needs_interpreter
def test_no_state_of_a_step_is_kept(fast_scans: None) -> None:  # noqa: F811
    rows, length, channels, states = 2, 100, 24, 16
    inputs = make_inputs(rows, length, channels, states)
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        selective_scan(*inputs, impl="triton")
    chunks = -(-length // _tile(channels, states)["STEPS"])
    borders = rows * (chunks - 1) * channels * states
    assert borders < rows * length * channels
    assert sum(kept.values()) == sum(x.numel() for x in inputs) + borders


@needs_interpreter
def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch, fast_scans: None) -> None:  # noqa: F811
    launched = []
    monkeypatch.setattr(_scan_triton, "_launch", lambda kernel, tensors, strided: launched.append(tensors))
    inputs = make_inputs(1, 40, 3, 4)
    selective_scan(*inputs, impl="triton")
    with torch.no_grad():
        selective_scan(*inputs, impl="triton")
    borders = [tensors[9] for tensors in launched]
    assert borders[0].shape == (1, 2, 3, 4)
    assert borders[1] is None


@pytest.mark.parametrize("states", [1, 2, 3, 16, 17, 64, 100, 256, 300, MAX_STATES])
@pytest.mark.parametrize("channels", [1, 3, 64, 1000])
def test_tiles_fit_into_registers(channels: int, states: int) -> None:
    tile = _tile(channels, states)
    assert all(size >= 2 and size & (size - 1) == 0 for size in tile.values())  # powers of two
    assert tile["STATES"] >= states
    assert tile["STEPS"] * tile["CHANNELS"] * tile["STATES"] <= 4096
    assert tile["CHANNELS"] <= max(2, 2 * channels)


@needs_interpreter
def test_too_many_states_are_refused(fast_scans: None) -> None:  # noqa: F811
    with pytest.raises(FindRecError, match=f"at most {MAX_STATES} states"):
        selective_scan(*make_inputs(1, 1, 1, MAX_STATES + 1), impl="triton")


@needs_interpreter
@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4)])
def test_empty_batches_and_histories(shape: tuple[int, int, int, int], fast_scans: None) -> None:  # noqa: F811
    rows, _, channels, states = shape
    inputs = make_inputs(*shape)
    start = torch.randn(rows, channels, states, requires_grad=True)
    y, last = selective_scan(*inputs, initial_state=start, return_last_state=True, impl="triton")
    assert y.shape == shape[:3]
    assert torch.equal(last, start)
    (dstart,) = torch.autograd.grad(y.sum() + 2 * last.sum(), start)
    assert torch.equal(dstart, torch.full_like(start, 2.0))


@needs_interpreter
def test_slice_by_slice_is_the_interpreters_own_scan() -> None:
    inputs = make_inputs(1, 5, 2, 3)
    slow = torch.autograd.grad(selective_scan(*inputs, impl="triton").sum(), inputs)
    from triton.runtime.interpreter import ScanOps
    from triton_interpreter import scan_by_slices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanOps, "generic_scan", scan_by_slices)
        fast = torch.autograd.grad(selective_scan(*inputs, impl="triton").sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(slow, fast, strict=True))


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(FindRecError, match="CUDA device" if INSTALLED else "not installed"):
        scan_backend("cpu", "triton")
