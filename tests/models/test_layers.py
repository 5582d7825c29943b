"""A user vector that depends on when it is asked for; rows asked for; a norm folded into a projection."""

import dataclasses

import pytest
import torch

from findrec.config import ModelConfig
from findrec.datasets.batch import Batch
from findrec.models.layers import Moment, asked_rows, project_normed
from findrec.models.registry import build_model


def make_batch(wait):
    item = torch.tensor([[3, 1, 2], [2, 4, 0]])
    position = torch.tensor([2, 4])
    return Batch.build(
        item, torch.tensor([3, 2]), torch.arange(2), position, torch.zeros(0).long(), None, wait
    )


def test_moment_starts_as_the_identity_and_depends_on_the_bucket_alone():
    moment, h = Moment(4), torch.randn(2, 4)
    assert torch.equal(moment(h, make_batch(torch.tensor([1, 20]))), h)
    torch.nn.init.normal_(moment.change.weight)
    same = moment(h[:1].expand(2, 4), make_batch(torch.tensor([5, 5])))
    other = moment(h[:1].expand(2, 4), make_batch(torch.tensor([5, 6])))
    assert torch.equal(same[0], same[1])
    assert torch.equal(other[0], same[0])
    assert not torch.equal(other[0], other[1])


def test_a_batch_without_the_time_of_asking_is_refused():
    with pytest.raises(ValueError, match=r"Batch\.wait"):
        Moment(4)(torch.randn(2, 4), make_batch(None))


@pytest.mark.parametrize("name", ["findrec", "sasrec"])
def test_models_use_the_time_of_asking_only_when_told_to(name):
    torch.manual_seed(0)
    early, late = make_batch(torch.tensor([1, 1])), make_batch(torch.tensor([20, 20]))
    x = torch.randn(len(early.ids), 8)
    for wait in (False, True):
        config = ModelConfig(name=name, dim=8, heads=2, wait=wait)
        config = config.model_copy(update={"routing": config.routing.model_copy(update={"heads": 2})})
        model = build_model(config, feature_dims={}, repeat=False, max_length=8).eval()
        if wait:
            torch.nn.init.normal_(model.moment.change.weight)
        differ = not torch.equal(model(early, x, {}).h, model(late, x, {}).h)
        assert differ == wait
    assert dataclasses.replace(early, wait=None).to("cpu").wait is None


@pytest.mark.parametrize("num_asked", [1, 4, 6])
def test_asked_rows_and_their_gradient_are_those_of_indexing(num_asked):
    position = torch.randperm(6)[:num_asked].sort().values
    batch = dataclasses.replace(make_batch(None), position=position)
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    found, want = asked_rows(x, batch), x.flatten(0, 1)[position]
    assert torch.equal(found, want)
    weight = torch.randn_like(want)
    assert torch.equal(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, want)))
    assert torch.autograd.gradcheck(lambda x: asked_rows(x, batch), x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_projection_of_normed_rows_is_that_of_the_modules_in_turn(num_rows, bias):
    norm, project = torch.nn.LayerNorm(7).double(), torch.nn.Linear(7, 3, bias=bias).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    values = torch.randn(num_rows, 7, dtype=torch.float64)
    found, want = project_normed(norm, project, values), project(norm(values))
    torch.testing.assert_close(found, want)
    weights, leaves = torch.randn_like(want), [*norm.parameters(), *project.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), leaves) for y in (found, want)]
    torch.testing.assert_close(*gradients)
