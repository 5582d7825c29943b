"""Experts, times and tasks against plain definitions in float64, and the configuration."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import make_model
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.hm4sr.config import TemporalConfig
from findrec.models.hm4sr.experts import InteractiveExperts, TemporalExperts
from findrec.models.hm4sr.tasks import CategoryPrediction, TimePlaceholders
from findrec.models.hm4sr.times import DAY, PERIODS, TimeEmbedding, calendar, interval_index

STREAMS, DIM, EXPERTS = 3, 4, 2


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def batch_of(item: Tensor, length: Tensor, time: Tensor | None = None) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch.build(item, length, torch.arange(len(item)), none, none, time=time)


def test_interactive_experts_are_their_definition() -> None:
    torch.manual_seed(0)
    layer = InteractiveExperts(DIM, STREAMS, EXPERTS).double()
    assert layer.weight.tolist() == [0, 1, 1]
    layer.weight.data = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    x = torch.randn(2, 3, STREAMS, DIM, dtype=torch.float64)
    got = layer(x)
    matrices = layer.expert.weight.view(EXPERTS, STREAMS * DIM, STREAMS * DIM)
    biases = layer.expert.bias.view(EXPERTS, STREAMS * DIM)
    for b in range(2):
        for position in range(3):
            together = x[b, position].reshape(-1)
            outputs = [matrices[k] @ together + biases[k] for k in range(EXPERTS)]
            for s, gate in enumerate(layer.gates):
                share = softmax(gate(x[b, position, s]).tolist())
                part = slice(s * DIM, (s + 1) * DIM)
                mixed = sum(share[k] * outputs[k][part] for k in range(EXPERTS))
                want = x[b, position, s] + layer.weight[s] * mixed
                torch.testing.assert_close(got[b, position, s], want)


def test_temporal_experts_are_their_definition() -> None:
    torch.manual_seed(0)
    layer = TemporalExperts(DIM, STREAMS, EXPERTS, time_width=5).double()
    assert dict(layer.named_parameters())["scale"].requires_grad
    assert (layer.scale - 1).abs().mean() < 0.2
    x, time = torch.randn(1, 3, STREAMS, DIM).double(), torch.randn(1, 3, 5).double()
    got = layer(x, time)
    for position in range(3):
        share = softmax(layer.gate(time[0, position]).tolist())
        scale = sum(share[k] * layer.scale[k] for k in range(EXPERTS))
        torch.testing.assert_close(got[0, position], x[0, position] * scale)


def test_intervals_are_bucketed_by_their_logarithm() -> None:
    gaps = [0, 1, 2, 3, 7, 59, 3600, 10 * DAY]
    times = [1_600_000_000]
    for gap in gaps:
        times.append(times[-1] + gap)
    width = len(times) + 2
    padded = torch.zeros(1, width, dtype=torch.int64)
    padded[0, : len(times)] = torch.tensor(times)
    got = interval_index(padded, torch.tensor([len(times)]), 100)[0].tolist()
    assert got == [0, *(1 + math.floor(100 * math.log2(gap + 1)) for gap in gaps), 0, 0]


def test_no_time_is_undefined() -> None:
    """Differences at padding are negative: public code takes their logarithm, and reads row nan."""
    embedding = TimeEmbedding(DIM, TemporalConfig(per_octave=100))
    time = torch.tensor([[1_600_000_000, 0, 0], [5, 5, 2**40]])
    out = embedding(batch_of(torch.ones(2, 3).long(), torch.tensor([1, 3]), time))
    assert out.shape == (2, 3, 2 * DIM)
    assert out.isfinite().all()
    with pytest.raises(FindRecError, match=r"model\.temporal\.experts=0"):
        embedding(batch_of(torch.ones(2, 3).long(), torch.tensor([1, 3])))


def test_the_calendar_returns_and_is_exact() -> None:
    now = 1_700_000_000
    times = torch.tensor([[now, now + 1, *(now + period for period in PERIODS)]])
    values = calendar(times)[0]
    for p, period in enumerate(PERIODS):
        angle = 2 * math.pi * (now % period) / period
        assert math.isclose(float(values[0, p]), math.cos(angle), abs_tol=1e-6)
        assert math.isclose(float(values[0, len(PERIODS) + p]), math.sin(angle), abs_tol=1e-6)
        torch.testing.assert_close(values[2 + p, p], values[0, p])
    assert not torch.equal(values[0], values[1])  # one second apart


def test_category_prediction_is_its_definition() -> None:
    torch.manual_seed(0)
    layer = CategoryPrediction(STREAMS * DIM, 3).double()
    item = torch.tensor([[1, 2, 1, 4], [2, 3, 0, 0]])
    batch = batch_of(item, torch.tensor([4, 2]))
    x = torch.randn(len(batch.ids), STREAMS, DIM)
    values = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    present = torch.tensor([False, True, True, False, True])  # item 3 has no categories
    got = layer.float()(x, ModalRows(values.float(), present), batch)
    layer.double()
    losses = []
    for one in item[item > 0].tolist():
        if not present[one]:
            continue
        logits = layer.predict(x[one].double().flatten())
        terms = []
        for c in range(3):
            chance = 1 / (1 + math.exp(-float(logits[c].detach())))
            terms.append(-math.log(chance if values[one, c] else 1 - chance))
        losses.append(sum(terms) / 3)
    assert len(losses) == 5
    assert math.isclose(float(got), sum(losses) / 5, rel_tol=1e-5)


def test_placeholders_replace_content_by_time_at_some_events() -> None:
    torch.manual_seed(0)
    layer = TimePlaceholders(DIM, 2, time_width=6, share=0.3)
    x, time = torch.randn(20, 50, 2, DIM), torch.randn(20, 50, 6)
    out = layer(x, time)
    replaced = (out != x).flatten(2).all(-1)
    assert torch.equal((out != x).flatten(2).any(-1), replaced)
    assert abs(float(replaced.float().mean()) - 0.3) < 0.05
    torch.testing.assert_close(out[replaced].flatten(1), layer.from_time(time[replaced]))


def test_terms_follow_the_configuration() -> None:
    widths, item = {"text": 3, "genre": 2}, torch.randint(1, 41, (3, 5))
    batch = Batch.build(
        item,
        torch.full((3,), 5),
        torch.arange(3),
        torch.arange(15),
        item.flatten().roll(-1),
        time=torch.arange(15).view(3, 5),
    ).with_targets()
    rows = torch.randn(len(batch.ids), 8)
    features = {n: ModalRows(torch.randn(len(batch.ids), w), batch.ids > 0) for n, w in widths.items()}

    def terms(**model: object) -> set[str]:
        network = make_model({"name": "hm4sr", "dim": 8} | model, widths).train()
        return set(network(batch, rows, features).aux)

    assert terms() == {"id_contrast", "placeholder_text", "placeholder_genre"}
    assert terms(categories="genre") == {"id_contrast", "placeholder_text", "category"}
    assert terms(temporal={"experts": 0}) == {"id_contrast"}
    assert terms(tasks={"id_contrast": 0, "placeholder_contrast": 0}) == set()


def test_wrong_configurations_are_explained() -> None:
    with pytest.raises(ValueError, match="dim=10 is not a multiple of heads=4"):
        make_model({"name": "hm4sr", "dim": 10, "heads": 4})
    with pytest.raises(ValueError, match="must not be an input"):
        make_model({"name": "hm4sr", "modalities": ["text"], "categories": "text"})
    with pytest.raises(FindRecError, match="names no modality of the data"):
        make_model({"name": "hm4sr", "categories": "genre"}, {"text": 3})
    model = make_model({"name": "hm4sr", "dim": 8}, max_length=2)
    batch = batch_of(torch.ones(1, 3).long(), torch.tensor([3]), torch.ones(1, 3).long())
    with pytest.raises(FindRecError, match=r"data\.max_length"):
        model(batch, torch.zeros(2, 8), {})
