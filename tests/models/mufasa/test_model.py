"""What is particular to the whole model: memorising, prediction at the last event, and refused keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from memorise import hit_rate_of_memorised
from small_models import make_model

from findrec.config import load_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.configs import choose_model
from findrec.models.mufasa.config import MufasaConfig
from findrec.ops.sparse_attention.sizes import sizes_for

SMALL = {"block": 4, "stride": 2, "selected_block": 4, "selected": 4, "window": 5, "share": 2}


def test_it_memorises_histories() -> None:
    assert hit_rate_of_memorised({"name": "mufasa", "dim": 32}) > 0.95


def test_predictions_at_the_last_event_equal_those_at_all_events() -> None:
    torch.manual_seed(0)
    tree = {"name": "mufasa", "dim": 16, "sizes": SMALL}
    model = make_model(tree, {"text": 5}, max_length=40).eval()
    item = torch.randint(1, 41, (3, 30))
    length = torch.tensor([30, 7, 19])
    for row, n in enumerate(length.tolist()):
        item[row, n:] = 0
    last = torch.arange(3) * 30 + length - 1
    whole = Batch.build(item, length, torch.arange(3), torch.arange(90), torch.ones(90, dtype=torch.int64))
    some = replace(whole, position=last, target=last[:0])
    features = {"text": ModalRows(torch.randn(len(whole.ids), 5), whole.ids > 0)}
    rows = 0.1 * torch.randn(len(whole.ids), 16)
    every = model(whole, rows, features).h
    assert torch.allclose(model(some, rows, features).h, every[last], atol=1e-5)
    turned = replace(some, position=last[[1, 1, 2]])  # not one position of each user
    assert torch.allclose(model(turned, rows, features).h, every[last[[1, 1, 2]]], atol=1e-5)


def test_items_without_a_row_are_scored_by_content_and_without_either_not_at_all() -> None:
    torch.manual_seed(0)
    model = make_model({"name": "mufasa", "dim": 16}, {"text": 5}).eval()
    rows = 0.1 * torch.randn(4, 16)
    rows[2:] = 0
    present = torch.tensor([True, True, True, False])
    features = {"text": ModalRows(torch.randn(4, 5) * present[:, None], present)}
    vectors = model.item_transform(rows, features)
    assert torch.allclose(vectors[:3].norm(dim=1), torch.full((3,), 0.2), atol=1e-4)
    assert (vectors[3] == 0).all()
    content = model.items.content(model.fusion(features).fused_nf)[2]
    assert torch.cosine_similarity(vectors[2], content - content.mean(), dim=0) > 0.999


def test_sizes_follow_the_longest_history_or_the_configuration() -> None:
    for length in (50, 200, 1000, 4000):
        model = make_model({"name": "mufasa", "dim": 16}, {"text": 5}, max_length=length)
        assert model.sizes == sizes_for(length)
    model = make_model({"name": "mufasa", "dim": 16, "sizes": SMALL}, {"text": 5})
    assert vars(model.sizes) == SMALL


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sequences": {"epochs": 2}}, "sequences is a stage before the joint training"),
        ({"branches": []}, "must name at least one of window, block and selected"),
        ({"branches": ["block", "block"]}, "each at most once"),
        ({"heads": 4, "groups": 3}, "groups=3 must divide heads=4"),
        ({"dim": 20}, "dim=20 must be a multiple of twice heads=4"),
        ({"sizes": SMALL | {"block": 5}}, "sizes.block=5 must be a multiple of sizes.stride=2"),
        ({"sizes": SMALL | {"share": 3}}, "sizes.share=3 must divide selected_block=4"),
        ({"fusion": {"heads": 5}}, "fusion.dim=64 is not a multiple of fusion.heads=5"),
    ],
)
def test_keys_that_do_not_fit_are_told(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_model({"name": "mufasa"} | keys)


def test_data_without_the_anchor_is_refused() -> None:
    with pytest.raises(FindRecError, match=r"model\.anchor='text' is not among .*\(image\)"):
        make_model({"name": "mufasa", "dim": 16}, {"image": 5})


def test_the_file_reads_long_histories() -> None:
    config = load_config("mufasa")
    assert isinstance(config.model, MufasaConfig)
    assert config.data.max_length >= 512
    assert [stage.name for stage in config.model.stages()] == ["collaborative", "fusion", ""]
