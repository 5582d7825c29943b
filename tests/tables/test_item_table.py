"""The item table against plain PyTorch: loss, gradients of both paths into it, and its optimizer."""

import pytest
import torch
import torch.nn.functional as F

from findrec.config import LossConfig, OptimConfig
from findrec.tables.item_table import ItemTable


def make(*, only_trained=False, train_count=None, **kwargs):
    optim = OptimConfig(weight_decay=0.1, clip_table=kwargs.pop("clip", 0.0))
    count = torch.arange(21) if train_count is None else train_count
    return ItemTable(
        20, 4, seed=3, loss=LossConfig(**kwargs), optim=optim, train_count=count, only_trained=only_trained
    )


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_steps_equal_torch_adamw_on_one_dense_parameter(clip):
    table = make(clip=clip)
    weight = torch.nn.Parameter(table.weight.clone())
    reference = torch.optim.AdamW([weight], lr=0.0, betas=(0.9, 0.98), weight_decay=0.1, eps=1e-8)
    g = torch.Generator().manual_seed(0)
    for step in range(5):
        lr = 0.05 / (step + 1)
        ids = torch.unique(
            torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 21, (6,), generator=g)])
        )
        target = torch.randint(1, 21, (5,), generator=g)
        mix = torch.randn(5, len(ids), generator=g)
        x = table.lookup(ids)
        h = mix @ x
        loss = table.catalogue_loss(h, target, 5)
        (h * loss.dh).sum().backward()
        table.push(ids, x.grad)
        norm = table.step(lr)
        rows = weight[ids]
        want = F.cross_entropy((mix @ rows) @ weight[1:].t(), target - 1)
        reference.zero_grad()
        want.backward()
        weight.grad[0] = 0
        if clip:
            torch.nn.utils.clip_grad_norm_([weight], clip)
        else:
            assert norm == pytest.approx(float(weight.grad.norm()), rel=1e-4)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        assert float(loss.loss) == pytest.approx(want.item(), rel=1e-5)
        torch.testing.assert_close(table.weight, weight.detach(), rtol=1e-4, atol=1e-5)
    assert torch.count_nonzero(table.weight[0]) == 0


def test_microbatches_add_up_to_the_whole_step():
    whole, parts = make(), make()
    g = torch.Generator().manual_seed(1)
    h, target = torch.randn(12, 4, generator=g), torch.randint(1, 21, (12,), generator=g)
    whole.catalogue_loss(h, target, 12)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        parts.catalogue_loss(h[rows], target[rows], 12)
    whole.step(0.1)
    parts.step(0.1)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sampled", "gbce"])
def test_sampled_losses_are_keyed_and_reach_the_targets_rows(kind):
    first, again, other = (make(kind=kind, negatives=8) for _ in range(3))
    h, target = torch.randn(6, 4), torch.tensor([1, 2, 3, 3, 2, 1])
    losses = [
        t.catalogue_loss(h, target, 6, generator=torch.Generator().manual_seed(s)).loss
        for t, s in ((first, 5), (again, 5), (other, 6))
    ]
    assert losses[0] == losses[1] != losses[2]
    assert first._grad[[1, 2, 3]].abs().sum(1).min() > 0


def test_state_round_trip_and_shape_check():
    table, other = make(), make()
    table.catalogue_loss(torch.randn(3, 4), torch.tensor([1, 2, 3]), 3)
    table.step(0.1)
    other.load_state({k: v.clone() for k, v in table.state().items()}, table.steps)
    for t in (table, other):
        t.catalogue_loss(torch.ones(3, 4), torch.tensor([4, 5, 6]), 3)
        t.step(0.1)
    assert torch.equal(table.weight, other.weight)
    with pytest.raises(ValueError, match="the checkpoint holds"):
        other.load_state({k: v[:-1] for k, v in table.state().items()}, 1)


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_transformed_rows_get_the_gradient_of_the_composed_loss(kind):
    """With `vectors = rows * gain + content` both the rows and the gain get what autograd gives them."""
    plain, table = make(kind=kind, negatives=8), make(kind=kind, negatives=8)
    gain, content = torch.tensor([1.0, 2.0, 0.5, 1.5], requires_grad=True), torch.randn(21, 4)
    content[0] = 0
    h, target = torch.randn(6, 4), torch.tensor([1, 2, 3, 3, 2, 1])

    def transform(ids, rows):
        return rows * gain + (content if ids is None else content[ids])

    draw = [torch.Generator().manual_seed(1) for _ in range(2)]
    loss = table.catalogue_loss(h, target, 6, generator=draw[0], transform=transform)
    (loss.scored.vectors * loss.scored.gradient).sum().backward()
    table.push(loss.scored.ids, loss.scored.rows.grad)
    plain.weight = (plain.weight * gain + content).detach()
    want = plain.catalogue_loss(h, target, 6, generator=draw[1])
    torch.testing.assert_close(loss.loss, want.loss)
    torch.testing.assert_close(loss.dh, want.dh)
    torch.testing.assert_close(table._grad, plain._grad * gain.detach())
    torch.testing.assert_close(gain.grad, (plain._grad * table.weight).sum(0))
    assert want.scored is None


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_items_without_training_events_stay_zero_and_are_no_classes(kind):
    count = torch.ones(21, dtype=torch.int64)
    cold = torch.tensor([4, 9, 20])
    count[cold] = 0
    table = make(kind=kind, negatives=200, only_trained=True, train_count=count)
    h, target = torch.randn(6, 4), torch.tensor([1, 2, 3, 3, 2, 1])
    table.weight[cold] = 100.0  # would swamp the softmax were they classes
    first = table.catalogue_loss(h, target, 6, generator=torch.Generator().manual_seed(0)).loss
    table.weight[cold] = 0.0
    again = table.catalogue_loss(h, target, 6, generator=torch.Generator().manual_seed(0)).loss
    assert first == again
    for _ in range(3):
        table.step(0.1)
    assert torch.count_nonzero(table.weight[cold]) == 0
    assert torch.count_nonzero(table.weight[1:4]) == 12
