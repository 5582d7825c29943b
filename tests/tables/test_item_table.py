"""The item table against plain PyTorch: loss, gradients of both paths into it, and its optimizer."""

import pytest
import torch
import torch.nn.functional as F

from findrec.config import LossConfig, OptimConfig
from findrec.tables.exchange import row_range
from findrec.tables.initial_rows import initial_rows
from findrec.tables.item_table import ItemTable
from findrec.tables.table_spec import TableSpec


def make(*, only_trained=False, train_count=None, **kwargs):
    optim = OptimConfig(weight_decay=0.1, clip_table=kwargs.pop("clip", 0.0))
    count = torch.arange(21) if train_count is None else train_count
    spec = TableSpec(
        *(20, 4), seed=3, loss=LossConfig(**kwargs), optim=optim, train_count=count, only_trained=only_trained
    )
    return ItemTable(spec)


class Saved(dict):
    """State tensors in memory, as `SavedRows`."""

    num_rows = property(lambda self: len(self["weight"]))
    width = property(lambda self: self["weight"].shape[1])

    def rows(self, name, first, end):
        return self[name][first:end]


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
    first.step(0.1)
    assert first.state()["exp_avg"][[1, 2, 3]].abs().sum(1).min() > 0


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_a_sampled_loss_steps_the_rows_it_looked_up_and_no_others(clip):
    """Like a `torch.optim.AdamW` whose parameter, moments and decay are those of the looked-up rows."""
    table = make(kind="sampled", negatives=2, clip=clip)
    optim = torch.optim.AdamW(
        [torch.nn.Parameter(table.weight.clone())], lr=0.05, betas=(0.9, 0.98), weight_decay=0.1
    )
    (weight,) = optim.param_groups[0]["params"]
    moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    for step in range(4):
        ids = torch.tensor([0, step + 1, step + 7])  # with the padding, which has no gradient
        grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        table.push(ids, torch.ones(3, 4))
        table.push(ids[1:], grad[1:] - 1)  # pushes of a step add up
        norm = table.step(0.05)
        assert norm == pytest.approx(float(grad[1:].norm()))
        weight.grad = torch.zeros_like(weight).index_add(0, ids[1:], grad[1:])
        if clip:
            torch.nn.utils.clip_grad_norm_([weight], clip)
        before = weight.detach().clone()
        optim.state[weight] = {
            "step": torch.tensor(float(step)),
            **{k: v.clone() for k, v in moments.items()},
        }
        optim.step()
        for values, stepped in ((before, weight), *((moments[k], optim.state[weight][k]) for k in moments)):
            values[ids[1:]] = stepped.detach()[ids[1:]]
        with torch.no_grad():
            weight.copy_(before)
        torch.testing.assert_close(table.weight, before)
        untouched = step + 8  # the first row that no step has looked up yet, but for the lower ones
        assert torch.equal(table.weight[untouched:], make().weight[untouched:])
    assert torch.count_nonzero(table.weight[0]) == 0


@pytest.mark.parametrize(("rows", "dim"), [(1, 4), (3, 4), (4097, 5), (9000, 3)])
def test_rows_start_as_one_draw_of_all_whoever_holds_them(rows, dim):
    whole = torch.randn(rows, dim, generator=torch.Generator().manual_seed(9)) * dim**-0.5 * 0.2
    whole[0] = 0
    assert torch.equal(initial_rows(rows, dim, seed=9), whole)
    for rank in range(3):
        part = row_range(rows, rank, 3)
        assert torch.equal(initial_rows(rows, dim, seed=9, part=part), whole[part.start : part.stop])


def test_ranges_cover_all_rows_evenly():
    for rows in (1, 2, 5, 31, 100):
        for world in (1, 2, 3, 7):
            parts = [row_range(rows, rank, world) for rank in range(world)]
            assert [i for part in parts for i in part] == list(range(rows))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_negatives_are_what_torch_draws_and_expected_as_often():
    table = make(kind="sampled", negatives=5000)
    draw, log_expected = table._negatives.draw(torch.Generator().manual_seed(4))
    chance = (torch.arange(21, dtype=torch.float64) + 1) ** 0.75
    chance[0] = 0
    want = torch.multinomial(chance, 5000, replacement=True, generator=torch.Generator().manual_seed(4))
    assert torch.equal(draw, want)
    torch.testing.assert_close(log_expected.exp(), (chance / chance.sum())[draw] * 5000)


def test_state_round_trip_and_shape_check():
    table, other = make(), make()
    table.catalogue_loss(torch.randn(3, 4), torch.tensor([1, 2, 3]), 3)
    table.step(0.1)
    other.load_state(Saved({k: v.clone() for k, v in table.state().items()}), 1)
    for t in (table, other):
        t.catalogue_loss(torch.ones(3, 4), torch.tensor([4, 5, 6]), 3)
        t.step(0.1)
    assert torch.equal(table.weight, other.weight)
    with pytest.raises(ValueError, match="the checkpoint has"):
        other.load_state(Saved({k: v[:-1] for k, v in table.state().items()}), 1)


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_transformed_rows_get_the_gradient_of_the_composed_loss(kind):
    """With `vectors = rows * gain + content` both the rows and the gain get what autograd gives them."""
    plain, table = make(kind=kind, negatives=8), make(kind=kind, negatives=8)
    gain, content = torch.tensor([1.0, 2.0, 0.5, 1.5], requires_grad=True), torch.randn(21, 4)
    content[0] = 0
    h, target = torch.randn(6, 4), torch.tensor([1, 2, 3, 3, 2, 1])

    def transform(ids, rows):
        return rows * gain + content[torch.arange(ids.start, ids.stop) if isinstance(ids, range) else ids]

    draw = [torch.Generator().manual_seed(1) for _ in range(2)]
    loss = table.catalogue_loss(h, target, 6, generator=draw[0], transform=transform)
    (loss.scored.vectors * loss.scored.gradient).sum().backward()
    table.push(loss.scored.ids, loss.scored.rows.grad)
    rows = table.weight.clone()
    with torch.no_grad():
        plain.weight.copy_(rows * gain + content)
    want = plain.catalogue_loss(h, target, 6, generator=draw[1])
    torch.testing.assert_close(loss.loss, want.loss)
    torch.testing.assert_close(loss.dh, want.dh)
    plain.step(0.1)
    table.step(0.1)
    dvectors = plain.state()["exp_avg"] / 0.1
    torch.testing.assert_close(table.state()["exp_avg"] / 0.1, dvectors * gain.detach())
    torch.testing.assert_close(gain.grad, (dvectors * rows).sum(0))
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
