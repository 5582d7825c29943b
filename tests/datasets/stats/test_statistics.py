"""Statistics of small folders with known results, and their independence of the packing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from findrec.cli.app import main
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.overview import overview
from findrec.datasets.folder.splits import Split
from findrec.datasets.stats.display import stats_table
from findrec.datasets.stats.statistics import Stats, measure
from findrec.datasets.synthetic.profile import load_profile

HOUR, DAY = 3600, 86_400


@pytest.fixture
def by_hand(tmp_path: Path) -> DataFolder:
    """Three users, seven items of which the last never occurs.

    User 0 has three sessions: items 1 2 | 1 1 | 3 2 (the first 1 again one session later, the second inside
    its session, the 2 two sessions later). User 1 has one event; user 2 two events that are 30 min apart,
    which is still one session, and a third a second too late for that.
    """
    image = np.ones((7, 2))
    image[0] = np.nan
    return write_data_folder(
        tmp_path / "data",
        [[1, 2, 1, 1, 3, 2], [4], [1, 5, 6]],
        [[0, 0, DAY, DAY + 60, 4 * DAY, 4 * DAY + 1], [2 * DAY], [5 * DAY, 5 * DAY + 1800, 5 * DAY + 3601]],
        features={"image": image},
        num_items=7,
        users_per_member=2,
    )


def test_counts_by_hand(by_hand: DataFolder) -> None:
    stats = measure(by_hand)
    assert (stats.users, stats.items, stats.events) == (3, 6, 10)
    assert stats.length_max == 6
    assert stats.length_mean == pytest.approx(10 / 3)
    logs = np.log([6, 1, 3])
    assert (stats.length_mu, stats.length_sigma) == pytest.approx((logs.mean(), logs.std()))
    assert stats.users_1000 == 0
    assert stats.items_below_5 == 1  # item 1 has four events
    assert stats.share_top_1 == stats.share_top_20 == pytest.approx(0.4)


def test_repeats_and_sessions_by_hand(by_hand: DataFolder) -> None:
    stats = measure(by_hand)
    assert stats.repeat_rate == pytest.approx(0.3)
    # Lags 1 and 2; the third repeat is inside a session.
    assert (stats.repeat_lag_p50, stats.repeat_lag_p75) == (1, 2)
    # Sizes 2 2 2 | 1 | 2 1.
    assert stats.session_mean == pytest.approx(10 / 6)
    assert stats.session_p95 == 2
    assert stats.gap_days_p50 == 1  # of half an hour, a day and nearly three
    assert stats.tie_rate == pytest.approx(0.2)
    assert math.isnan(stats.distinct_after_100)


def test_present_shares_by_hand(by_hand: DataFolder) -> None:
    stats = measure(by_hand)
    assert stats.present_items == {"image": pytest.approx(6 / 7)}
    assert stats.present_events == {"image": pytest.approx(0.6)}  # item 1 has no image and four events


def test_overview_by_hand(by_hand: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    seen = measure(by_hand).overview
    assert (seen.first_time, seen.last_time) == (0, 5 * DAY + 3601)
    sizes = {name: (part.users, part.events) for name, part in seen.parts.items()}
    # User 1 has one event; the others one of validation and one of test.
    assert sizes == {"training": (3, 6), "validation": (2, 2), "test": (2, 2)}
    assert seen.not_tested == {"a single event, which is for training": 1}
    assert (seen.items_without_events, seen.items) == (1, 7)
    assert main(["stats", str(by_hand.path)]) == 0
    shown = capsys.readouterr().out
    assert "from 1970-01-01 00:00:00 to 1970-01-06 01:00:01 (5.0 days)" in shown
    assert "training 6 of 3 users, validation 2 of 2 users, test 2 of 2 users" in shown
    assert "not in the test: 1 of 3 users with a single event" in shown
    assert "1 of 7 items have no event" in shown


def test_overview_of_a_global_split(tmp_path: Path) -> None:
    split = Split(kind="global_temporal", valid_from=100, test_from=200)
    times = [[0, 150, 250], [150, 250], [210, 220], [0, 1], [300]]
    items = [list(range(1, len(one) + 1)) for one in times]
    seen = overview(write_data_folder(tmp_path / "data", items, times, split=split))
    sizes = {name: (part.users, part.events) for name, part in seen.parts.items()}
    # The validation event of user 1 has nothing before it; users 2 and 4 come after the test begins.
    assert sizes == {"training": (2, 3), "validation": (1, 1), "test": (2, 2)}
    assert seen.not_trained == 3
    assert seen.not_tested == {
        "no event from 1970-01-01 00:03:20 on, where the test begins": 1,
        "no event before the test begins": 2,
    }


def test_distinct_items_after_a_hundred_events(tmp_path: Path) -> None:
    twice = np.repeat(np.arange(1, 76), 2).tolist()  # 50 different in the first hundred
    once = np.arange(1, 121).tolist()
    stats = measure(write_data_folder(tmp_path / "data", [twice, [5] * 99, once]))
    assert stats.distinct_after_100 == pytest.approx((50 + 100) / 2)
    assert math.isnan(stats.distinct_after_500)


@pytest.mark.parametrize("exponent", [0.5, 1.2])
def test_slopes_of_a_power_law(tmp_path: Path, exponent: float) -> None:
    counts = np.rint(3000 * np.arange(1, 401.0) ** -exponent).astype(int)
    items = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 401), counts))
    stats = measure(write_data_folder(tmp_path / "data", np.array_split(items, 20)))
    assert stats.slope_head == pytest.approx(exponent, abs=0.01)
    assert stats.slope_middle == pytest.approx(exponent, abs=0.03)
    assert stats.share_top_20 == pytest.approx(counts[:80].sum() / counts.sum())


def test_drift_by_hand(tmp_path: Path) -> None:
    # Ten users, one a tenth of the time. In the later half items 1..4 go on and 5..8 are new, half and half.
    old, new = [1, 2, 3, 4] * 10, [1, 2, 3, 4, 5, 6, 7, 8] * 5
    histories = [old] * 5 + [new] * 5
    times = [list(range(1000 * t, 1000 * t + 40)) for t in range(10)]
    stats = measure(write_data_folder(tmp_path / "data", histories, times))
    assert stats.cold_share == pytest.approx(0.5)
    assert stats.jaccard_first_last == pytest.approx(0.5)
    assert stats.jaccard_neighbours == pytest.approx((8 * 1 + 0.5) / 9)


def test_statistics_do_not_depend_on_the_packing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    histories = [rng.integers(1, 50, rng.integers(1, 200)).tolist() for _ in range(60)]
    times = [np.sort(rng.integers(0, 30 * DAY, len(h))).tolist() for h in histories]
    stats = [
        measure(
            write_data_folder(
                tmp_path / str(size), histories, times, users_per_member=size, shard_bytes=size * 2000
            )
        )
        for size in (1, 7, 60)
    ]
    assert stats[0].repeat_rate > 0.3
    assert repr(stats[0]) == repr(stats[1]) == repr(stats[2])  # NaN is not equal to itself


def test_one_event_is_enough(tmp_path: Path) -> None:
    stats = measure(write_data_folder(tmp_path / "data", [[3]], num_items=3))
    assert (stats.users, stats.items, stats.events) == (1, 1, 1)
    assert math.isnan(stats.slope_head)
    assert math.isnan(stats.repeat_lag_p50)
    assert math.isnan(stats.cold_share)


def test_every_statistic_is_shown_and_every_target_is_a_statistic(by_hand: DataFolder) -> None:
    names = ("complete-journey", "ml-latest-small", "amazon-grocery")
    assert all(set(load_profile(name).targets) <= set(Stats.model_fields) for name in names)
    # The two shares of the only modality replace `present_items` and `present_events`; `overview` is text.
    assert stats_table(measure(by_hand), {}).row_count == len(Stats.model_fields) - 1


def test_command_shows_and_writes(
    by_hand: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINDREC_QUIET", "1")
    file = tmp_path / "new" / "stats.json"
    arguments = ["stats", str(by_hand.path), "--profile", "complete-journey", "--json", str(file)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "real data" in shown
    assert "0.41" in shown
    written = json.loads(file.read_text())
    assert written["repeat_rate"] == pytest.approx(0.3)
    assert written["distinct_after_100"] is None


def test_command_rejects_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "ml-100kk"]) == 2
    assert "ml-100k" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["stats", str(tmp_path / "empty")]) == 2
    assert "manifest.json" in capsys.readouterr().err
