"""The baselines agree with the op, and every implementation gets rows."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from bench import scan
from bench.memory import peak_bytes
from bench.scan import BASELINES, bench_scan, input_bytes, make_warm_run
from torch import Tensor

from findrec.errors import FindRecError
from findrec.ops.scan.selective_scan import selective_scan

MIB = 2**20
needs_mambapy = pytest.mark.skipif(
    importlib.util.find_spec("mambapy") is None, reason="needs mambapy: pip install -e '.[bench]'"
)


@pytest.mark.parametrize("length", [1, 9, 16])
@pytest.mark.parametrize("name", ["unbind", pytest.param("mambapy", marks=needs_mambapy)])
def test_baselines_agree_with_the_reference(name: str, length: int) -> None:
    torch.manual_seed(0)
    u, z, delta = torch.randn(3, 2, length, 6, dtype=torch.float64)
    b, c = torch.randn(2, 2, length, 4, dtype=torch.float64)
    a, d = -torch.rand(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (u, delta.exp(), a, b, c, d, z)]

    def outcome(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    expected = outcome(selective_scan(*inputs, impl="reference"))
    torch.testing.assert_close(outcome(getattr(scan, f"{name}_scan")(*inputs)), expected)


@needs_mambapy
@pytest.mark.slow
def test_rows_for_each_baseline_and_ours_against_each() -> None:
    rows = bench_scan([(1, 8, 4, 4)], runs=1)
    unbind, mambapy, *ours = rows
    assert (unbind.impl, mambapy.impl) == BASELINES == (unbind.baseline, mambapy.baseline)
    assert unbind.ratio == mambapy.ratio == 1.0
    assert tuple(row.baseline for row in ours) == BASELINES
    for row, baseline in zip(ours, (unbind, mambapy), strict=True):
        assert row.impl not in BASELINES
        assert row.ratio == baseline.median_s / row.median_s
    assert {row.shape for row in rows} == {"B1 L8 D4 N4"}


@pytest.mark.parametrize(
    ("best", "usable", "measured"),
    [("mamba_ssm", True, ["mamba_ssm", "triton"]), ("triton", True, ["triton"]), ("torch", False, ["torch"])],
)
def test_on_cuda_triton_is_measured_where_it_works(
    best: str, usable: bool, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(device: str, impl: str = "auto") -> str:
        if impl == "triton" and not usable:
            raise FindRecError("no triton")
        return best if impl == "auto" else impl

    monkeypatch.setattr(scan, "scan_backend", backend)
    assert scan.our_impls("cuda") == measured
    assert scan.our_impls("cpu") == [best]


def test_a_missing_package_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert scan.usable_baselines() == ("unbind",)
    assert "pip install" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 50, 128, 16), (1, 16384, 64, 16), (2, 1000, 256, 16)])
def test_peak_of_our_scan_is_near_the_size_of_its_outputs(shape: tuple[int, int, int, int]) -> None:
    batch, length, width, states = shape
    must_return = 4 * batch * length * (4 * width + 2 * states)  # y, and the gradients of u, delta, z, B, C
    peak = peak_bytes(make_warm_run, "auto", shape)
    assert peak > must_return - MIB  # otherwise something else was measured
    assert peak < 1.5 * input_bytes(shape)
