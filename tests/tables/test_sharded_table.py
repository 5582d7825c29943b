"""Item tables on real workers against one replicated table in one process: loss, gradients, optimizer."""

import pytest
import torch
from forked import forked
from safetensors.torch import load_file
from tables_on_workers import CASES, TABLES, train, work

from findrec.tables.item_table import ItemTable


@pytest.mark.parametrize(("world", "gpu_forms"), [(1, False), (2, False), (3, False), (3, True), (4, False)])
def test_placements_on_workers_equal_one_table_in_one_process(tmp_path, world, gpu_forms):
    """Every loss with every combination of accumulation and clipping, and own items, transforms, classes."""
    want = {}
    with forked(work, world, str(tmp_path / "meeting"), str(tmp_path / "out"), gpu_forms):
        for number, case in enumerate(CASES):
            total = world * case.accumulation
            values = train(ItemTable(case.spec()), case, range(total), total)
            want |= {f"{number}/{name}": value for name, value in values.items()}
    parts = [load_file(tmp_path / f"out.{rank}") for rank in range(world)]
    compared = 0
    for key, expected in want.items():
        number, name = key.split("/", 1)
        for placement in TABLES:
            held = [
                part[f"{number}/{placement}/{name}"]
                for part in parts
                if f"{number}/{placement}/{name}" in part
            ]
            if name.startswith("table/"):
                got = torch.cat(held) if placement == "sharded" else held[0]
                assert placement == "sharded" or all(torch.equal(held[0], other) for other in held)
            elif name == "gain":
                got = torch.stack(held).sum(0)
            else:
                assert len(held) == (world if name.startswith("norm") else 1)
                got = held[0]
            title = f"{CASES[int(number)]}, {placement}, {name}"
            # Moments are small numbers, and weights follow them by an optimizer that is blind to their size.
            atol = 1e-7 if name.startswith("table/exp_avg") else 1e-5
            rtol = 1e-4 if name.startswith("table/exp_avg") else 1e-5
            torch.testing.assert_close(
                got, expected, rtol=rtol, atol=atol, msg=lambda m, title=title: f"{title}: {m}"
            )
            compared += 1
    assert compared == 2 * len(want)
