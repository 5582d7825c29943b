"""Expert routing against loops over positions, heads and experts, and the direction of its balance term."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from findrec.ops.expert_routing import Routed, expert_routing

T, H, E = 9, 3, 4
WIDTH_IN, WIDTH_OUT = 5, 6


def route(logits: torch.Tensor, **options: float | int | str | None) -> Routed:
    width = logits.shape[1]
    weight = torch.zeros(width, logits.shape[2], WIDTH_IN, WIDTH_OUT, dtype=logits.dtype)
    bias = torch.zeros(width, logits.shape[2], WIDTH_OUT, dtype=logits.dtype)
    x = torch.zeros(*logits.shape[:2], WIDTH_IN, dtype=logits.dtype)
    return expert_routing(x, logits, weight, bias, **options)  # type: ignore[arg-type]


def draw(t: int, heads: int, experts: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, logits, weight and bias."""
    torch.manual_seed(0)
    sizes = (
        (t, heads, WIDTH_IN),
        (t, heads, experts),
        (heads, experts, WIDTH_IN, WIDTH_OUT),
        (heads, experts, WIDTH_OUT),
    )
    return [torch.randn(*size).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("impl", ["reference", "dense", "sparse"])
@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equals_loops(top_k: int | None, temperature: float, impl: str) -> None:
    x, logits, weight, bias = draw(T, H, E, torch.float64)
    routed = expert_routing(x, logits, weight, bias, temperature=temperature, top_k=top_k, impl=impl)  # type: ignore[arg-type]
    for t in range(T):
        for h in range(H):
            gates = (logits[t, h] / temperature).softmax(0).detach()
            if top_k is not None:
                gates[gates.argsort()[: E - top_k]] = 0
                gates = gates / gates.sum()
            expected = sum(gates[e] * F.gelu(x[t, h] @ weight[h, e] + bias[h, e]) for e in range(E))
            assert torch.allclose(routed.gates_THE[t, h], gates)
            assert torch.allclose(routed.out_THo[t, h], torch.as_tensor(expected))
    assert routed.z.item() == pytest.approx(logits.logsumexp(-1).square().mean().item())


TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 3e-2}  # of the largest value


@pytest.mark.parametrize("impl", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (17, 3, 4), (1000, 2, 16)], ids=str)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_implementations_agree(
    top_k: int | None, shape: tuple[int, int, int], dtype: torch.dtype, impl: str
) -> None:
    """Output, terms and all gradients, against the reference in float64."""
    top_k = None if top_k is None else min(top_k, shape[2])
    inputs = draw(*shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mix = torch.randn(shape[0], shape[1], WIDTH_OUT).to(dtype)

    def run(tensors: list[torch.Tensor], impl: str) -> list[torch.Tensor]:
        routed = expert_routing(*tensors, temperature=0.7, top_k=top_k, impl=impl)  # type: ignore[arg-type]
        assert routed.out_THo.dtype == tensors[0].dtype
        loss = (routed.out_THo * mix.to(tensors[0].dtype)).sum() + routed.balance + routed.z
        return [routed.out_THo, routed.balance, routed.z, *torch.autograd.grad(loss, tensors)]

    for ours, theirs in zip(run(inputs, impl), run(exact, "reference"), strict=True):
        # Not below 0.5: with top_k = 1 the gate is 1, and what the router gets of the output is rounding.
        assert (ours.double() - theirs).abs().max() <= TOLERANCE[dtype] * max(0.5, theirs.abs().max())


@pytest.mark.parametrize("impl", ["dense", "sparse"])
def test_gradient_is_that_of_finite_differences(impl: str) -> None:
    inputs = draw(5, 2, 3, torch.float64)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routed = expert_routing(*tensors, top_k=2, impl=impl)  # type: ignore[arg-type]
        return routed.out_THo, routed.gates_THE, routed.balance, routed.z

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_all_positions_on_one_expert() -> None:
    """The fullest group then holds every row, and the others none."""
    x, logits, weight, bias = draw(40, H, E, torch.float64)
    tilted = logits.detach() + torch.tensor([50.0, 0, 0, 0])
    sparse, dense = (expert_routing(x, tilted, weight, bias, top_k=1, impl=i) for i in ("sparse", "dense"))  # type: ignore[arg-type]
    assert torch.allclose(sparse.out_THo, dense.out_THo)
    assert torch.equal(sparse.gates_THE[..., 0], torch.ones(40, H).double())


def test_balance_is_one_when_even_and_most_when_collapsed() -> None:
    rows = torch.arange(40)
    even = F.one_hot(rows % E, E)[:, None].double() * 1e-3  # every expert is first choice equally often
    assert route(even).balance.item() == pytest.approx(1.0, abs=1e-3)
    collapsed = F.one_hot(torch.zeros(40, dtype=torch.int64), E)[:, None].double() * 20
    assert route(collapsed).balance.item() == pytest.approx(E, rel=1e-3)
    torch.manual_seed(0)
    skewed = torch.randn(40, 2, E).double() + torch.tensor([1.0, 0, 0, 0])
    assert 1.0 < route(skewed).balance.item() < E


def test_going_down_the_balance_term_spreads_the_load() -> None:
    torch.manual_seed(0)
    noise, tilt = torch.randn(200, H, E), torch.tensor([2.0, 0.0, 0.0, -1.0]).requires_grad_()
    optimizer = torch.optim.SGD([tilt], lr=1.0)
    before = route(noise + tilt).gates_THE.mean((0, 1))
    for _ in range(100):
        optimizer.zero_grad()
        route(noise + tilt).balance.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = route(noise + tilt).gates_THE.mean((0, 1))
    assert before.max() > 0.5
    assert after.max() < 0.3


def test_balance_is_taken_for_each_head() -> None:
    """Two heads that collapse onto different experts are not balanced."""
    logits = torch.stack([F.one_hot(torch.tensor(e), 2) for e in (0, 1)]).double()[None].expand(30, 2, 2) * 20
    assert route(logits).balance.item() == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("top_k", [None, 1])
def test_no_positions(top_k: int | None) -> None:
    routed = route(torch.zeros(0, H, E), top_k=top_k)
    assert routed.out_THo.shape == (0, H, WIDTH_OUT)
    assert routed.balance.item() == 0.0
    assert routed.z.item() == 0.0


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match=r"1\.\.4"):
        route(torch.zeros(1, H, E), top_k=5)
    with pytest.raises(ValueError, match="'loops' is unknown"):
        route(torch.zeros(1, H, E), impl="loops")
