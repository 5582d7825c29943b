"""The fused bonus against the features in float64, outputs and gradients; windows; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from findrec.ops import repeat_bonus as module
from findrec.ops._build import BuildError
from findrec.ops.repeat_bonus import NUM_REPEAT_FEATURES, RECENT, repeat_bonus, repeat_features_of_history

# rows, events, candidates, window, every: each `every`-th event of a row is a target position
SHAPES = [
    (1, 1, 1, 1024, 1),
    (1, 17, 5, 1024, 1),
    (3, 17, 40, 6, 2),
    (1, 1000, 1, 1024, 1),  # one item again and again
    (2, 1000, 37, 1, 3),
    (1, 2500, 150, 700, 1),
    (2, 2500, 20, RECENT, 7),
    (4, 300, 18, RECENT + 1, 299),
]


def make_positions(
    rows: int, events: int, num_candidates: int, every: int, *, distinct: bool = False
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(events)
    rank = torch.randint(0, num_candidates, (rows, events), generator=generator)
    if distinct:
        rank = torch.stack([torch.randperm(events, generator=generator) for _ in range(rows)])
    rank[:, : events // 9] = num_candidates  # padding before
    length = torch.randint(max(1, events // 2), events + 1, (rows,), generator=generator)
    rank[torch.arange(events) >= length[:, None]] = num_candidates  # and after
    step = torch.arange(events).expand(rows, -1)
    asked = (step < length[:, None]) & ((length[:, None] - 1 - step) % every == 0)
    row_T, step_T = asked.nonzero().unbind(1)
    return {"rank_BE": rank, "row_T": row_T, "step_T": step_T}


def outcome(
    impl: str, weights: Tensor, positions: dict[str, Tensor], num_candidates: int, window: int
) -> list[Tensor]:
    """Bonus, seen and the gradient of a fixed mix of the bonuses."""
    weights = weights.detach().requires_grad_()
    bonus, seen = repeat_bonus(weights, **positions, num_candidates=num_candidates, window=window, impl=impl)  # type: ignore[arg-type]
    mix = torch.linspace(-1, 2, bonus.numel(), dtype=bonus.dtype).view_as(bonus)
    (bonus * mix.roll(1)).sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    return [bonus.detach(), seen, weights.grad]


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_agrees_with_the_reference(shape: tuple[int, int, int, int, int], distinct: bool) -> None:
    rows, events, num_candidates, window, every = shape
    num_candidates = events if distinct else num_candidates
    every = max(every, events // 50) if distinct else every
    positions = make_positions(rows, events, num_candidates, every, distinct=distinct)
    weights = torch.randn(
        len(positions["row_T"]), NUM_REPEAT_FEATURES, generator=torch.Generator().manual_seed(1)
    )
    expected = outcome("reference", weights.double(), positions, num_candidates, window)
    bonus, seen, dweights = outcome("cpp", weights, positions, num_candidates, window)
    assert torch.equal(seen, expected[1])
    assert torch.equal(bonus == 0, ~seen)
    torch.testing.assert_close(bonus.double(), expected[0], rtol=1e-5, atol=2e-6)
    scale = expected[2].abs().max().clamp(min=1.0)
    torch.testing.assert_close(dweights.double() / scale, expected[2] / scale, rtol=0, atol=3e-6)
    again = outcome("reference", weights, positions, num_candidates, window)
    torch.testing.assert_close(again[0].double(), expected[0], rtol=1e-5, atol=2e-6)


def test_gradients_are_the_derivatives() -> None:
    positions = make_positions(2, 17, 6, 2)
    weights = torch.randn(len(positions["row_T"]), NUM_REPEAT_FEATURES).double().requires_grad_()

    def bonus_of(weights_TR: Tensor) -> Tensor:
        return repeat_bonus(weights_TR, **positions, num_candidates=6, window=9, impl="reference")[0]

    assert torch.autograd.gradcheck(bonus_of, (weights,))


def test_bits_do_not_depend_on_threads_or_on_where_memory_lies() -> None:
    positions = make_positions(3, 900, 101, 1)
    weights = torch.randn(len(positions["row_T"]), NUM_REPEAT_FEATURES)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            shifted = torch.empty(weights.numel() + threads)[threads:].view_as(weights).copy_(weights)
            results.append(outcome("cpp", shifted, positions, 101, 200))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_left_the_window_changes_nothing() -> None:
    window, events, num_candidates = 20, 90, 8
    rank = torch.randint(0, num_candidates, (1, events), generator=torch.Generator().manual_seed(0))
    other = rank.clone()
    other[0, : events - window] = num_candidates
    last = {"row_T": torch.tensor([0]), "step_T": torch.tensor([events - 1])}
    weights = torch.randn(1, NUM_REPEAT_FEATURES)
    for impl in ("reference", "cpp"):
        a = outcome(impl, weights, {"rank_BE": rank, **last}, num_candidates, window)
        b = outcome(impl, weights, {"rank_BE": other, **last}, num_candidates, window)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = make_positions(5, 32, 9, 3)
    whole = repeat_features_of_history(**positions, num_candidates=9, window=12)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4)
    for a, b in zip(whole, repeat_features_of_history(**positions, num_candidates=9, window=12), strict=True):
        assert torch.equal(a, b)


def test_half_precision_is_computed_in_float32() -> None:
    positions = make_positions(1, 30, 7, 1)
    weights = torch.randn(len(positions["row_T"]), NUM_REPEAT_FEATURES).bfloat16()
    low, full = (outcome("auto", w, positions, 7, 10) for w in (weights, weights.float()))
    assert torch.equal(low[0], full[0])
    assert torch.equal(low[2], full[2].bfloat16())


def test_nothing_asked_is_nothing_given() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    weights = torch.zeros(0, NUM_REPEAT_FEATURES)
    bonus, seen, dweights = outcome(
        "cpp", weights, {"rank_BE": torch.zeros(1, 4).long(), "row_T": none, "step_T": none}, 1, 3
    )
    assert bonus.shape == seen.shape == (0, 1)
    assert dweights.shape == weights.shape


def test_what_cannot_be_is_refused() -> None:
    positions = make_positions(2, 9, 3, 1)
    weights = torch.zeros(len(positions["row_T"]), NUM_REPEAT_FEATURES)
    with pytest.raises(ValueError, match="choose one of auto, reference, cpp"):
        repeat_bonus(weights, **positions, num_candidates=3, window=5, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 event"):
        repeat_bonus(weights, **positions, num_candidates=3, window=0)
    with pytest.raises(ValueError, match="float32 on a CPU"):
        repeat_bonus(weights.double(), **positions, num_candidates=3, window=5, impl="cpp")
    positions["step_T"] = positions["step_T"].flip(0)
    with pytest.raises(ValueError, match="must be sorted"):
        repeat_bonus(weights, **positions, num_candidates=3, window=5)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> None:
        raise BuildError("no C++ compiler was result")

    monkeypatch.setattr(module, "load_library", refuse)
    for function in (module._library, module._warn_once):
        function.cache_clear()
    yield
    for function in (module._library, module._warn_once):
        function.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_torch_form_is_used_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    positions = make_positions(2, 9, 3, 1)
    weights = torch.randn(len(positions["row_T"]), NUM_REPEAT_FEATURES)
    for _ in range(2):
        result = outcome("auto", weights, positions, 3, 5)
    assert capsys.readouterr().out.count("no C++ compiler") == 1
    assert torch.equal(result[0], outcome("reference", weights, positions, 3, 5)[0])
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        repeat_bonus(weights, **positions, num_candidates=3, window=5, impl="cpp")
