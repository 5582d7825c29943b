"""What is particular to HSTU: the times it reads, how it scores, and memorising histories."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from memorise import hit_rate_of_memorised
from small_models import make_model
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.errors import FindRecError
from findrec.models.hstu.config import HSTUConfig

LENGTH = 9


def make_batch() -> Batch:
    torch.manual_seed(0)
    item = torch.randint(1, 41, (2, LENGTH))
    time = torch.randint(1, 10**5, (2, LENGTH + 1)).cumsum(1)
    return Batch.build(
        item,
        torch.full((2,), LENGTH),
        torch.arange(2),
        torch.tensor([LENGTH - 1, 2 * LENGTH - 1]),
        torch.tensor([1, 2]),
        time=time[:, :-1].contiguous(),
        query_time=time[:, -1],
    )


def run(batch: Batch, **keys: object) -> Tensor:
    torch.manual_seed(1)
    model = make_model({"name": "hstu", "dim": 8, **keys}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    rows = torch.randn(41, 8, generator=torch.Generator().manual_seed(2))
    vectors: Tensor = model(batch, rows[batch.ids], {}).h
    return vectors


@pytest.mark.parametrize("times", ["none", "past", "target"])
def test_each_setting_reads_the_times_it_says(times: str) -> None:
    batch = make_batch()
    assert batch.time is not None
    assert batch.query_time is not None
    before = run(batch, times=times)
    asked_later = run(replace(batch, query_time=batch.query_time + 10**6), times=times)
    assert torch.equal(asked_later, before) == (times != "target")
    earlier = batch.time.clone()
    earlier[:, 0] -= 10**6
    assert torch.equal(run(replace(batch, time=earlier), times=times), before) == (times == "none")
    shifted = replace(batch, time=batch.time + 10**7, query_time=batch.query_time + 10**7)
    assert torch.equal(run(shifted, times=times), before)


def test_an_event_attends_at_the_time_of_the_next_one() -> None:
    """With `times: target` a training window gives at each position what its prefix gives in evaluation."""
    batch = make_batch()
    assert batch.time is not None
    cut = 5
    every = torch.arange(2 * LENGTH)
    later = torch.cat([batch.time[:, 1:], batch.time[:, -1:] + 50], dim=1)
    window = run(replace(batch, position=every, query_time=later.flatten()), times="target")
    prefix = Batch.build(
        batch.item[:, :cut].contiguous(),
        torch.full((2,), cut),
        torch.arange(2),
        torch.tensor([cut - 1, 2 * cut - 1]),
        torch.zeros(0, dtype=torch.int64),
        time=batch.time[:, :cut].contiguous(),
        query_time=batch.time[:, cut],
    )
    torch.testing.assert_close(run(prefix, times="target"), window.view(2, LENGTH, -1)[:, cut - 1])


@pytest.mark.parametrize("times", ["past", "target"])
def test_data_without_times_is_refused(times: str) -> None:
    with pytest.raises(FindRecError, match=rf"model\.times={times} needs the times .* model\.times=none"):
        run(replace(make_batch(), time=None, query_time=None), times=times)


def test_scores_are_cosines_over_the_temperature() -> None:
    model = make_model(HSTUConfig(dim=8, temperature=0.1)).eval()
    rows, h = torch.randn(5, 8), torch.randn(3, 8)
    scores = model.norm(h) @ model.item_transform(rows, {}).t()
    want = torch.nn.functional.cosine_similarity(h[:, None], rows, dim=-1) / 0.1
    torch.testing.assert_close(scores, want, rtol=1e-3, atol=1e-3)  # for the floor of the lengths
    plain = make_model(HSTUConfig(dim=8, temperature=None))
    assert not plain.content_scores
    assert plain.item_transform(rows, {}) is rows


@pytest.mark.parametrize("times", ["none", "past"])
def test_it_memorises_histories(times: str) -> None:
    assert hit_rate_of_memorised({"name": "hstu", "dim": 32, "times": times}, steps=200) > 0.95
