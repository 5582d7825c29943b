"""The placement of a table for a configuration, with its reason."""

import pytest

from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.tables.placement import SHARD_ABOVE_BYTES, place_table

OLD = ["model.name=findrec-2025"]  # has an option that makes item vectors random
LIMIT = SHARD_ABOVE_BYTES // (4 * 4 * 64)  # rows of width 64 with gradient and moments


@pytest.mark.parametrize(
    ("overrides", "rows", "workers", "mode", "held"),
    [
        ([], LIMIT, 2, "replicated", LIMIT),
        ([], LIMIT + 1, 2, "sharded", LIMIT // 2 + 1),
        ([], LIMIT + 1, 1, "replicated", LIMIT + 1),
        (["training.loss.kind=sampled"], LIMIT + 1, 2, "replicated", LIMIT + 1),  # no gradient of its size
        (["training.loss.kind=sampled"], LIMIT * 2, 4, "sharded", LIMIT // 2),
        ([*OLD, "model.items.id_dropout=0.1"], LIMIT * 2, 2, "replicated", LIMIT * 2),
        ([*OLD, "model.items.id_dropout=0.1", "training.loss.kind=gbce"], LIMIT * 2, 2, "sharded", LIMIT),
        (["training.table=replicated"], LIMIT * 9, 2, "replicated", LIMIT * 9),
        (["training.table=sharded"], 10, 3, "sharded", 4),
    ],
)
def test_auto_shards_what_is_large_and_can_be(overrides, rows, workers, mode, held):
    place = place_table(parse_config({}, overrides), rows - 1, 64, workers, content=True)
    assert (place.mode, place.rows) == (mode, held)
    assert place.bytes == held * 4 * 64 * (3 if "loss.kind" in str(overrides) else 4)
    assert "GiB" in place.why


@pytest.mark.parametrize(
    ("override", "items", "problem"),
    [("model.items.id_dropout=0.1", 100, "dropout of ids"), ("model.dim=64", 2, "too few")],
)
def test_what_cannot_be_sharded_is_refused(override, items, problem):
    config = parse_config({}, [*OLD, "training.table=sharded", override])
    with pytest.raises(FindRecError, match=problem):
        place_table(config, items, 64, 4, content=True)
