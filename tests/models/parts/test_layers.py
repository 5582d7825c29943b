"""Wait-time modulation, gathered target rows, and a norm folded into a projection."""

import dataclasses

import pytest
import torch
from small_models import make_model

from findrec.datasets.batches.batch import Batch
from findrec.models.parts.layers import WaitTimeModulation, gather_positions, project_normed


def make_batch(wait):
    item = torch.tensor([[3, 1, 2], [2, 4, 0]])
    position = torch.tensor([2, 4])
    return Batch.build(
        item, torch.tensor([3, 2]), torch.arange(2), position, torch.zeros(0).long(), None, wait
    )


def test_moment_starts_as_the_identity_and_depends_on_the_bucket_alone():
    moment, h = WaitTimeModulation(4), torch.randn(2, 4)
    assert torch.equal(moment(h, make_batch(torch.tensor([1, 20]))), h)
    torch.nn.init.normal_(moment.change.weight)
    same = moment(h[:1].expand(2, 4), make_batch(torch.tensor([5, 5])))
    other = moment(h[:1].expand(2, 4), make_batch(torch.tensor([5, 6])))
    assert torch.equal(same[0], same[1])
    assert torch.equal(other[0], same[0])
    assert not torch.equal(other[0], other[1])


def test_a_batch_without_the_time_of_asking_is_refused():
    with pytest.raises(ValueError, match=r"Batch\.wait"):
        WaitTimeModulation(4)(torch.randn(2, 4), make_batch(None))


@pytest.mark.parametrize("name", ["findrec", "sasrec"])
def test_models_use_the_wait_time_only_if_configured(name):
    torch.manual_seed(0)
    early, late = make_batch(torch.tensor([1, 1])), make_batch(torch.tensor([20, 20]))
    x = torch.randn(len(early.ids), 8)
    for wait in (False, True):
        tree = {"name": name, "dim": 8, "wait": wait, "repeat": False}
        model = make_model(tree, max_length=8).eval()
        if wait:
            torch.nn.init.normal_(model.moment.change.weight)
        differ = not torch.equal(model(early, x, {}).h, model(late, x, {}).h)
        assert differ == wait
    assert dataclasses.replace(early, wait=None).to("cpu").wait is None


@pytest.mark.parametrize("num_targets", [1, 4, 6])
def test_gathered_rows_and_their_gradient_are_those_of_indexing(num_targets):
    position = torch.randperm(6)[:num_targets].sort().values
    batch = dataclasses.replace(make_batch(None), position=position)
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    result, want = gather_positions(x, batch), x.flatten(0, 1)[position]
    assert torch.equal(result, want)
    weight = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (result, want)]
    assert torch.equal(*gradients)
    assert torch.autograd.gradcheck(lambda x: gather_positions(x, batch), x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_projection_of_normed_rows_is_that_of_the_modules_in_turn(num_rows, bias):
    norm, project = torch.nn.LayerNorm(7).double(), torch.nn.Linear(7, 3, bias=bias).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    values = torch.randn(num_rows, 7, dtype=torch.float64)
    result, want = project_normed(norm, project, values), project(norm(values))
    torch.testing.assert_close(result, want)
    weights, leaves = torch.randn_like(want), [*norm.parameters(), *project.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), leaves) for y in (result, want)]
    torch.testing.assert_close(*gradients)
