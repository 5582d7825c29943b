"""The HSTU layer and its time buckets against their equations in plain float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from findrec.models.hstu.layers import HSTULayer, Relations, look_up, time_buckets

DIM, LENGTH, LONGEST = 8, 11, 30


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt()


def bucket(seconds: int) -> int:
    return min(128, math.floor(math.log(max(1, seconds)) / 0.301))


def plain_layer(layer: HSTULayer, x_Ld: Tensor, keys: list[int] | None, queries: list[int] | None) -> Tensor:
    """One history, one event and one head at a time."""
    uvqk = [silu(layer.uvqk.weight @ normed(x)).split(DIM) for x in x_Ld]
    width, rows = DIM // layer.heads, []
    for i, x in enumerate(x_Ld):
        mixed = torch.zeros_like(x)
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            for j in range(i + 1):
                logit = uvqk[i][2][part] @ uvqk[j][3][part] + layer.position_bias.weight[i - j, 0]
                if layer.time_bias is not None:
                    assert keys is not None
                    assert queries is not None
                    logit = logit + layer.time_bias.weight[bucket(queries[i] - keys[j]), 0]
                mixed[part] += silu(logit) / LONGEST * uvqk[j][1][part]
        rows.append(x + layer.out(normed(mixed) * uvqk[i][0]))
    return torch.stack(rows)


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_layer_is_that_of_the_equations(heads: int, times: bool) -> None:
    torch.manual_seed(0)
    layer = HSTULayer(DIM, heads, LONGEST, 0.0, times=times).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x_BLd = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    key_BL = torch.randint(0, 10**5, (3, LENGTH)).cumsum(1) if times else None
    query_BL = None if key_BL is None else key_BL + torch.randint(0, 100, (3, LENGTH))
    relations = Relations.of(LENGTH, torch.device("cpu"), key_BL, query_BL)
    for b, result_Ld in enumerate(layer(x_BLd, relations)):
        keys = None if key_BL is None else key_BL[b].tolist()
        queries = None if query_BL is None else query_BL[b].tolist()
        torch.testing.assert_close(result_Ld, plain_layer(layer, x_BLd[b], keys, queries))


def test_buckets_are_logarithmic_and_bounded() -> None:
    # Not powers of the base, where rounding decides.
    seconds = [-(10**9), 0, 1, 2, 3, 59, 3600, 86_400, 31_536_000, 10**9, 10**18]
    assert time_buckets(torch.tensor(seconds)).tolist() == [bucket(s) for s in seconds]
    assert bucket(10**18) == 128
    assert bucket(1) == bucket(0) == 0


def test_weights_do_not_depend_on_the_length_of_the_batch() -> None:
    """The divisor is a constant; with the padded length as the divisor, results would depend on the batch."""
    torch.manual_seed(0)
    layer = HSTULayer(DIM, 1, LONGEST, 0.0, times=False).eval()
    x_BLd = torch.randn(2, LENGTH, DIM)
    padded_BLd = torch.cat([x_BLd, torch.randn(2, LONGEST - LENGTH, DIM)], dim=1)
    short, long = (Relations.of(n, torch.device("cpu"), None, None) for n in (LENGTH, LONGEST))
    torch.testing.assert_close(layer(x_BLd, short), layer(padded_BLd, long)[:, :LENGTH])


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 4, 4)])
def test_looked_up_numbers_and_their_gradient_are_those_of_indexing(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    table, index = torch.nn.Embedding(9, 1).double(), torch.randint(0, 8, shape)  # the last is never read
    weight = torch.randn(shape, dtype=torch.float64)
    result, want = look_up(table, index), table.weight[index, 0]
    assert torch.equal(result, want)
    gradients = [torch.autograd.grad((y * weight).sum(), table.weight)[0] for y in (result, want)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][8].any()
