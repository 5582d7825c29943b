"""Statistics of folders small enough to count by hand, and of the same folder cut in other ways."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from findrec.cli import main
from findrec.datasets.folder import DataFolder
from findrec.datasets.memory import write_data_folder
from findrec.datasets.profile import load_profile
from findrec.datasets.stats import Stats, measure
from findrec.datasets.stats_show import LABELS, stats_table

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
    found = measure(by_hand)
    assert (found.users, found.items, found.events) == (3, 6, 10)
    assert found.length_max == 6
    assert found.length_mean == pytest.approx(10 / 3)
    logs = np.log([6, 1, 3])
    assert (found.length_mu, found.length_sigma) == pytest.approx((logs.mean(), logs.std()))
    assert found.users_1000 == 0
    assert found.items_below_5 == 1  # item 1 has four events
    assert found.share_top_1 == found.share_top_20 == pytest.approx(0.4)


def test_repeats_and_sessions_by_hand(by_hand: DataFolder) -> None:
    found = measure(by_hand)
    assert found.repeat_rate == pytest.approx(0.3)
    assert (found.repeat_lag_p50, found.repeat_lag_p75) == (
        1,
        2,
    )  # lags 1 and 2; the third is inside a session
    # sizes 2 2 2 | 1 | 2 1
    assert found.session_mean == pytest.approx(10 / 6)
    assert found.session_p95 == 2
    assert found.gap_days_p50 == 1  # of half an hour, a day and nearly three
    assert found.tie_rate == pytest.approx(0.2)
    assert math.isnan(found.distinct_after_100)


def test_present_shares_by_hand(by_hand: DataFolder) -> None:
    found = measure(by_hand)
    assert found.present_items == {"image": pytest.approx(6 / 7)}
    assert found.present_events == {"image": pytest.approx(0.6)}  # item 1 has no image and four events


def test_distinct_items_after_a_hundred_events(tmp_path: Path) -> None:
    twice = np.repeat(np.arange(1, 76), 2).tolist()  # 50 different in the first hundred
    once = np.arange(1, 121).tolist()
    found = measure(write_data_folder(tmp_path / "data", [twice, [5] * 99, once]))
    assert found.distinct_after_100 == pytest.approx((50 + 100) / 2)
    assert math.isnan(found.distinct_after_500)


@pytest.mark.parametrize("exponent", [0.5, 1.2])
def test_slopes_of_a_power_law(tmp_path: Path, exponent: float) -> None:
    counts = np.rint(3000 * np.arange(1, 401.0) ** -exponent).astype(int)
    items = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 401), counts))
    found = measure(write_data_folder(tmp_path / "data", np.array_split(items, 20)))
    assert found.slope_head == pytest.approx(exponent, abs=0.01)
    assert found.slope_middle == pytest.approx(exponent, abs=0.03)
    assert found.share_top_20 == pytest.approx(counts[:80].sum() / counts.sum())


def test_drift_by_hand(tmp_path: Path) -> None:
    # Ten users, one a tenth of the time. In the later half items 1..4 go on and 5..8 are new, half and half.
    old, new = [1, 2, 3, 4] * 10, [1, 2, 3, 4, 5, 6, 7, 8] * 5
    histories = [old] * 5 + [new] * 5
    times = [list(range(1000 * t, 1000 * t + 40)) for t in range(10)]
    found = measure(write_data_folder(tmp_path / "data", histories, times))
    assert found.cold_share == pytest.approx(0.5)
    assert found.jaccard_first_last == pytest.approx(0.5)
    assert found.jaccard_neighbours == pytest.approx((8 * 1 + 0.5) / 9)


def test_the_packing_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    histories = [rng.integers(1, 50, rng.integers(1, 200)).tolist() for _ in range(60)]
    times = [np.sort(rng.integers(0, 30 * DAY, len(h))).tolist() for h in histories]
    found = [
        measure(
            write_data_folder(
                tmp_path / str(size), histories, times, users_per_member=size, shard_bytes=size * 2000
            )
        )
        for size in (1, 7, 60)
    ]
    assert found[0].repeat_rate > 0.3
    assert repr(found[0]) == repr(found[1]) == repr(found[2])  # NaN is not equal to itself


def test_one_event_is_enough(tmp_path: Path) -> None:
    found = measure(write_data_folder(tmp_path / "data", [[3]], num_items=3))
    assert (found.users, found.items, found.events) == (1, 1, 1)
    assert math.isnan(found.slope_head)
    assert math.isnan(found.repeat_lag_p50)
    assert math.isnan(found.cold_share)


def test_every_figure_is_shown_and_every_target_is_a_figure(by_hand: DataFolder) -> None:
    assert list(LABELS) == [name for name in Stats.model_fields if not name.startswith("present")]
    names = ("complete-journey", "ml-latest-small", "amazon-grocery")
    assert all(set(load_profile(name).targets) <= set(LABELS) for name in names)
    assert stats_table(measure(by_hand), {}).row_count == len(LABELS) + 2  # and one modality's two shares


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


def test_command_refuses_what_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "ml-100kk"]) == 2
    assert "ml-100k" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["stats", str(tmp_path / "empty")]) == 2
    assert "manifest.json" in capsys.readouterr().err
