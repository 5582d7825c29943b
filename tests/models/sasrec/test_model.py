"""SASRec against the equations of its card in plain float64, its limits, and memorising histories."""

from __future__ import annotations

import math

import pytest
import torch
from memorise import hit_rate_of_memorised
from small_models import make_model
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.errors import FindRecError
from findrec.models.parts.transformer import Block

DIM, LENGTH, ITEMS = 8, 7, 20


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_block(block: Block, x_Ld: list[Tensor]) -> list[Tensor]:
    """One event and one head at a time."""
    width, outputs = DIM // block.heads, []
    qkv = [block.qkv(normed(x, block.norm_attention)).split(DIM) for x in x_Ld]
    for step, x in enumerate(x_Ld):
        mixed = torch.zeros_like(x)
        for head in range(block.heads):
            part = slice(head * width, (head + 1) * width)
            logits = torch.stack([qkv[step][0][part] @ qkv[j][1][part] for j in range(step + 1)])
            for j, weight in enumerate((logits / math.sqrt(width)).softmax(0)):
                mixed[part] += weight * qkv[j][2][part]
        x = x + block.out(mixed)
        outputs.append(x + block.feed_out(gelu(block.feed_in(normed(x, block.norm_feed)))))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
def test_vectors_are_those_of_the_equations(heads: int) -> None:
    torch.manual_seed(0)
    tree = {"name": "sasrec", "dim": DIM, "heads": heads, "repeat": False}
    model = make_model(tree, max_length=LENGTH).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    item = torch.randint(1, ITEMS + 1, (2, LENGTH))
    every = torch.arange(2 * LENGTH)
    batch = Batch.build(item, torch.full((2,), LENGTH), torch.arange(2), every, every)
    rows = torch.randn(ITEMS + 1, DIM, dtype=torch.float64)
    result = model(batch, rows[batch.ids], {}).h.view(2, LENGTH, DIM)
    for b in range(2):
        x_Ld = [math.sqrt(DIM) * rows[i] + p for i, p in zip(item[b], model.position.weight, strict=True)]
        for block in model.blocks:
            x_Ld = plain_block(block, x_Ld)
        want = torch.stack([normed(x, model.norm) for x in x_Ld])
        torch.testing.assert_close(result[b], want)


def test_longer_histories_than_positions_are_refused() -> None:
    model = make_model({"name": "sasrec", "dim": DIM}, max_length=6)
    assert model.longest_history == 6
    item = torch.ones(1, 7, dtype=torch.int64)
    batch = Batch.build(item, torch.tensor([7]), torch.zeros(1).long(), torch.tensor([6]), torch.tensor([1]))
    with pytest.raises(FindRecError, match=r"a history of 7 events .* 6 learned positions"):
        model(batch, torch.zeros(2, DIM), {})


def test_it_memorises_histories() -> None:
    assert hit_rate_of_memorised({"name": "sasrec", "dim": 32}) > 0.95
