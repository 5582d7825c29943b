"""Expert routing against loops over positions, heads and experts, and the direction of its balance term."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from findrec.ops.expert_routing import Routed, expert_routing

T, H, E = 9, 3, 4
WIDTH_IN, WIDTH_OUT = 5, 6


def route(logits: torch.Tensor, **options: float | int | None) -> Routed:
    width = logits.shape[1]
    weight = torch.zeros(width, logits.shape[2], WIDTH_IN, WIDTH_OUT, dtype=logits.dtype)
    bias = torch.zeros(width, logits.shape[2], WIDTH_OUT, dtype=logits.dtype)
    x = torch.zeros(*logits.shape[:2], WIDTH_IN, dtype=logits.dtype)
    return expert_routing(x, logits, weight, bias, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equals_loops(top_k: int | None, temperature: float) -> None:
    torch.manual_seed(0)
    x, logits = torch.randn(T, H, WIDTH_IN).double(), torch.randn(T, H, E).double()
    weight, bias = torch.randn(H, E, WIDTH_IN, WIDTH_OUT).double(), torch.randn(H, E, WIDTH_OUT).double()
    routed = expert_routing(x, logits, weight, bias, temperature=temperature, top_k=top_k)
    for t in range(T):
        for h in range(H):
            gates = (logits[t, h] / temperature).softmax(0)
            if top_k is not None:
                gates[gates.argsort()[: E - top_k]] = 0
                gates = gates / gates.sum()
            expected = sum(gates[e] * F.gelu(x[t, h] @ weight[h, e] + bias[h, e]) for e in range(E))
            assert torch.allclose(routed.gates_THE[t, h], gates)
            assert torch.allclose(routed.out_THo[t, h], torch.as_tensor(expected))
    assert routed.z.item() == pytest.approx(logits.logsumexp(-1).square().mean().item())


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


def test_no_positions_and_wrong_top_k() -> None:
    routed = route(torch.zeros(0, H, E))
    assert routed.out_THo.shape == (0, H, WIDTH_OUT)
    assert routed.balance.item() == 0.0
    assert routed.z.item() == 0.0
    with pytest.raises(ValueError, match=r"1\.\.4"):
        route(torch.zeros(1, H, E), top_k=5)
