"""The contract of sequence models (findrec/models/base.py), tested for each registered one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from small_models import make_model, row_width, training_batch
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.base import Microbatch, Out, SequenceModel
from findrec.models.config import SequenceConfig
from findrec.models.configs import CONFIGS, choose_model
from findrec.models.parts.layers import Dropout
from findrec.models.parts.repeat import repeat_candidates
from findrec.ops.repeat_bonus import NUM_REPEAT_FEATURES
from findrec.tables.base import ITEMS
from findrec.tables.item_table import ItemTable
from findrec.tables.table_spec import TableSpec
from findrec.training.objectives import run_microbatch
from findrec.training.tower import PlainTower

FIRST_TIME, SECONDS_PER_GAP, WAIT = 1_000_000_000, 5000, 7
DIM, NUM_ITEMS, WIDTHS = 16, 30, {"text": 12, "image": 7}
CHANGES: dict[tuple[str, str], dict[str, object]] = {  # of a model's configuration, by its name and a label
    ("findrec", "gru"): {"stream": {"kind": "gru"}},
    ("findrec", "transformer"): {"stream": {"kind": "transformer"}},
    ("findrec", "marginal"): {"align": {"kind": "marginal"}},
    ("findrec", "mmd"): {"align": {"kind": "mmd"}},
    ("mufasa", "tuned"): {"tuning": "tuned", "anchor": "mean"},
    ("mufasa", "sparse"): {
        "sizes": {"block": 4, "stride": 2, "selected_block": 4, "selected": 3, "window": 5, "share": 2},
        "branches": ["block", "selected"],
    },
    ("mufasa", "pairs"): {"branches": ["window", "selected"], "anchor": "image"},
    ("esasrec", "heads"): {"heads": 2, "feed_factor": 1},
    ("hstu", "target"): {"times": "target", "heads": 2},
    ("hstu", "none"): {"times": "none"},
    ("hstu", "dot"): {"temperature": None},
    ("mamba4rec", "deep"): {"stream": {"layers": 2}},
    ("unisrec", "dot"): {"temperature": None, "experts": 3},
    ("gru4rec", "wide"): {"hidden": 24, "layers": 2},
    ("bivrec", "plain"): {"scales": [], "gaussian": False, "interests": {"number": 1}},
    ("m3rec", "apart"): {"shared": False, "weights": "equal"},
    ("mfn", "ids"): {"attend": "ids"},
    ("mfn", "both"): {"attend": "both"},
    ("hm4sr", "categories"): {"categories": "image"},
    ("hm4sr", "plain"): {"interactive": {"experts": 0}, "temporal": {"experts": 0}},
    ("hm4sr", "calendar"): {"temporal": {"reads": "calendar"}},
    ("findrec-2025", "mean"): {"routing": {"kind": "mean"}},
    ("findrec-2025", "legacy"): {"align": {"kind": "legacy", "paired_weight": 0.1}},
    ("findrec-2025", "window"): {"routing": {"window": 5}},
    ("findrec-2025", "content"): {"items": {"features": "both"}},
}
VARIANTS = [
    (name, modalities, repeat, "")
    for name in sorted(CONFIGS)
    if issubclass(CONFIGS[name], SequenceConfig)
    for modalities in (("text",), ("text", "image"))
    for repeat in (False, True)
] + [(name, ("text", "image"), False, change) for name, change in CHANGES]


class Case:
    """A model with a small catalogue: rows and features of all items, some without a modality."""

    def __init__(self, name: str, modalities: tuple[str, ...], repeat: bool, change: str) -> None:
        torch.manual_seed(0)
        sizes = {"name": name, "dim": DIM, "dropout": 0.2, "gaps": True, "repeat": repeat}
        dims = {m: WIDTHS[m] for m in modalities}
        config = choose_model(sizes | CHANGES.get((name, change), {}))
        self.width = row_width(config, dims)
        self.table = torch.randn(NUM_ITEMS + 1, self.width) * 0.05
        self.table[0] = 0
        self.values = {m: torch.randn(NUM_ITEMS + 1, WIDTHS[m]) for m in modalities}
        self.present = {m: torch.rand(NUM_ITEMS + 1) < 0.7 for m in modalities}
        for m in modalities:
            self.present[m][0] = False
            self.values[m][~self.present[m]] = 0
        self.model: SequenceModel = make_model(config, dims, max_length=64)
        self.untrained = copy.deepcopy(self.model.state_dict())
        for p in self.model.parameters():  # away from zeros and ones, so that every path matters
            p.data += 0.05 * torch.randn_like(p)
        self.repeat = repeat

    def features(self, ids: Tensor) -> Mapping[str, ModalRows]:
        """See `ItemFeatures`."""
        return {m: ModalRows(v[ids], self.present[m][ids]) for m, v in self.values.items()}

    def all_features(self, device: object, part: range | None = None) -> Mapping[str, ModalRows]:
        """See `ItemFeatures`."""
        return self.features(torch.arange(NUM_ITEMS + 1) if part is None else torch.tensor(list(part)))

    def inputs(self, batch: Batch) -> tuple[Tensor, Mapping[str, ModalRows]]:
        rows = self.table[batch.ids].clone().requires_grad_()
        return rows, self.features(batch.ids)

    def vectors(self) -> Tensor:
        """The vectors that items are scored by."""
        return self.model.item_transform(self.table, self.all_features("cpu"))

    def run(self, batch: Batch) -> Out:
        batch = training_batch(self.model, batch)
        rows, features = self.inputs(batch)
        out: Out = self.model(batch, rows, features)
        return out


@pytest.fixture(
    params=VARIANTS, ids=lambda v: "-".join([v[0], "+".join(v[1]), "repeat" if v[2] else "plain", v[3]])
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def histories(lengths: list[int], seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Items and time gaps of each user."""
    torch.manual_seed(seed)
    return [(torch.randint(1, NUM_ITEMS + 1, (n,)), torch.randint(0, 20, (n,))) for n in lengths]


def as_batch(users: list[tuple[Tensor, Tensor]], width: int | None = None) -> Batch:
    """Every position of every user is a target position."""
    lengths = torch.tensor([len(items) for items, _ in users])
    width = int(lengths.max()) if width is None else width
    item, gap = (torch.zeros(len(users), width, dtype=torch.int64) for _ in range(2))
    for b, (items, gaps) in enumerate(users):
        item[b, : len(items)], gap[b, : len(items)] = items, gaps
    position = (torch.arange(width) < lengths[:, None]).flatten().nonzero().squeeze(1)
    target = torch.randint(1, NUM_ITEMS + 1, (len(position),))
    time = FIRST_TIME + (SECONDS_PER_GAP * gap).cumsum(1)
    later = torch.cat([time[:, 1:], time[:, -1:]], dim=1)
    later[torch.arange(len(users)), lengths - 1] = time[torch.arange(len(users)), lengths - 1] + WAIT
    query_time = later.flatten()[position]
    time[torch.arange(width) >= lengths[:, None]] = 0
    return Batch.build(
        item,
        lengths,
        torch.arange(len(users)),
        position,
        target,
        gap,
        time=time,
        query_time=query_time,
    )


def assert_same(a: Out, b: Out, rows_a: slice, rows_b: slice) -> None:
    assert torch.allclose(a.h[rows_a], b.h[rows_b], atol=1e-5)
    if a.repeat is not None and b.repeat is not None:
        assert torch.allclose(a.repeat[rows_a], b.repeat[rows_b], atol=1e-5)


def test_shapes_and_repeat_head(case: Case) -> None:
    batch = as_batch(histories([9, 4]))
    case.model.eval()
    out = case.run(batch)
    assert out.h.shape[:1] + out.h.shape[-1:] == (13, case.vectors().shape[1])  # one or several vectors
    assert (out.repeat is not None) == case.repeat
    if out.repeat is not None:
        assert out.repeat.shape == (13, NUM_REPEAT_FEATURES)
    assert not out.aux
    assert not out.diagnostics


def test_the_future_changes_nothing(case: Case) -> None:
    case.model.eval()
    ((items, gaps),) = histories([40])
    ((other, other_gaps),) = histories([40], seed=7)
    cut = 23
    # The gap before event `cut` stays: a model may know when a prediction is made.
    changed = torch.cat([items[:cut], other[cut:]]), torch.cat([gaps[: cut + 1], other_gaps[cut + 1 :]])
    before, after = case.run(as_batch([(items, gaps)])), case.run(as_batch([changed]))
    assert_same(before, after, slice(0, cut), slice(0, cut))
    assert not torch.allclose(before.h[cut:], after.h[cut:], atol=1e-3)


def test_padding_and_other_users_change_nothing(case: Case) -> None:
    case.model.eval()
    users = histories([17, 1, 38])
    together = case.run(as_batch(users))
    start = 0
    for user in users:
        end = start + len(user[0])
        assert_same(together, case.run(as_batch([user])), slice(start, end), slice(None))
        assert_same(together, case.run(as_batch([user], width=55)), slice(start, end), slice(None))
        start = end


def test_only_target_positions_are_returned(case: Case) -> None:
    case.model.eval()
    whole = as_batch(histories([12, 6]))
    assert whole.query_time is not None
    last = replace(
        whole,
        position=torch.tensor([11, 17]),
        target=torch.zeros(0).long(),
        query_time=whole.query_time[[11, 17]],
    )
    some, every = case.run(last), case.run(whole)
    assert_same(some, every, slice(0, 1), slice(11, 12))
    assert_same(some, every, slice(1, 2), slice(17, 18))


def test_gradient_reaches_every_parameter_and_the_rows(case: Case) -> None:
    case.model.train()
    batch = training_batch(case.model, as_batch(histories([30, 25])))
    rows, features = case.inputs(batch)
    out = case.model(batch, rows, features)
    loss = (out.h * torch.randn_like(out.h)).sum() + sum(term.value for term in out.aux.values())
    if out.repeat is not None:
        loss = loss + (out.repeat * torch.randn_like(out.repeat)).sum()
    loss.backward()
    for name, parameter in case.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert rows.grad is not None
    assert (rows.grad[1:].abs().sum(1) > 0).all()


def test_a_batch_without_any_features_trains_too(case: Case) -> None:
    case.model.train()
    for present in case.present.values():
        present[:] = False
    out = case.run(as_batch(histories([5, 3])))
    loss = out.h.sum() + sum(term.value for term in out.aux.values())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in case.model.parameters())


def test_values_of_a_missing_modality_are_never_read(case: Case) -> None:
    case.model.eval()
    batch = as_batch(histories([20]))
    before = case.run(batch)
    for name, values in case.values.items():
        values[~case.present[name]] = 1e3
    assert torch.equal(before.h, case.run(batch).h)


def test_evaluation_is_deterministic_and_training_follows_the_seed(case: Case) -> None:
    batch = as_batch(histories([20, 13]))
    case.model.eval()
    torch.manual_seed(1)
    first = case.run(batch).h
    torch.manual_seed(2)
    assert torch.equal(first, case.run(batch).h)
    case.model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = case.run(batch)
        runs.append(torch.cat([out.h.flatten(), *(term.value.view(1) for term in out.aux.values())]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2], atol=1e-3)


def test_aux_terms_are_named_alike_in_every_batch(case: Case) -> None:
    case.model.train()
    one, two = case.run(as_batch(histories([20, 13]))), case.run(as_batch(histories([1])))
    assert list(one.aux) == list(two.aux)
    assert list(one.diagnostics) == list(two.diagnostics)
    assert all(term.value.ndim == 0 and not term.reported.requires_grad for term in one.aux.values())


def test_scores_of_untrained_models_are_small(case: Case) -> None:
    """A full softmax starts near uniform: |h . e| well below 1 for rows as small as the table's.

    Cosines divided by a temperature are not small, but those of random directions.
    """
    case.model.load_state_dict(case.untrained)
    case.model.eval()
    h = case.run(as_batch(histories([40]))).h
    vectors = case.vectors()
    temperature = getattr(case.model.config, "temperature", None)
    if temperature is not None:
        torch.testing.assert_close(h.norm(dim=1), torch.full((40,), 1 / temperature), rtol=0.01, atol=0)
        assert 0.95 < vectors[1:].norm(dim=1).mean() < 1
        assert (temperature * h @ vectors.t()).abs().mean() < 1.5 * DIM**-0.5
        return
    width = vectors.shape[1]
    assert 0.3 * width**0.5 < h.norm(dim=-1).mean() < 3 * width**0.5
    assert (h @ vectors.t()).abs().mean() < 0.5


def test_low_precision_rounds_products_and_nothing_else(case: Case) -> None:
    batch = training_batch(case.model, as_batch(histories([30, 25])))

    def trained(low: bool) -> tuple[Out, dict[str, Tensor]]:
        case.model.low_precision = low
        case.model.zero_grad()
        torch.manual_seed(3)
        rows, features = case.inputs(batch)
        out = case.model(batch, rows, features)
        weight = torch.randn_like(out.h)
        ((out.h * weight).sum() + sum(term.value for term in out.aux.values())).backward()
        assert rows.grad is not None
        return out, {"rows": rows.grad} | {
            n: p.grad for n, p in case.model.named_parameters() if p.grad is not None
        }

    case.model.train()
    for module in case.model.modules():
        if isinstance(module, Dropout):
            module.dropped = 0
    full, full_grads = trained(False)
    low, low_grads = trained(True)
    assert low.h.dtype is torch.float32
    assert all(grad.dtype is torch.float32 for grad in low_grads.values())
    assert all(term.value.dtype is torch.float32 for term in low.aux.values())
    assert not torch.equal(full.h, low.h)
    assert torch.allclose(full.h, low.h, atol=0.15, rtol=0.05)
    for name, grad in full_grads.items():
        off = (low_grads[name] - grad).norm() / grad.norm()
        assert off < 0.3, (name, float(off))
    case.model.eval()
    evaluated = case.run(batch)
    case.model.low_precision = False
    assert torch.equal(evaluated.h, case.run(batch).h)


def test_wrong_configurations_are_explained() -> None:
    with pytest.raises(FindRecError, match=r"multiple of model\.heads"):
        make_model({"name": "sasrec", "dim": 10, "heads": 4})
    with pytest.raises(FindRecError, match=r"multiple of model\.routing\.heads"):
        make_model({"name": "findrec-2025", "dim": 10}, {"text": 3})
    with pytest.raises(ValueError, match="did you mean 'findrec'"):
        make_model({"name": "findrek"})


@pytest.mark.parametrize("num_targets", [100, 10**12])  # the second leaves the auxiliary terms alone
def test_the_loss_and_its_gradients_are_those_of_the_formula(case: Case, num_targets: int) -> None:
    """One microbatch of the default objective, against softmax over the catalogue in plain torch."""
    torch.manual_seed(3)
    item = torch.randint(1, NUM_ITEMS + 1, (3, 9))
    target = torch.randint(1, NUM_ITEMS + 1, (27,))
    batch = Batch.build(
        item,
        torch.full((3,), 9),
        torch.arange(3),
        torch.arange(27),
        target,
        torch.ones_like(item),
        time=torch.arange(27).view(3, 9),
        query_time=torch.arange(1, 28),
    )
    optim = OptimConfig()
    table = ItemTable(TableSpec(NUM_ITEMS, case.width, seed=0, loss=LossConfig(), optim=optim))
    table.weight.copy_(case.table)
    tower = PlainTower(case.model.train(), optim)
    microbatch = Microbatch(batch, case, num_targets=num_targets, num_microbatches=4, seed=7)
    loss = run_microbatch(tower, {ITEMS: table}, microbatch)
    ours = {name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    torch.manual_seed(7)
    weight = case.table.clone().requires_grad_()
    batch = training_batch(case.model, batch)
    out = case.model(batch, weight[batch.ids], case.features(batch.ids))
    scores = out.h @ case.model.item_transform(weight, case.all_features("cpu")).T
    if out.repeat is not None:
        bonus = repeat_candidates(batch).bonus(out.repeat)
        candidate = torch.where(bonus.seen_TN, bonus.ids_BN[bonus.row_T], 0)
        scores = scores.scatter_add(1, candidate, torch.where(bonus.seen_TN, bonus.bonus_TN, 0.0))
    entropy = torch.nn.functional.cross_entropy(scores[:, 1:], target - 1, reduction="sum") / num_targets
    total = entropy + sum(term.value / 4 for term in out.aux.values())
    total.backward()
    torch.testing.assert_close(loss.loss, entropy.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.total, total.detach(), rtol=1e-5, atol=1e-6)
    assert dict(loss.aux) == {name: term.reported / 4 for name, term in out.aux.items()}
    for name, parameter in case.model.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            ours.get(name, torch.zeros_like(want)), want, rtol=1e-3, atol=1e-6, msg=name
        )
    index, gradient = table._local.gradient()
    assert index is None
    torch.testing.assert_close(gradient[1:], weight.grad[1:], rtol=1e-3, atol=1e-6)
