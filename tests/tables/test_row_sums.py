"""Sums over repeated rows, and what the tables ask of a GPU: no sum in an unfixed order, no wait of the host.

On a fake CUDA device PyTorch computes shapes only. With `like_a_gpu`, a CPU computes with the operations
that a GPU is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from findrec.config import LossConfig, OptimConfig
from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.tables import row_sums
from findrec.tables.exchange import Shards
from findrec.tables.local_rows import LocalRows
from findrec.tables.row_sums import add_rows_
from findrec.tables.sharded_loss import sharded_cross_entropy
from findrec.tables.sharded_table import ShardedItemTable
from findrec.tables.table_spec import TableSpec


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sums, "is_cpu", lambda _: False)


class Operations(TorchDispatchMode):
    """The names of the operations that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operations() -> Iterator[Operations]:
    with FakeTensorMode(), Operations() as mode:
        yield mode


@pytest.mark.parametrize(("rows", "added"), [(1, 0), (1, 9), (5, 40), (50, 7)])
def test_repeated_rows_add_up(like_a_gpu: None, rows: int, added: int) -> None:
    g = torch.Generator().manual_seed(rows)
    total, values = torch.randn(rows, 3, generator=g), torch.randn(added, 3, generator=g)
    index = torch.randint(rows, (added,), generator=g)
    want = total.double()
    for at, value in zip(index.tolist(), values, strict=True):
        want[at] += value
    torch.testing.assert_close(add_rows_(total, index, values), want.float(), rtol=1e-5, atol=1e-6)


def test_on_a_gpu_no_sum_over_repeated_rows_is_made_in_an_unfixed_order(operations: Operations) -> None:
    index, grad = (torch.zeros(4, dtype=torch.int64, device="cuda"), torch.ones(4, 3, device="cuda"))
    rows = LocalRows(torch.zeros(5, 3, device="cuda"), first=0, num_rows=5, lazy=False, optim=OptimConfig())
    rows.add(index, grad)
    add_rows_(torch.zeros(5, 3, device="cuda"), index, grad)
    assert not [name for name in operations.names if "index_add" in name or "scatter_add" in name]
    assert operations.names.count("aten::index_put_") == 2


def test_on_a_gpu_the_sharded_loss_makes_the_host_wait_for_nothing(like_a_gpu: None) -> None:
    """On PyTorch's device without memory, every value that the host would need is an error."""
    h, rows = torch.zeros(6, 3, device="meta"), torch.zeros(9, 3, device="meta")
    ids = torch.ones(6, dtype=torch.int64, device="meta")
    repeat = RepeatBonus(ids.view(3, 2), ids, torch.ones(6, 2, device="meta") > 0, h[:, :2])
    with Operations() as operations:
        loss = sharded_cross_entropy(
            *(Shards(9), h, rows, ids, torch.zeros_like(rows)),
            share=0.5,
            blocked=ids[:1],
            repeat=repeat,
            tile_bytes=1 << 20,
        )
    assert loss.dh_Td.shape == h.shape
    assert not [name for name in operations.names if "index_add" in name]


def loss_of_a_table(kind: str) -> dict[str, Tensor]:
    """Two microbatches and a step of a sharded table."""
    spec = TableSpec(
        *(20, 4),
        seed=3,
        loss=LossConfig(kind=kind, negatives=8),
        optim=OptimConfig(),
        train_count=torch.ones(21),
    )
    table, g = ShardedItemTable(spec), torch.Generator().manual_seed(1)
    results = {}
    for microbatch in range(2):
        h, target = torch.randn(12, 4, generator=g), torch.randint(1, 21, (12,), generator=g)
        loss = table.catalogue_loss(h, target, 24, generator=g)
        results |= {f"loss/{microbatch}": loss.loss, f"dh/{microbatch}": loss.dh}
    results["norm"] = torch.tensor(table.step(0.1))
    return results | {name: value.clone() for name, value in table.state().items()}


@pytest.mark.parametrize("kind", ["exact", "sampled", "gbce"])
def test_the_forms_for_a_gpu_give_the_results_of_those_for_a_cpu(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = loss_of_a_table(kind)
    monkeypatch.setattr(row_sums, "is_cpu", lambda _: False)
    got = loss_of_a_table(kind)
    monkeypatch.undo()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_take_the_way_of_the_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request for rows for each lookup, and none for the gradients of the same ids."""
    made, real = [], Shards.owner

    def owner(shards: Shards, ids: Tensor) -> Tensor:
        made.append(len(ids))
        return real(shards, ids)

    monkeypatch.setattr(Shards, "owner", owner)
    table = ShardedItemTable(TableSpec(20, 4, seed=3, loss=LossConfig(), optim=OptimConfig()))
    ids = torch.tensor([3, 7])
    table.lookup(ids)
    table.push(ids, torch.ones(2, 4))
    table.push(ids.clone(), torch.ones(2, 4))  # other ids of the same values
    assert len(made) == 2
    assert table._local.dense_gradient[[3, 7]].eq(2).all()
    del ids
    assert not table._routes


def on_gpu(function: Callable[[], None]) -> Callable[[], None]:
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(missing(function))


@on_gpu
def test_sums_on_a_gpu_have_the_same_bits_every_time() -> None:
    g = torch.Generator().manual_seed(0)
    index, values = (
        torch.randint(50, (100_000,), generator=g).cuda(),
        torch.randn(100_000, 32, generator=g).cuda(),
    )
    first = add_rows_(torch.zeros(50, 32, device="cuda"), index, values)
    for _ in range(20):
        assert torch.equal(first, add_rows_(torch.zeros(50, 32, device="cuda"), index, values))
    want = torch.zeros(50, 32, dtype=torch.float64).index_add_(0, index.cpu(), values.cpu().double())
    torch.testing.assert_close(first.cpu().double(), want, rtol=1e-3, atol=1e-2)
