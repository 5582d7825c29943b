"""Types inside a Mamba block under bfloat16 autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from findrec.models.parts import mamba
from findrec.models.parts.mamba import Mamba, causal_conv
from findrec.models.parts.stream_config import StreamConfig


def make_block() -> Mamba:
    torch.manual_seed(0)
    return Mamba(32, StreamConfig(d_state=8))


def pass_through(block: Mamba, x_BLd: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    """Output and gradients."""
    block.zero_grad()
    x_BLd = x_BLd.detach().clone().requires_grad_()
    with torch.autocast(x_BLd.device.type, torch.bfloat16, enabled=autocast):
        y_BLd = block(x_BLd)
    weights = torch.linspace(-1, 1, y_BLd.numel(), device=y_BLd.device).view(y_BLd.shape)
    (y_BLd.float() * weights).sum().backward()
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"y": y_BLd.detach().float(), "x": x_BLd.grad, **grads}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, wanted in expected.items():
        assert actual[name].dtype == torch.float32
        error = (actual[name].cpu() - wanted).norm() / wanted.norm()
        assert error < 0.03, f"{name}: {error:.2e}"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.dtype]]:
    """The types that each call of the scan got and gave."""
    calls = []
    scan = mamba.selective_scan

    def noting(*inputs, **options):
        y = scan(*inputs, **options)
        names = ("u", "delta", "A", "B", "C", "D", "z", "y")
        calls.append({name: x.dtype for name, x in zip(names, (*inputs, y), strict=True)})
        return y

    monkeypatch.setattr(mamba, "selective_scan", noting)
    return calls


def test_a_gpu_scans_in_the_type_of_the_projections(
    scanned: list[dict[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mamba, "_scan_dtype", lambda u_BLE: u_BLE.dtype)  # as on a GPU
    block, x_BLd = make_block(), torch.randn(3, 20, 32)
    expected = pass_through(block, x_BLd, autocast=False)
    assert set(scanned[0].values()) == {torch.float32}
    assert_near(pass_through(block, x_BLd, autocast=True), expected)
    low = {name for name, dtype in scanned[1].items() if dtype == torch.bfloat16}
    assert {"u", "B", "C", "z", "y"} <= low
    assert scanned[1]["A"] == scanned[1]["D"] == torch.float32


def test_a_cpu_scans_what_the_convolution_summed(scanned: list[dict[str, torch.dtype]]) -> None:
    block, x_BLd = make_block(), torch.randn(3, 20, 32)
    expected = pass_through(block, x_BLd, autocast=False)
    assert_near(pass_through(block, x_BLd, autocast=True), expected)
    assert scanned[1]["u"] == torch.float32


def test_prefill_gets_the_same_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "_scan_dtype", lambda u_BLE: u_BLE.dtype)
    block, x_BLd = make_block(), torch.randn(3, 20, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y_BLd, state = block.prefill(x_BLd, torch.tensor([20, 20, 20]))
        torch.testing.assert_close(y_BLd, block(x_BLd), rtol=0.03, atol=0.03)
    assert state.scan_BEN.dtype == torch.float32


def test_a_convolution_is_rounded_once() -> None:
    torch.manual_seed(0)
    x, taps, bias = torch.randn(2, 300, 6).bfloat16(), torch.randn(6, 4), torch.randn(6)
    dy = torch.randn(2, 300, 6).bfloat16()

    def run(x: Tensor, taps: Tensor, bias: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        x, taps, bias = (value.clone().requires_grad_() for value in (x, taps, bias))
        y = causal_conv(x, taps, bias, dtype)
        return [y.detach(), *torch.autograd.grad(y, (x, taps, bias), dy.to(y.dtype))]

    y, dx, dtaps, dbias = run(x, taps, bias, dtype=torch.bfloat16)
    wide_y, wide_dx, wide_dtaps, wide_dbias = run(x.float(), taps, bias, dtype=None)
    assert torch.equal(y, wide_y.bfloat16())
    assert torch.equal(dx, wide_dx.bfloat16())
    assert torch.equal(dtaps, wide_dtaps)
    assert torch.equal(dbias, wide_dbias)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_autocast_is_near_float32(scanned: list[dict[str, torch.dtype]]) -> None:
    block, x_BLd = make_block(), torch.randn(3, 200, 32)
    expected = pass_through(block, x_BLd, autocast=False)
    assert_near(pass_through(block.cuda(), x_BLd.cuda(), autocast=True), expected)
    assert scanned[1]["u"] == scanned[1]["y"] == torch.bfloat16
