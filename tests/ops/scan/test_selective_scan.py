"""Every implementation of the scan against the plain loop in float64, outputs and gradients; and the step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from triton_interpreter import fast_scans, needs_interpreter  # noqa: F401

from findrec.errors import FindRecError
from findrec.ops.scan import _scan_cpp
from findrec.ops.scan import selective_scan as scan
from findrec.ops.scan.selective_scan import scan_backend, selective_scan, selective_scan_step

pytestmark = pytest.mark.usefixtures("fast_scans")

FAST = ["torch", "cpp", pytest.param("triton", marks=needs_interpreter)]
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 3, 4),
    (3, 17, 16, 16),
    (2, 33, 40, 16),
    (1, 64, 3, 1),
    (2, 65, 16, 4),
    (1, 129, 40, 16),  # three chunks of the C++ kernel
    (3, 100, 1, 4),
]
LONG = (1, 1000, 5, 16)
OPTIONS = list(itertools.product([False, True], repeat=3))  # D, z, initial state
CASES = [*itertools.product(SHAPES, OPTIONS), (LONG, OPTIONS[-1])]
STEP_NAMES = {"u": "u_BD", "delta": "delta_BD", "A": "A_DN", "B": "B_BN", "C": "C_BN"}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}  # relative to the largest value of a tensor


def make_inputs(
    shape: tuple[int, int, int, int], skip: bool, gate: bool, start: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    b, length, channels, states = shape
    torch.manual_seed(0)
    inputs = {
        "u": torch.randn(b, length, channels),
        "delta": torch.nn.functional.softplus(torch.randn(b, length, channels) - 2),
        "A": -torch.rand(channels, states) * 8,
        "B": torch.randn(b, length, states),
        "C": torch.randn(b, length, states),
    }
    if skip:
        inputs["D"] = torch.randn(channels)
    if gate:
        inputs["z"] = torch.randn(b, length, channels)
    if start:
        inputs["initial_state"] = torch.randn(b, channels, states)
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def run(impl: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed mix of them."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, last = selective_scan(**inputs, return_last_state=True, impl=impl)  # type: ignore[call-overload]
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y).roll(1, 0)
    ((y * weights).sum() + last.square().sum()).backward()  # type: ignore[no-untyped-call]
    result = {"y": y.detach(), "last": last.detach()}
    for name, x in inputs.items():
        assert x.grad is not None, name
        result[f"d{name}"] = x.grad
    return result


def check_agreement(
    impl: str, shape: tuple[int, int, int, int], options: tuple[bool, bool, bool], dtype: torch.dtype
) -> None:
    expected = expected_of(shape, *options)
    for name, actual in run(impl, make_inputs(shape, *options, dtype=dtype)).items():
        scale = expected[name].abs().max().clamp(min=1.0)
        error = (actual.double() - expected[name]).abs().max() / scale
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


@cache
def expected_of(shape: tuple[int, int, int, int], skip: bool, gate: bool, start: bool) -> dict[str, Tensor]:
    inputs = make_inputs(shape, skip, gate, start, torch.float32)
    return run("reference", {name: x.double() for name, x in inputs.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_agrees_with_the_loop(
    impl: str, shape: tuple[int, int, int, int], options: tuple[bool, bool, bool], dtype: torch.dtype
) -> None:
    check_agreement(impl, shape, options, dtype)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (1, 17, 2, 3), (2, 66, 1, 2)])
def test_gradients_are_the_derivatives(impl: str, shape: tuple[int, int, int, int]) -> None:
    b, length, channels, states = shape
    if impl == "triton":
        length = min(length, 20)  # an interpreter takes its time
    inputs = make_inputs((b, length, channels, states), True, True, True, torch.float64)

    def scan_of(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, return_last_state=True, impl=impl)  # type: ignore[call-overload]

    assert torch.autograd.gradcheck(scan_of, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("impl", FAST)
def test_either_output_may_go_unused(impl: str, output: int) -> None:
    inputs = make_inputs((2, 70, 5, 4), True, True, True, torch.float64)

    def gradients(impl: str) -> list[Tensor]:
        outputs = selective_scan(**inputs, return_last_state=True, impl=impl)  # type: ignore[call-overload]
        loss = outputs[output].sum()  # its gradient is one value, repeated
        actual = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs.values(), actual, strict=True)]

    torch.testing.assert_close(gradients(impl), gradients("reference"))


@pytest.mark.parametrize("impl", FAST)
def test_no_gradient_of_the_gradient_is_made_up(impl: str) -> None:
    inputs = make_inputs((1, 5, 2, 4), True, True, False, torch.float64)
    y = selective_scan(**inputs, impl=impl)  # type: ignore[call-overload]
    (du,) = torch.autograd.grad(y.square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        du.sum().backward()  # type: ignore[no-untyped-call]


@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        *((SHAPES[1], options, torch.float64) for options in OPTIONS),
        *((shape, OPTIONS[-1], torch.float32) for shape in SHAPES),
        ((1, 16, 2, 5), OPTIONS[0], torch.float32),  # one chunk
        ((2, 32, 33, 9), OPTIONS[0], torch.float32),  # whole chunks, blocks that are not
        ((1, 19, 5, 70), OPTIONS[-1], torch.float32),  # smaller chunks, for many states
    ],
)
def test_triton_agrees_with_the_loop(
    shape: tuple[int, int, int, int], options: tuple[bool, bool, bool], dtype: torch.dtype
) -> None:
    check_agreement("triton", shape, options, dtype)


def check_bfloat16(impl: str, device: str) -> None:
    """Only inputs and results are rounded: states of hundreds of steps in bfloat16 would be far off."""
    inputs = {
        name: x.bfloat16()
        for name, x in make_inputs((2, 300, 8, 16), True, True, False, torch.float32).items()
    }
    for name in ("A", "D"):  # as under autocast
        inputs[name] = inputs[name].float()
    expected = run("reference", {name: x.double() for name, x in inputs.items()})
    for name, actual in run(impl, {name: x.to(device) for name, x in inputs.items()}).items():
        assert name == "last" or actual.dtype == inputs[name.removeprefix("d") if name != "y" else "u"].dtype
        scale = expected[name].abs().max().clamp(min=1.0)
        assert (actual.cpu().double() - expected[name]).abs().max() / scale < 2**-7, name


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_bfloat16_is_computed_in_float32(impl: str) -> None:
    check_bfloat16(impl, "cpu")


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_autocast_does_not_reach_the_scan(impl: str) -> None:
    inputs = make_inputs((2, 40, 8, 16), True, True, True, torch.float32)
    expected = run(impl, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(impl, inputs)  # with the backward pass
    for name, wanted in expected.items():
        assert torch.equal(actual[name], wanted), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_cuda_bfloat16(impl: str) -> None:
    check_bfloat16(impl, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "options"),
    [*itertools.product(SHAPES[:3], OPTIONS), (LONG, OPTIONS[-1])],
)
def test_steps_are_the_scan(
    shape: tuple[int, int, int, int], options: tuple[bool, bool, bool], dtype: torch.dtype
) -> None:
    expected = expected_of(shape, *options)
    inputs = {name: x.detach() for name, x in make_inputs(shape, *options, dtype=dtype).items()}
    b, length, channels, states = shape
    state = inputs.pop("initial_state", torch.zeros(b, channels, states, dtype=dtype))
    untouched = state.clone()
    first = state
    outputs = []
    for step in range(length):
        now = {STEP_NAMES.get(name, name): x[:, step] if x.ndim == 3 else x for name, x in inputs.items()}
        y, state = selective_scan_step(**now, state_BDN=state)
        outputs.append(y)
    assert torch.equal(first, untouched)
    for actual, wanted in ((torch.stack(outputs, 1), expected["y"]), (state, expected["last"])):
        assert actual.dtype == dtype
        assert (actual.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0) < TOLERANCE[dtype]


@pytest.mark.parametrize("impl", FAST)
def test_slices_and_broadcasts_are_taken_as_they_are(impl: str) -> None:
    torch.manual_seed(0)
    both = torch.randn(2, 21, 48).double().requires_grad_()
    mixed = torch.randn(21, 2, 40).double().requires_grad_()  # steps before rows
    rates = torch.rand(1, 8).double().requires_grad_()

    def outcome(impl: str) -> list[Tensor]:
        u, z = both.chunk(2, dim=-1)
        delta, B, C = mixed.transpose(0, 1).split([24, 8, 8], dim=-1)
        A = -rates.expand(24, 8)
        y = selective_scan(u, delta.abs(), A, B, C, z=z, impl=impl)  # type: ignore[call-overload]
        dy = torch.linspace(-1, 1, 24).double().expand_as(y)
        return [y, *torch.autograd.grad(y, (both, mixed, rates), dy)]

    torch.testing.assert_close(outcome(impl), outcome("reference"), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("impl", FAST)
def test_two_halves_with_carried_state_are_the_whole(impl: str) -> None:
    inputs = make_inputs((2, 70, 5, 4), True, True, False, torch.float64)
    whole = selective_scan(**inputs, impl=impl)  # type: ignore[call-overload]

    def part(steps: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        cut = {name: x[:, steps] if x.ndim == 3 else x for name, x in inputs.items()}
        return selective_scan(**cut, initial_state=state, return_last_state=True, impl=impl)  # type: ignore

    first, state = part(slice(0, 37), None)
    second, _ = part(slice(37, 70), state)
    assert torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-12)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, below Triton's interpreter
@pytest.mark.parametrize("impl", FAST)
def test_long_strongly_decaying_histories_stay_finite(impl: str) -> None:
    length = 200 if impl == "triton" else 3000  # an interpreter takes its time
    inputs = make_inputs((1, length, 8, 16), True, True, False, torch.float32)
    with torch.no_grad():
        inputs["delta"].mul_(60)  # exponents far below what float32 can express
        inputs["z"].mul_(60)
    assert all(bool(x.isfinite().all()) for x in run(impl, inputs).values())


def test_cpp_gives_the_same_bits_for_any_number_of_threads(restore_threads: Callable[[int], None]) -> None:
    inputs = make_inputs((3, 65, 70, 16), True, True, True, torch.float32)
    restore_threads(1)
    alone = run("cpp", inputs)
    restore_threads(3)
    for name, actual in run("cpp", inputs).items():
        assert torch.equal(actual, alone[name]), name


@pytest.fixture
def restore_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_mistakes_are_named() -> None:
    inputs = make_inputs((1, 3, 2, 4), False, False, False, torch.float32)
    with pytest.raises(ValueError, match="delta has shape"):
        selective_scan(**{**inputs, "delta": inputs["delta"][:, :2]})  # type: ignore[call-overload]
    step = {name: x[:, 0] if x.ndim == 3 else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match="step: state has shape"):
        selective_scan_step(
            **{STEP_NAMES[name]: x for name, x in step.items()}, state_BDN=torch.zeros(1, 2, 3)
        )
    with pytest.raises(FindRecError, match="choose one of"):
        scan_backend("cpu", "cuda")
    with pytest.raises(FindRecError, match="mamba-ssm"):
        scan_backend("cpu", "mamba_ssm")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1000, 256, 16), (1, 16384, 20, 5), (2, 100, 9, 300)])
@pytest.mark.parametrize("start", [False, True])
def test_cuda_agrees_with_the_loop(impl: str, shape: tuple[int, int, int, int], start: bool) -> None:
    inputs = make_inputs(shape, True, True, start, torch.float32)
    expected = run("reference", {name: x.double() for name, x in inputs.items()})
    actual = run(impl, {name: x.cuda() for name, x in inputs.items()})
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1.0)
        assert ((actual[name].cpu().double() - value).abs().max() / scale) < 1e-4, name


def test_without_a_compiler_it_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for function in (_scan_cpp._library, scan._best, scan._torch_because):
        function.cache_clear()
    try:
        assert scan_backend("cpu") == "torch"
        assert "apt install g++" in capsys.readouterr().out
        assert scan_backend("cpu") == "torch"
        assert capsys.readouterr().out == ""  # once is enough
        with pytest.raises(FindRecError, match="C\\+\\+ compiler"):
            scan_backend("cpu", "cpp")
    finally:
        for function in (_scan_cpp._library, scan._best, scan._torch_because):
            function.cache_clear()
