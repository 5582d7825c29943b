"""Cross-modal attention: the reference against a loop over steps, the fused forms against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bench.attention import make_run
from bench.memory import peak_bytes
from torch import Tensor

from findrec.ops.cross_modal_attention import cross_modal_attention

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 3e-2}  # of the largest value


def draw(num_modal: int, rows: int, length: int, dtype: torch.dtype, heads: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    ids = torch.randn(rows, length, 3, heads, 4).to(dtype).requires_grad_()
    return ids, torch.randn(num_modal, rows, length, 3, heads, 4).to(dtype).requires_grad_()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_reference_equals_a_loop_over_steps(window: int | None) -> None:
    ids, modal = draw(num_modal=2, rows=2, length=6, dtype=torch.float64)
    reads_id, reads_modal = cross_modal_attention(ids, modal, window=window, impl="reference")
    for b in range(2):
        for t in range(6):
            seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
            for h in range(2):
                for m in range(2):
                    for result, asks, tells in (
                        (reads_id, modal[m, b], ids[b]),
                        (reads_modal, ids[b], modal[m, b]),
                    ):
                        weights = (tells[seen, 1, h] @ asks[t, 0, h] / 2).softmax(0)  # 2: root of the width
                        assert torch.allclose(result[m, b, t, h], weights @ tells[seen, 2, h])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_modal", "rows", "length"),
    [(1, 1, 1), (1, 3, 2), (2, 1, 17), (3, 2, 64), (1, 1, 65), (2, 2, 97), (1, 1, 1000)],
)
@pytest.mark.parametrize("window", [None, 1, 2, 31, 64, 101])
def test_implementations_agree(
    window: int | None, num_modal: int, rows: int, length: int, dtype: torch.dtype
) -> None:
    """Both outputs and both gradients, against the reference in float64."""
    ids, modal = draw(num_modal, rows, length, dtype)
    exact = [x.detach().double().requires_grad_() for x in (ids, modal)]
    expected = cross_modal_attention(*exact, window=window, impl="reference")
    mix = [torch.randn_like(x) for x in expected]
    expected_grads = torch.autograd.grad(expected, exact, mix)
    result = cross_modal_attention(ids, modal, window=window)
    grads = torch.autograd.grad(result, (ids, modal), [x.to(dtype) for x in mix])
    for ours, theirs in zip((*result, *grads), (*expected, *expected_grads), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


@pytest.mark.parametrize("window", [None, 2, 40])
def test_neither_the_future_nor_other_users_nor_the_long_gone_are_seen(window: int | None) -> None:
    ids, modal = (x.detach() for x in draw(num_modal=2, rows=2, length=150, dtype=torch.float32))
    before = cross_modal_attention(ids, modal, window=window)
    ids[:, 90:], modal[:, :, 90:] = 7.0, -3.0  # as the padding after a history may be
    ids[1], modal[:, 1] = 2.0, 1.0
    after = cross_modal_attention(ids, modal, window=window)
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a[:, 0, :90], b[:, 0, :90], atol=1e-6)
        assert not torch.allclose(a[:, 0, 90:], b[:, 0, 90:], atol=1e-2)
    ids[0, 3], modal[:, 0, 3] = 9.0, -9.0
    sees = [
        t
        for t in range(150)
        if (cross_modal_attention(ids, modal, window=window)[0] != after[0])[:, 0, t].any()
    ]
    assert sees[-1] == (149 if window is None else 3 + window - 1)


def test_a_window_slides_over_a_cut_history_as_over_the_whole() -> None:
    """What a step sees depends neither on the length nor on where the computation's blocks begin."""
    ids, modal = draw(num_modal=1, rows=1, length=300, dtype=torch.float64)
    whole = cross_modal_attention(ids, modal, window=70)
    for start, stop in ((0, 131), (37, 300), (101, 257)):
        cut = cross_modal_attention(ids[:, start:stop], modal[:, :, start:stop], window=70)
        warm = slice(69 if start else 0, None)  # steps whose whole window is in the cut
        for a, b in zip(whole, cut, strict=True):
            assert torch.allclose(a[:, :, start:stop][:, :, warm], b[:, :, warm])


@pytest.mark.parametrize("window", [None, 5])
def test_gradient_is_that_of_finite_differences(window: int | None) -> None:
    inputs = draw(num_modal=1, rows=1, length=70, dtype=torch.float64, heads=1)
    attend = partial(cross_modal_attention, window=window)
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.slow
def test_long_histories_need_no_matrix_of_all_steps() -> None:
    length = 16_384
    assert peak_bytes(make_run, "window 256", (1, 1, length, 2, 8)) < length**2  # bytes: one boolean mask


def test_wrong_arguments_are_told() -> None:
    ids, modal = torch.randn(2, 5, 3, 2, 4), torch.randn(1, 2, 5, 3, 2, 4)
    with pytest.raises(ValueError, match="expected id_qkv"):
        cross_modal_attention(ids, torch.randn(1, 2, 6, 3, 2, 4))
    with pytest.raises(ValueError, match="window=0"):
        cross_modal_attention(ids, modal, window=0)
    with pytest.raises(ValueError, match="'flash' is unknown"):
        cross_modal_attention(ids, modal, impl="flash")  # type: ignore[arg-type]
