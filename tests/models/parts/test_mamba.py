"""Reading histories event by event gives what reading them whole gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from findrec.models.parts.mamba import MambaStream
from findrec.models.parts.stream_config import StreamConfig

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = (0, 1, 2, 3, 9, 17)  # none at all, fewer than the convolution's taps, more


def make_stream(dtype: torch.dtype, d_conv: int = 4) -> MambaStream:
    torch.manual_seed(0)
    stream = MambaStream(10, 0.3, StreamConfig(layers=2, d_state=5, d_conv=d_conv)).to(dtype).eval()
    for scale in stream.scales:
        torch.nn.init.ones_(
            scale.get_parameter("gain")
        )  # at its usual 0.1 an error in the branch would hardly show
    return stream


def make_histories(dtype: torch.dtype, more: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole histories, the lengths to read at once, and those parts right-padded with noise."""
    x_BLd = torch.randn(len(LENGTHS), max(LENGTHS) + more, 10, dtype=dtype)
    padded_BLd = x_BLd[:, : max(LENGTHS)].clone()
    for row, length in enumerate(LENGTHS):
        padded_BLd[row, length:] = 100 * torch.randn(max(LENGTHS) - length, 10, dtype=dtype)
    return x_BLd, torch.tensor(LENGTHS), padded_BLd


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefill_and_steps_are_the_whole(dtype: torch.dtype, d_conv: int) -> None:
    stream = make_stream(dtype, d_conv)
    x_BLd, length_B, padded_BLd = make_histories(dtype, more=6)
    whole_BLd = stream(x_BLd)
    tolerance = TOLERANCE[dtype] * float(whole_BLd.abs().max())
    read_BLd, states = stream.prefill(padded_BLd, length_B)
    for row, length in enumerate(LENGTHS):
        assert torch.allclose(read_BLd[row, :length], whole_BLd[row, :length], rtol=0, atol=tolerance)
    rows = torch.arange(len(LENGTHS))
    for k in range(6):
        y_Bd, states = stream.step(x_BLd[rows, length_B + k], states)
        assert torch.allclose(y_Bd, whole_BLd[rows, length_B + k], rtol=0, atol=tolerance), k


@torch.no_grad()
def test_steps_from_nothing_are_the_whole() -> None:
    stream = make_stream(torch.float64)
    x_BLd = torch.randn(2, 9, 10, dtype=torch.float64)
    states = stream.initial_state(2)
    outputs = []
    for x_Bd in x_BLd.unbind(1):
        y_Bd, states = stream.step(x_Bd, states)
        outputs.append(y_Bd)
    assert torch.allclose(torch.stack(outputs, 1), stream(x_BLd), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 12])
def test_prefill_continues_where_prefill_stopped(cut: int) -> None:
    stream = make_stream(torch.float64)
    _, length_B, padded_BLd = make_histories(torch.float64, more=0)
    _, expected = stream.prefill(padded_BLd, length_B)
    _, states = stream.prefill(padded_BLd[:, :cut], length_B.clamp(max=cut))
    _, states = stream.prefill(padded_BLd[:, cut:], (length_B - cut).clamp(min=0), states)
    for result, wanted in zip(states, expected, strict=True):
        assert torch.allclose(result.conv_BKE, wanted.conv_BKE, atol=1e-10)
        assert torch.allclose(result.scan_BEN, wanted.scan_BEN, atol=1e-10)


@torch.no_grad()
def test_padding_does_not_touch_the_state() -> None:
    stream = make_stream(torch.float32)
    _, length_B, padded_BLd = make_histories(torch.float32, more=0)
    _, states = stream.prefill(padded_BLd, length_B)
    _, others = stream.prefill(padded_BLd.masked_fill(_padding(length_B), -7.0), length_B)
    for result, other, empty in zip(states, others, stream.initial_state(len(LENGTHS)), strict=True):
        assert torch.equal(result.scan_BEN, other.scan_BEN)
        assert torch.equal(result.conv_BKE, other.conv_BKE)
        assert torch.equal(result.scan_BEN[0], empty.scan_BEN[0])  # the row without events


def _padding(length_B: Tensor) -> Tensor:
    return (torch.arange(max(LENGTHS)) >= length_B[:, None])[..., None]


@torch.no_grad()
def test_a_step_leaves_the_old_state_as_it_is() -> None:
    stream = make_stream(torch.float32)
    _, length_B, padded_BLd = make_histories(torch.float32, more=0)
    _, states = stream.prefill(padded_BLd, length_B)
    x_Bd = torch.randn(len(LENGTHS), 10)
    first, after = stream.step(x_Bd, states)
    stream.step(x_Bd, after)
    again, _ = stream.step(x_Bd, states)
    assert torch.equal(first, again)


def test_mistakes_are_named() -> None:
    stream = make_stream(torch.float32)
    x_BLd = torch.randn(2, 3, 10)
    for wrong in (torch.tensor([1, 4]), torch.tensor([-1, 2]), torch.tensor([3])):
        with pytest.raises(ValueError, match="0 to 3"):
            stream.prefill(x_BLd, wrong)
    stream.train()
    with pytest.raises(ValueError, match="eval"):
        stream.step(x_BLd[:, 0], stream.initial_state(2))
    with pytest.raises(ValueError, match="eval"):
        stream.prefill(x_BLd, torch.tensor([1, 2]))
