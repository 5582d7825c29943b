"""Altered views: their shares are as configured, and no item is shown with nothing that it could have."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from findrec.datasets.folder.features import ModalRows
from findrec.models.findrec.config import ControlConfig
from findrec.models.findrec.views import Views, draw_views

NUM = 400


def make_items() -> tuple[dict[str, ModalRows], Tensor]:
    """Features and whether items are known: the padding, unknown items, items with no or one modality."""
    torch.manual_seed(0)
    present = {"text": torch.rand(NUM) < 0.8, "image": torch.rand(NUM) < 0.5}
    for mask in present.values():
        mask[0] = False
    features = {m: ModalRows(torch.randn(NUM, 3) * mask[:, None], mask) for m, mask in present.items()}
    known_U = torch.rand(NUM) < 0.7
    known_U[0] = False
    return features, known_U


def drawn(count: int, **control: float) -> tuple[Mapping[str, ModalRows], Tensor, list[Views]]:
    features, known_U = make_items()
    return features, known_U, [draw_views(features, known_U, ControlConfig(**control)) for _ in range(count)]


def share_of(values: list[Tensor]) -> float:
    return float(torch.stack(values).float().mean())


@pytest.mark.parametrize(("altered", "swapped"), [(1.0, 1.0), (1.0, 0.4), (0.3, 0.8)])
def test_as_many_items_as_configured_have_the_content_of_another(altered: float, swapped: float) -> None:
    _, _, views = drawn(600, altered=altered, swapped=swapped)
    for name in ("text", "image"):
        wrong = [(~view.true_U[name]).float().mean() for view in views]
        some = [share for share in wrong if share > 0]
        assert len(some) / len(views) == pytest.approx(altered, abs=0.07)
        assert max(some) <= swapped
        assert float(torch.stack(some).mean()) == pytest.approx(swapped / 2, abs=0.05)  # uniform up to it


def test_swapped_content_is_that_of_another_item() -> None:
    features, _, views = drawn(50, altered=1.0, swapped=1.0)
    for view in views:
        for name, source_U in view.source_U.items():
            own = torch.arange(NUM)
            assert torch.equal(view.true_U[name], source_U == own)
            assert torch.equal(source_U.sort().values, own)  # each content is shown once
            shown_U = features[name].present[source_U] & view.content_U
            assert torch.equal(view.present_U[name], shown_U)
        swapped = [~view.true_U[name] for name in ("text", "image")]
        both = swapped[0] & swapped[1]
        if both.sum() > 20:  # the modalities are swapped independently
            assert not torch.equal(view.source_U["text"][both], view.source_U["image"][both])


def test_as_many_rows_and_contents_as_configured_are_hidden() -> None:
    features, known_U, views = drawn(100, hide_id=0.2, hide_content=0.1)
    has_content = features["text"].present | features["image"].present
    assert share_of([~view.row_U[known_U & has_content] for view in views]) == pytest.approx(0.2, abs=0.01)
    assert share_of([~view.content_U[known_U] for view in views]) == pytest.approx(0.1, abs=0.01)
    for view in views:
        assert (view.row_U | view.content_U)[known_U].all()  # never both
        assert not view.row_U[~known_U].any()
        assert view.content_U[~known_U].all()  # unknown items have nothing else
        assert view.row_U[known_U & ~has_content].all()  # neither have these


@pytest.mark.parametrize("control", [{"altered": 0.0}, {"swapped": 0.0}])
def test_nothing_is_altered_at_share_zero(control: dict[str, float]) -> None:
    _, known_U, views = drawn(50, hide_id=0.0, hide_content=0.0, **control)
    for view in views:
        assert all(true_U.all() for true_U in view.true_U.values())
        assert torch.equal(view.row_U, known_U)
        assert view.content_U.all()


def test_the_same_seed_gives_the_same_views() -> None:
    features, known_U = make_items()
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(draw_views(features, known_U, ControlConfig(altered=1.0)))
    first, again, other = views
    for name in features:
        assert torch.equal(first.source_U[name], again.source_U[name])
        assert not torch.equal(first.source_U[name], other.source_U[name])
    assert torch.equal(first.row_U, again.row_U)
    assert torch.equal(first.content_U, again.content_U)
    assert not torch.equal(first.row_U, other.row_U)


def test_the_padding_alone_can_be_viewed() -> None:
    rows = ModalRows(torch.zeros(1, 3), torch.zeros(1, dtype=torch.bool))
    view = draw_views({"text": rows}, torch.zeros(1, dtype=torch.bool), ControlConfig(altered=1.0))
    assert view.true_U["text"].all()
