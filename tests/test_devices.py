"""Copies between devices: those of several tensors keep names, types, shapes and values."""

from concurrent.futures import ThreadPoolExecutor

import torch
from emulated_card import MAIN, NAME, CardTensor, Counting, Counts

from findrec.devices import CopyStream, copy_all_to

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


def copied_beside() -> tuple[list[bool], list[torch.Tensor], Counts, int]:
    """Copies by a thread: whether there at once, then; cost on the main stream; reads not told of."""
    before = len(MAIN.read)
    values = {name: value for name, value in VALUES.items() if value.numel()}
    names = sorted(values)
    with Counting() as counting:
        stream = CopyStream(NAME)
        with ThreadPoolExecutor(1) as pool:
            halves = [{name: values[name] for name in part} for part in (names[:2], names[2:])]
            arriving = pool.submit(stream.copy, *halves).result()
        held = {name: value.held for name, value in arriving._there.items() if isinstance(value, CardTensor)}
        early = [torch.equal(held[name], values[name]) for name in names]
        there = arriving.arrived()
        counts = counting.counts
    told = {id(value) for value in MAIN.read[before:]}
    untold = sum(id(value) not in told for value in there.values())
    return early, [there[name].cpu() for name in names], counts, untold


def test_copies_beside_other_work_are_waited_for_by_the_gpu_alone(card):
    early, found, counts, untold = card(copied_beside)
    names = sorted(name for name, value in VALUES.items() if value.numel())
    assert not any(early), "they are on the way"
    for name, value in zip(names, found, strict=True):
        assert torch.equal(value, VALUES[name]), name
    assert counts.num_waits == counts.num_kernels() == 0, counts.table()
    assert untold == 0, "the allocator must know who reads them"
