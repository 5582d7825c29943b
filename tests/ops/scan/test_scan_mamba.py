"""The binding of mamba-ssm's kernels, on a stand-in as strict as they are, and what `auto` does without."""

from __future__ import annotations

import importlib.machinery
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import fake_kernels
import pytest
import torch
from torch import Tensor
from triton_interpreter import fast_scans, needs_interpreter  # noqa: F401

from findrec.errors import FindRecError
from findrec.ops.scan import _scan_mamba, _scan_triton, _trial
from findrec.ops.scan import selective_scan as scan
from findrec.ops.scan._scan_mamba import mamba_problem
from findrec.ops.scan.selective_scan import scan_backend, selective_scan

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


def make_inputs(
    shape: tuple[int, int, int, int],
    *,
    skip: bool = True,
    gate: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Slices of projections, as a model gives them; delta and the parameters in float32."""
    rows, length, channels, states = shape
    torch.manual_seed(0)
    both = torch.randn(rows, length, 2 * channels).to(dtype)
    mixed = torch.randn(rows, length, 1 + 2 * states).to(dtype)
    u, z = both.chunk(2, dim=-1)
    inputs = {
        "u": u,
        "delta": torch.nn.functional.softplus(torch.randn(rows, length, channels) - 2),
        "A": -torch.rand(states, channels).t() * 4,
        "B": mixed[..., 1 : 1 + states],
        "C": mixed[..., 1 + states :],
    }
    if skip:
        inputs["D"] = torch.randn(2 * channels)[::2]
    if gate:
        inputs["z"] = z
    return {
        name: x.requires_grad_() if x.is_leaf else x.detach().requires_grad_() for name, x in inputs.items()
    }


def outcome(impl: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    y = selective_scan(**inputs, impl=impl)  # type: ignore[call-overload]
    weights = torch.linspace(-1, 2, y.numel()).to(y).view(y.shape)  # in another layout than the kernel's
    grads = torch.autograd.grad(y, list(inputs.values()), weights)
    return {"y": y, **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}}


def clear() -> None:
    for function in (
        scan._best,
        scan._triton_or_torch,
        scan._torch_because,
        _scan_mamba._problem,
        _scan_triton._problem,
    ):
        function.cache_clear()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in is installed, and `auto` chooses on a CPU as it does on a GPU."""
    module = fake_kernels.selective_scan_cuda()
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", module)
    monkeypatch.setattr(scan, "mamba_problem", lambda kind: _scan_mamba._problem("cpu"))
    monkeypatch.setattr(scan, "scan_backend", as_on_a_gpu)
    clear()
    yield module
    clear()


def as_on_a_gpu(device: torch.device, impl: str = "auto") -> str:
    if impl == "auto":
        problem = scan.mamba_problem("cuda")
        return "mamba_ssm" if problem is None else scan._triton_or_torch("cpu", f"mamba_ssm: {problem}; ")
    return impl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("skip", "gate"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("shape", [(2, 33, 5, 16), (1, 1, 1, 1), (3, 128, 4, 3), (1, 1, 7, 2), (2, 9, 1, 4)])
def test_agrees_with_the_loop(
    shape: tuple[int, int, int, int], skip: bool, gate: bool, dtype: torch.dtype, on_a_gpu: ModuleType
) -> None:
    inputs = make_inputs(shape, skip=skip, gate=gate, dtype=dtype)
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = outcome("reference", wide)
    for name, actual in outcome("mamba_ssm", inputs).items():
        assert actual.dtype == (inputs[name.removeprefix("d")] if name != "y" else inputs["u"]).dtype
        assert actual.shape == expected[name].shape
        error = (actual.double() - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1.0)
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


def test_more_than_one_of_the_kernels_chunks(on_a_gpu: ModuleType) -> None:
    inputs = make_inputs((1, fake_kernels.CHUNK + 3, 2, 2))
    expected = outcome("torch", inputs)
    for name, actual in outcome("mamba_ssm", inputs).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        last = selective_scan(**inputs, return_last_state=True, impl="mamba_ssm")[1]  # type: ignore[call-overload]
        wanted = selective_scan(**inputs, return_last_state=True, impl="torch")[1]  # type: ignore[call-overload]
    torch.testing.assert_close(last, wanted)


def test_unaligned_tensors_are_copied(on_a_gpu: ModuleType) -> None:
    inputs = make_inputs((1, 8, 1, 1))
    storage = torch.randn(1 + 8)
    inputs["u"] = storage[1:].view(1, 8, 1).requires_grad_()  # already with steps last, 4 bytes off
    assert torch.allclose(outcome("mamba_ssm", inputs)["y"], outcome("reference", inputs)["y"], atol=1e-5)


def chosen(monkeypatch: pytest.MonkeyPatch, call: dict[str, Any]) -> list[str]:
    """The implementations that run `call`; all compute it by the torch one."""
    ran = []
    run = scan._run

    def noting(impl, *rest):
        ran.append(impl)
        return run("torch", *rest)

    monkeypatch.setattr(scan, "_run", noting)
    selective_scan(**call)
    return ran


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double() for name, x in inputs.items()}


UNFIT: dict[str, Callable[[], dict[str, Any]]] = {
    "takes no initial state": lambda: {**make_inputs((1, 3, 2, 2)), "initial_state": torch.zeros(1, 2, 2)},
    "knows no float64": lambda: double(make_inputs((1, 3, 2, 2))),
    "takes no empty": lambda: {name: x.detach() for name, x in make_inputs((0, 3, 2, 2)).items()},
    "at most 256 states": lambda: make_inputs((1, 2, 2, 257)),
    "through the last state": lambda: {**make_inputs((1, 3, 2, 2)), "return_last_state": True},
}


@pytest.mark.parametrize("problem", UNFIT)
@pytest.mark.parametrize("triton", [None, "no compiler"])
def test_a_call_it_cannot_run_goes_to_another(
    problem: str,
    triton: str | None,
    on_a_gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scan, "triton_problem", lambda kind: triton)
    inputs = UNFIT[problem]()
    with pytest.raises(FindRecError, match=problem):
        selective_scan(**inputs, impl="mamba_ssm")
    assert chosen(monkeypatch, inputs) == ["triton" if triton is None else "torch"]
    said = capsys.readouterr().out
    assert (problem in said and "no compiler" in said) == (triton is not None)  # a slow way is never silent
    assert chosen(monkeypatch, make_inputs((1, 3, 2, 2))) == ["mamba_ssm"]


def test_deterministic_algorithms_exclude_it(on_a_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "triton_problem", lambda kind: None)
    inputs = make_inputs((1, 3, 2, 2))
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(monkeypatch, inputs) == ["triton"]
        with torch.no_grad():  # only gradients depend on an order
            assert chosen(monkeypatch, inputs) == ["mamba_ssm"]
    finally:
        torch.use_deterministic_algorithms(False)


def wrong_gradient(kernels: dict[str, Callable]) -> None:
    bwd = kernels["bwd"]
    kernels["bwd"] = lambda *args: [2 * bwd(*args)[0], *bwd(*args)[1:]]


def another_signature(kernels: dict[str, Callable]) -> None:
    fwd = kernels["fwd"]
    kernels["fwd"] = lambda u, delta, A, B, C, D, z, bias, softplus, lengths: fwd(
        u, delta, A, B, C, D, z, bias, softplus
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_gradient, "instead of"),
        (another_signature, "TypeError"),
        (lambda kernels: kernels.pop("fwd"), "AttributeError"),
    ],
)
def test_kernels_that_do_not_work_are_not_chosen(
    spoil,
    reason: str,
    on_a_gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(vars(on_a_gpu))
    monkeypatch.setattr(scan, "triton_problem", lambda kind: "there is none")
    assert scan.scan_backend(torch.device("cpu")) == "torch"
    banner = capsys.readouterr().out
    assert reason in banner
    assert "triton: there is none" in banner
    monkeypatch.setattr(scan, "triton_problem", lambda kind: None)
    clear()
    assert scan.scan_backend(torch.device("cpu")) == "triton"
    assert capsys.readouterr().out == ""


def test_a_trial_passes_with_the_kernels_and_fails_without(
    on_a_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _scan_mamba._problem("cpu") is None
    with torch.inference_mode():
        clear()
        assert _scan_mamba._problem("cpu") is None
    clear()
    monkeypatch.delitem(sys.modules, "selective_scan_cuda")
    assert "not installed" in _scan_mamba._problem("cpu")


@needs_interpreter
def test_a_trial_of_the_triton_kernels(fast_scans: None) -> None:  # noqa: F811
    _scan_triton._problem.cache_clear()
    assert _scan_triton._problem("cpu") is None
    assert "instead of" in _trial.trial(lambda u, *rest: 2 * u, "cpu")


def test_a_package_without_kernels_is_no_mamba_ssm() -> None:
    assert mamba_problem("cpu") is not None
    with pytest.raises(FindRecError, match="mamba-ssm"):
        scan_backend("cpu", "mamba_ssm")


def test_the_package_itself_is_not_imported() -> None:
    """It takes seconds, in every worker."""
    code = """
import importlib.machinery, sys
import fake_kernels, torch
module = fake_kernels.selective_scan_cuda()
module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
sys.modules["selective_scan_cuda"] = module
sys.modules["mamba_ssm"] = None  # an import would fail
from findrec.ops.scan import _scan_mamba
print(_scan_mamba._problem("cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "None", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(
    mamba_problem("cuda" if torch.cuda.is_available() else "cpu") is not None,
    reason="needs the kernels of mamba-ssm and a GPU",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 33, 5, 16), (3, 128, 4, 3), (2, 5000, 64, 16)])
def test_cuda_agrees_with_the_loop(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype=dtype)
    expected = outcome("torch", {name: x.detach().double().requires_grad_() for name, x in inputs.items()})
    moved = {name: x.detach().cuda().requires_grad_() for name, x in inputs.items()}
    for name, actual in outcome("mamba_ssm", moved).items():
        error = (actual.cpu().double() - expected[name]).abs().max() / expected[name].abs().max().clamp(
            min=1.0
        )
        assert error < 5 * TOLERANCE[dtype], f"{name}: {error:.2e}"
