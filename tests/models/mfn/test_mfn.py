"""Attention by content: its definition, what reaches the weights, and what it is for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import planted_folder
from small_models import make_model
from torch import Tensor
from trained_model import train_model

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import ModalRows
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.models.mfn.attention import Guide, GuidedBlock

DIM, HEADS = 8, 2


def batch_of(item: Tensor) -> Batch:
    none, rows = torch.zeros(0, dtype=torch.int64), torch.arange(len(item))
    return Batch.build(item, torch.full_like(rows, item.shape[1]), rows, none, none)


@pytest.mark.parametrize("ids", [False, True])
def test_a_block_is_its_definition(ids: bool) -> None:
    torch.manual_seed(0)
    block = GuidedBlock(DIM, HEADS, 0.0, ids=ids).double()
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, guide = torch.randn(1, 5, DIM).double(), torch.randn(1, 5, DIM).double()
    got = block(x, guide)[0]
    normed = block.norm_attention(x)[0]
    both = guide[0] @ block.by_guide.weight.T
    if block.by_ids is not None:
        both = both + block.by_ids(normed)
    value = block.value(normed)
    width = DIM // HEADS
    for position in range(5):
        mixed = torch.zeros(DIM, dtype=torch.float64)
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            query = both[position, :DIM][part]
            keys = both[: position + 1, DIM:][:, part]
            logits = [float(x) / math.sqrt(width) for x in (keys @ query).detach()]
            total = sum(math.exp(logit) for logit in logits)
            for j, logit in enumerate(logits):
                mixed[part] += math.exp(logit) / total * value[j][part]
        y = x[0, position] + block.out(mixed)
        want = y + block.feed_out(torch.nn.functional.gelu(block.feed_in(block.norm_feed(y))))
        torch.testing.assert_close(got[position], want)


def test_weights_depend_on_content_and_never_on_ids() -> None:
    torch.manual_seed(0)
    batch = batch_of(torch.tensor([[1, 2, 3, 4]]))
    features = {"text": ModalRows(torch.randn(5, 6), torch.tensor([False, True, True, False, True]))}
    guide = Guide({"text": 6}, DIM, 10)
    block = GuidedBlock(DIM, HEADS, 0.0, ids=False)
    rows = torch.randn(5, DIM, requires_grad=True)
    weights = block.queries_and_keys(rows[batch.index], guide(batch, features))
    (gradient,) = torch.autograd.grad(weights.sum(), rows, allow_unused=True)
    assert gradient is None
    other = replace(features["text"], values=features["text"].values.roll(1, 0))
    changed = block.queries_and_keys(rows[batch.index], guide(batch, {"text": other}))
    moved = (changed != weights).any(-1)[0]
    assert moved.tolist() == [True, True, False, True]  # item 3 has no content


def test_similar_content_attends_before_anything_is_learned() -> None:
    torch.manual_seed(0)
    content = torch.randn(2, 64)
    values = torch.cat([torch.zeros(1, 64), content[0:1], content[1:2], content[0:1] + 0.1, content[1:2]])
    features = {"text": ModalRows(values, torch.arange(5) > 0)}
    guide = Guide({"text": 64}, 32, 10)(batch_of(torch.tensor([[1, 2, 3, 4]])), features)
    query, key = GuidedBlock(32, 1, 0.0, ids=False).queries_and_keys(guide, guide)[0].chunk(2, dim=-1)
    weight = (query @ key.T / 32**0.5).softmax(-1)
    assert weight[2, 0] > 3 * weight[2, 1]  # item 3 is like item 1, item 4 like item 2
    assert weight[3, 1] > 3 * weight[3, 0]


def write_tastes(path: Path, num_users: int) -> DataFolder:
    """A user answers each question of a group of items by the same item of the group.

    A history is pairs of a question and its answer. The questions of a group differ, so the answer must be
    looked up among events of the same group, which texts tell; every item is rare.
    """
    rng = np.random.default_rng(0)
    groups, questions, answers = 16, 12, 6
    each = questions + answers
    histories = []
    for _ in range(num_users):
        own = rng.choice(groups, size=3, replace=False)
        choice = rng.integers(answers, size=3)
        order = np.concatenate([rng.permutation(3), rng.integers(3, size=5)])
        items = []
        for index in order:
            first = own[index] * each
            items += [first + int(rng.integers(questions)), first + questions + choice[index]]
        histories.append(np.array(items) + 1)
    text = np.repeat(rng.normal(size=(groups, 12)), each, axis=0)
    return write_data_folder(path, histories, features={"text": text}, num_items=groups * each)


def test_content_finds_among_rare_items_what_ids_must_learn(tmp_path: Path) -> None:
    folder = write_tastes(tmp_path / "data", 150)
    model: dict[str, Any] = {"name": "mfn", "layers": 1, "heads": 1}
    hits = {
        attend: train_model(folder, tmp_path / attend, model | {"attend": attend}, epochs=15).hits()
        for attend in ("content", "ids")
    }
    assert hits["content"] > hits["ids"] + 0.2


def test_users_are_learned_by_heart(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path / "data", num_users=100)
    assert train_model(folder, tmp_path / "run", {"name": "mfn", "layers": 1}, epochs=15).hits() > 0.95


def test_wrong_configurations_are_explained() -> None:
    with pytest.raises(ValueError, match="dim=10 is not a multiple of heads=4"):
        make_model({"name": "mfn", "dim": 10, "heads": 4})
    with pytest.raises(ValueError, match="needs content to attend by"):
        make_model({"name": "mfn", "modalities": []})
    model = make_model({"name": "mfn", "dim": 8, "repeat": False}, {"text": 6}, max_length=2)
    features = {"text": ModalRows(torch.zeros(2, 6), torch.tensor([False, True]))}
    with pytest.raises(FindRecError, match=r"data\.max_length"):
        model(batch_of(torch.ones(1, 3).long()), torch.zeros(2, 8), features)
