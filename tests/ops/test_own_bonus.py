"""The fused bonus against the features in float64, outputs and gradients; windows; what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from findrec.ops import own_bonus as module
from findrec.ops._build import BuildError
from findrec.ops.own_bonus import NUM_REPEAT_FEATURES, RECENT, own_bonus, own_features

# rows, events, own items, window, every: of the events of a row, each `every`-th is asked for
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


def make_places(
    rows: int, events: int, num_own: int, every: int, *, distinct: bool = False
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(events)
    rank = torch.randint(0, num_own, (rows, events), generator=generator)
    if distinct:
        rank = torch.stack([torch.randperm(events, generator=generator) for _ in range(rows)])
    rank[:, : events // 9] = num_own  # padding before
    length = torch.randint(max(1, events // 2), events + 1, (rows,), generator=generator)
    rank[torch.arange(events) >= length[:, None]] = num_own  # and after
    step = torch.arange(events).expand(rows, -1)
    asked = (step < length[:, None]) & ((length[:, None] - 1 - step) % every == 0)
    row_T, step_T = asked.nonzero().unbind(1)
    return {"rank_BE": rank, "row_T": row_T, "step_T": step_T}


def outcome(impl: str, weights: Tensor, places: dict[str, Tensor], num_own: int, window: int) -> list[Tensor]:
    """Bonus, seen and the gradient of a fixed mix of the bonuses."""
    weights = weights.detach().requires_grad_()
    bonus, seen = own_bonus(weights, **places, num_own=num_own, window=window, impl=impl)  # type: ignore[arg-type]
    mix = torch.linspace(-1, 2, bonus.numel(), dtype=bonus.dtype).view_as(bonus)
    (bonus * mix.roll(1)).sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    return [bonus.detach(), seen, weights.grad]


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_agrees_with_the_reference(shape: tuple[int, int, int, int, int], distinct: bool) -> None:
    rows, events, num_own, window, every = shape
    num_own = events if distinct else num_own
    every = max(every, events // 50) if distinct else every
    places = make_places(rows, events, num_own, every, distinct=distinct)
    weights = torch.randn(
        len(places["row_T"]), NUM_REPEAT_FEATURES, generator=torch.Generator().manual_seed(1)
    )
    expected = outcome("reference", weights.double(), places, num_own, window)
    bonus, seen, dweights = outcome("cpp", weights, places, num_own, window)
    assert torch.equal(seen, expected[1])
    assert torch.equal(bonus == 0, ~seen)
    torch.testing.assert_close(bonus.double(), expected[0], rtol=1e-5, atol=2e-6)
    scale = expected[2].abs().max().clamp(min=1.0)
    torch.testing.assert_close(dweights.double() / scale, expected[2] / scale, rtol=0, atol=3e-6)
    again = outcome("reference", weights, places, num_own, window)
    torch.testing.assert_close(again[0].double(), expected[0], rtol=1e-5, atol=2e-6)


def test_gradients_are_the_derivatives() -> None:
    places = make_places(2, 17, 6, 2)
    weights = torch.randn(len(places["row_T"]), NUM_REPEAT_FEATURES).double().requires_grad_()

    def bonus_of(weights_TR: Tensor) -> Tensor:
        return own_bonus(weights_TR, **places, num_own=6, window=9, impl="reference")[0]

    assert torch.autograd.gradcheck(bonus_of, (weights,))


def test_bits_do_not_depend_on_threads_or_on_where_memory_lies() -> None:
    places = make_places(3, 900, 101, 1)
    weights = torch.randn(len(places["row_T"]), NUM_REPEAT_FEATURES)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            shifted = torch.empty(weights.numel() + threads)[threads:].view_as(weights).copy_(weights)
            results.append(outcome("cpp", shifted, places, 101, 200))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_left_the_window_changes_nothing() -> None:
    window, events, num_own = 20, 90, 8
    rank = torch.randint(0, num_own, (1, events), generator=torch.Generator().manual_seed(0))
    other = rank.clone()
    other[0, : events - window] = num_own
    last = {"row_T": torch.tensor([0]), "step_T": torch.tensor([events - 1])}
    weights = torch.randn(1, NUM_REPEAT_FEATURES)
    for impl in ("reference", "cpp"):
        a = outcome(impl, weights, {"rank_BE": rank, **last}, num_own, window)
        b = outcome(impl, weights, {"rank_BE": other, **last}, num_own, window)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    places = make_places(5, 32, 9, 3)
    whole = own_features(**places, num_own=9, window=12)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1)
    for a, b in zip(whole, own_features(**places, num_own=9, window=12), strict=True):
        assert torch.equal(a, b)


def test_half_precision_is_computed_in_float32() -> None:
    places = make_places(1, 30, 7, 1)
    weights = torch.randn(len(places["row_T"]), NUM_REPEAT_FEATURES).bfloat16()
    low, full = (outcome("auto", w, places, 7, 10) for w in (weights, weights.float()))
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
    places = make_places(2, 9, 3, 1)
    weights = torch.zeros(len(places["row_T"]), NUM_REPEAT_FEATURES)
    with pytest.raises(ValueError, match="choose one of auto, reference, cpp"):
        own_bonus(weights, **places, num_own=3, window=5, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 event"):
        own_bonus(weights, **places, num_own=3, window=0)
    with pytest.raises(ValueError, match="float32 on a CPU"):
        own_bonus(weights.double(), **places, num_own=3, window=5, impl="cpp")
    places["step_T"] = places["step_T"].flip(0)
    with pytest.raises(ValueError, match="must ascend"):
        own_bonus(weights, **places, num_own=3, window=5)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> None:
        raise BuildError("no C++ compiler was found")

    monkeypatch.setattr(module, "load_library", refuse)
    for function in (module._library, module._warn_once):
        function.cache_clear()
    yield
    for function in (module._library, module._warn_once):
        function.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_torch_form_is_used_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    places = make_places(2, 9, 3, 1)
    weights = torch.randn(len(places["row_T"]), NUM_REPEAT_FEATURES)
    for _ in range(2):
        found = outcome("auto", weights, places, 3, 5)
    assert capsys.readouterr().out.count("no C++ compiler") == 1
    assert torch.equal(found[0], outcome("reference", weights, places, 3, 5)[0])
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        own_bonus(weights, **places, num_own=3, window=5, impl="cpp")
