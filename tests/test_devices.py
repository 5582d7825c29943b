"""Copies between devices: those of several tensors keep names, types, shapes and values."""

import torch
from emulated_card import NAME, Counting, Counts

from findrec.devices import copy_all_to

VALUES = {
    "a": torch.arange(6).view(2, 3),
    "b": torch.linspace(0, 1, 4),
    "c": torch.zeros(0, dtype=torch.int64),
    "d": torch.arange(10).view(5, 2).t(),
    "e": torch.tensor([True, False]),
}


def copies(device: str) -> tuple[dict[str, torch.Tensor], Counts]:
    with Counting() as counting:
        there = copy_all_to(VALUES, device)
        counts, counting.counts = counting.counts, Counts()
        assert all(value.device.type == device for value in there.values())
        return {name: value.cpu() for name, value in there.items()}, counts


def test_tensors_are_copied_together(card):
    found, counts = card(copies, NAME)
    assert counts.num_kernels() == 3, counts.table()  # one for each type
    assert counts.num_waits == 0, counts.table()
    assert all(copy_all_to(VALUES, "cpu")[name] is value for name, value in VALUES.items())
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
