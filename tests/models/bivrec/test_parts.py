"""Patches, attention, clusters and losses against plain definitions in float64, and the configuration."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import make_model
from torch import Tensor
from torch.nn import functional as F

from findrec.models.bivrec.config import InterestsConfig
from findrec.models.bivrec.interests import ClusterAttention, GaussianBlock, Patches
from findrec.models.bivrec.losses import allocation_divergence, maximum_loss, read_out

DIM, LENGTH = 4, 7


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def test_patches_are_means_of_the_last_events() -> None:
    torch.manual_seed(0)
    layer = Patches(DIM, (2, 5)).double()
    x = torch.randn(2, LENGTH, DIM).double()
    got = layer(x)
    for position in range(LENGTH):
        want = x[:, position]
        for scale, linear in zip((2, 5), layer.maps, strict=True):
            want = want + linear(x[:, max(0, position + 1 - scale) : position + 1].mean(1))
        torch.testing.assert_close(got[:, position], want)


def test_gaussian_attention_is_its_definition() -> None:
    torch.manual_seed(0)
    block = GaussianBlock(DIM, 2, 0.0, gaussian=True).double()
    assert block.log_width is not None
    torch.testing.assert_close(block.log_width.exp(), torch.tensor([4.0, 8.0]).double())
    block.log_width.data = torch.tensor([0.3, 1.1]).double()
    x = torch.randn(1, LENGTH, DIM).double()
    query, key, value = (
        part.view(LENGTH, 2, 2) for part in block.qkv(block.norm_attention(x))[0].chunk(3, dim=-1)
    )
    for position in range(LENGTH):
        mixed = []
        for head, width in enumerate(block.log_width.exp().tolist()):
            logits = [
                float((query[position, head] @ key[j, head]).detach()) / math.sqrt(2)
                - (position - j) ** 2 / (2 * width**2)
                for j in range(position + 1)
            ]
            mixed.append(sum(w * value[j, head] for j, w in enumerate(softmax(logits))))
        y = x[0, position] + block.out(torch.cat(mixed))  # type: ignore[arg-type]
        want = y + block.feed_out(F.gelu(block.feed_in(block.norm_feed(y))))
        torch.testing.assert_close(block(x)[0, position], want)


def cluster(**config: object) -> ClusterAttention:
    torch.manual_seed(0)
    layer = ClusterAttention(DIM, InterestsConfig.model_validate({"number": 3} | config)).double()
    assert layer.key is not None
    layer.key.weight.data *= 3
    return layer


def test_cluster_attention_is_its_definition() -> None:
    layer = cluster().eval()
    assert layer.key is not None
    layer.log_span.data = torch.tensor([0.1, 1.0, 2.0]).double()
    x = torch.randn(2, LENGTH, DIM).double()
    got, logits = layer(x)
    normed = layer.norm(x)
    for b in range(2):
        shares = []
        for j in range(LENGTH):
            scores = [float((token @ layer.key(normed[b, j])).detach()) for token in layer.tokens]
            assert logits[b, j].tolist() == pytest.approx(scores)
            shares.append(softmax(scores))
        for position in range(LENGTH):
            for k in range(3):
                span = math.exp(float(layer.log_span[k].detach()))
                weight = [shares[j][k] * math.exp(-(position - j) / span) for j in range(position + 1)]
                total = sum(w * layer.value(normed[b, j]) for j, w in enumerate(weight))
                z = layer.tokens[k] + layer.out(total / (0.01 + sum(weight)))
                want = layer.norm_out(z + layer.feed_out(F.gelu(layer.feed_in(layer.norm_feed(z)))))
                torch.testing.assert_close(got[b, position, k], want, rtol=1e-5, atol=1e-6)


def test_hard_allocations_give_an_event_to_one_interest_and_pass_gradients() -> None:
    layer = cluster(assignment="hard").train()
    logits = torch.randn(2, LENGTH, 3, requires_grad=True)
    shares = layer._shares(logits)
    torch.testing.assert_close(shares.max(-1).values, torch.ones(2, LENGTH))
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, LENGTH))
    assert not torch.equal(shares.argmax(-1), logits.argmax(-1))  # Gumbel noise moves some
    (shares * torch.randn(3)).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert torch.equal(layer.eval()._shares(logits).argmax(-1), logits.argmax(-1))


def test_allocation_divergence_is_its_definition() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(5, 3), torch.randn(5, 3)
    valid = torch.tensor([True, False, True, True, False])
    total = 0.0
    for n in valid.nonzero().flatten().tolist():
        p, q = softmax(one[n].tolist()), softmax(two[n].tolist())
        total += sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p, q, strict=True)) / 2
    assert math.isclose(float(allocation_divergence(one, two, valid)), total / 3, rel_tol=1e-5)
    assert float(allocation_divergence(one, one, valid)) == 0
    assert float(allocation_divergence(one, two, valid & False)) == 0


def test_maximum_loss_is_its_definition() -> None:
    torch.manual_seed(0)
    interests, wanted, target = torch.randn(6, 3, 4), torch.randn(6, 4), torch.tensor([1, 2, 1, 3, 2, 9])
    wanted = wanted[[0, 1, 0, 3, 1, 5]]  # one vector for each item
    total = 0.0
    for i in range(6):
        score = [
            max(float(interests[i, k].double() @ wanted[j].double()) for k in range(3)) for j in range(6)
        ]
        rivals = [*range(2), 3, 5]  # one position for each item, however often it is a target
        total += math.log(sum(math.exp(score[j]) for j in rivals)) - score[i]
    assert math.isclose(float(maximum_loss(interests, wanted, target)), total / 6, rel_tol=1e-5)


def test_what_is_read_out_is_the_interest_of_the_target() -> None:
    interests = torch.eye(3)[None].repeat(2, 1, 1).requires_grad_()
    wanted = torch.tensor([[50.0, 0, 0], [0, 1.0, 1.0]], requires_grad=True)
    out = read_out(interests, wanted)
    weight = torch.tensor(softmax([0.0, 1.0, 1.0]))
    torch.testing.assert_close(out, torch.stack([torch.tensor([1.0, 0, 0]), weight]))
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        out.sum(), [interests, wanted], allow_unused=True
    )
    assert gradients[0] is not None
    assert gradients[1] is None  # targets are not trained by the choice among interests


def test_wrong_configurations_are_explained() -> None:
    with pytest.raises(ValueError, match="dim=10 is not a multiple of heads=4"):
        make_model({"name": "bivrec", "dim": 10, "heads": 4})
    for scales in ([1, 2], [3, 3]):
        with pytest.raises(ValueError, match="each at least 2"):
            make_model({"name": "bivrec", "scales": scales})
