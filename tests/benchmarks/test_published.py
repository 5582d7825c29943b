"""The published model runs on any batch, without unused modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench.published import HeadLoop, Published, PublishedConfig, pairwise_stein
from torch import Tensor, nn

NUM_ITEMS = 20
SMALL = PublishedConfig(dim=16, modal_dim=16, heads=2, experts=2)


def make(config: PublishedConfig = SMALL) -> Published:
    torch.manual_seed(0)
    features = {"image": torch.randn(NUM_ITEMS + 1, 6), "text": torch.randn(NUM_ITEMS + 1, 4)}
    return Published(NUM_ITEMS, features, config)


def samples(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    item_BL = torch.randint(1, NUM_ITEMS + 1, (rows, length))
    length_B = torch.randint(1, length + 1, (rows,))
    item_BL[torch.arange(length) >= length_B[:, None]] = 0
    return item_BL, length_B, torch.randint(1, NUM_ITEMS + 1, (rows,))


@pytest.mark.parametrize(("rows", "length"), [(3, 7), (7, 3), (1, 17)])
def test_every_parameter_has_a_gradient(rows: int, length: int) -> None:
    model = make()
    loss = model.loss(*samples(rows, length))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert torch.isfinite(loss)
    assert [name for name, grad in gradients.items() if grad is None or not grad.any()] == []
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())


def test_both_scans_compute_the_same() -> None:
    generic, ours = (make(replace(SMALL, scan=scan)) for scan in ("parallel", "ours"))
    ours.load_state_dict(generic.state_dict())
    actual = [
        model.stream.eval()(torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(0)))
        for model in (generic, ours)
    ]
    torch.testing.assert_close(*actual, rtol=1e-4, atol=1e-5)
    assert type(generic.stream.blocks[0]) is not type(ours.stream.blocks[0])


@pytest.mark.usefixtures("no_mambapy")
def test_without_mambapy_the_scan_is_a_loop(capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    assert "mambapy is not installed" in "".join(capsys.readouterr())
    assert torch.isfinite(model.loss(*samples(3, 7)))


@pytest.fixture
def no_mambapy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_samples_do_not_see_each_other_nor_padding() -> None:
    model = make(PublishedConfig(dim=16, modal_dim=16, heads=2, experts=2)).eval()
    item_BL, length_B, _ = samples(4, 6)
    padded = torch.cat([item_BL, torch.zeros(4, 3, dtype=torch.int64)], dim=1)
    for encode in model.encode:  # the published model draws noise in evaluation too: hold it down
        last = encode[-1]  # type: ignore[index]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight[16:])
        nn.init.constant_(last.bias[16:], -60.0)
    together, _ = model(padded, length_B)
    for row in range(4):
        alone, _ = model(item_BL[row : row + 1], length_B[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_heads_attend_in_both_directions() -> None:
    torch.manual_seed(0)
    loop = HeadLoop(8, 2, 0.0)
    x, y = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    out = loop(x, y, torch.zeros(2, 3, dtype=torch.bool))
    assert out.shape == (2, 2, 3, 8)
    # The first half of a head belongs to x; its last step reaches y's first through attention alone.
    of_x = torch.autograd.grad(out[0, 0, -1, :4].pow(3).sum(), y, retain_graph=True)[0]
    of_y = torch.autograd.grad(out[0, 0, -1, 4:].pow(3).sum(), x)[0]
    assert of_x[0, 0].any()
    assert of_y[0, 0].any()
    assert not of_x[1].any()


def test_pairwise_stein_is_a_sum_over_pairs() -> None:
    torch.manual_seed(0)
    x, y, sx, sy = (torch.randn(3, 5, dtype=torch.float64) for _ in range(4))
    h2 = (x[:, None] - y[None]).square().sum(-1).median().sqrt().clamp(0.1, 10).square()
    actual = pairwise_stein(x, y, sx, sy)
    for i in range(3):
        for j in range(3):
            apart = x[i] - y[j]
            kernel = torch.exp(-apart @ apart / (2 * h2))
            want = kernel * (sx[i] @ sy[j] + apart @ sy[j] / h2 + apart @ apart / h2**2 - 5 / h2)
            torch.testing.assert_close(actual[i, j], want)
