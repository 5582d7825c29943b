"""A guard against slow kernels: each op keeps about half the lead over its baseline that was measured.

Ratios of runs that alternate, not seconds, so that another machine or a busy one says the same. Shapes are
small; `evaluation/benchmarks/ops.py` measures properly.
"""

from typing import Any

import pytest
import torch
from bench import attention, cross_entropy, model, routing, scan, sparse_attention, stein

from findrec.ops.scan.selective_scan import scan_backend
from findrec.timer import time_alternating

pytestmark = pytest.mark.slow

CASES: dict[str, Any] = {  # maker of runs, baseline, ours, shape, least ratio
    "selective_scan": (scan.make_run, "unbind", "cpp", (8, 200, 64, 16), 3.0),
    "linear_cross_entropy": (cross_entropy.make_run, "F.cross_entropy", "tiled", (512, 20_000, 64), 0.7),
    "stein_discrepancy": (stein.make_run, "reference", "tiled", (1024, 64), 1.5),
    "cross_modal_attention": (attention.make_run, "full", "window 256", (1, 1, 2048, 4, 16), 1.7),
    "sparse_attention": (sparse_attention.make_run, "dense", "sparse", (1, 2048, 4, 2, 32), 0.7),
    "expert_routing": (routing.make_run, "loops", "dense", (1600, 4, 4, 64, 32, None), 0.5),
}

# A slow kernel is slow each time; work beside the test on a shared machine is not.
ATTEMPTS = 4


@pytest.mark.parametrize("op", CASES)
def test_an_op_keeps_its_speedup(op):
    make_run, baseline, ours, shape, least = CASES[op]
    if op == "selective_scan" and scan_backend("cpu") != "cpp":
        pytest.skip("no C++ compiler here: the kernel that is guarded cannot be built")
    torch.set_num_threads(1)
    runs = {name: make_run(name, shape) for name in (baseline, ours)}
    ratio = 0.0
    for _ in range(ATTEMPTS):
        timings = time_alternating(runs, runs=7)
        ratio = max(ratio, timings[baseline].median_s / timings[ours].median_s)
        if ratio > least:
            break
    assert ratio > least, f"{op} {shape}: {ratio:.2f} times as fast as {baseline}, expected {least} or more"


def test_a_training_step_keeps_its_speedup_over_the_published_model():
    torch.set_num_threads(1)
    shape = model.Shape(16, 30, 32, 2000, (("text", 64), ("image", 64)))
    steps = {"published": model.published_step(shape), "ours": model.findrec_step(shape)}
    targets = {name: step() for name, step in steps.items()}
    timings = time_alternating(steps, runs=5, warmup=0)
    rate = {name: targets[name] / timing.median_s for name, timing in timings.items()}
    assert rate["ours"] > 20 * rate["published"]
