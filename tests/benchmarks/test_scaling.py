"""The analytical model agrees with known costs of collectives and with the documentation."""

from dataclasses import replace

import pytest
from bench.scaling import bench_throughput
from bench.scaling_model import (
    H100,
    PAPER,
    Step,
    efficiency,
    flops,
    optimizer_bytes,
    paper_table,
    sent_bytes,
    sharding_break_even,
    step_seconds,
)

SMALL = Step(workers=2, accumulation=3, weights=1000, items=500, dim=8, targets=64, distinct=40)


def total(step):
    return sum(sent_bytes(step).values())


def test_two_workers_send_half_of_everything_twice():
    sent = sent_bytes(replace(SMALL, stage=0))
    assert sent["tower gradients"] == 4 * 1000
    assert sent["table gradient"] == 4 * 500 * 8
    assert total(replace(SMALL, workers=1)) == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_microbatches_add_traffic_in_stages_2_and_3(stage):
    once, thrice = (sent_bytes(replace(SMALL, stage=stage, accumulation=a)) for a in (1, 3))
    assert (thrice["tower gradients"] > once["tower gradients"]) == (stage >= 2)
    assert thrice["table gradient"] == once["table gradient"]


def test_traffic_of_replicated_and_sharded_tables():
    many = [replace(PAPER, workers=w) for w in (8, 64, 1024)]
    assert total(many[2]) < 1.2 * total(many[0])
    sharded = [total(replace(step, table="sharded")) for step in many]
    assert sharded[2] > 10 * sharded[1] > 50 * sharded[0] / 10
    turn = int(sharding_break_even(PAPER))
    for workers, less in ((turn - 1, True), (turn, False)):
        step = replace(PAPER, workers=workers)
        assert (total(replace(step, table="sharded")) <= total(step)) == less


def test_efficiency_and_operations():
    assert efficiency(replace(PAPER, workers=1, stage=0), H100) == pytest.approx(1)
    slow = replace(H100, network_bytes=H100.network_bytes / 10)
    assert efficiency(replace(PAPER, workers=8), slow) < efficiency(replace(PAPER, workers=8), H100) < 1
    assert flops(SMALL) == 3 * 6 * 64 * (1000 + 500 * 8)
    assert optimizer_bytes(replace(SMALL, table="sharded")) == 7 * 4 * (250 * 8 + 500)
    assert set(step_seconds(SMALL, H100)) == {"compute", "optimizer", "network"}


def test_the_document_has_the_printed_table():
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "evaluation" / "scaling.md").read_text()
    assert paper_table() in text


@pytest.mark.slow
@pytest.mark.cluster
def test_measured_throughput_and_traffic():
    rows = bench_throughput(items=500, rounds=1, stages=(0, 3))
    assert [row["zero_stage"] for row in rows] == [0, 3]
    for row in rows:
        assert 0.05 < row["ratio"] < 5
        rates = row["joint_targets_per_s"], row["apart_targets_per_s"]
        assert row["ratio"] == pytest.approx(rates[0] / rates[1], rel=0.01)
        assert row["loopback_mb_per_step"] == pytest.approx(row["model_mb_per_step"], rel=0.25)
