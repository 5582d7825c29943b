"""Distinct random integers, at a cost that does not grow with the range that they are drawn from."""

from __future__ import annotations

import torch
from torch import Tensor


def distinct_integers(count: int, num: int, generator: torch.Generator | None = None) -> Tensor:
    """`min(num, count)` distinct integers from 0 to `count - 1`, in random order; int64, on the CPU.

    Every ordered choice is equally likely: integers are drawn with replacement, and those drawn before are
    left out. Only where `num` is a large part of `count` all integers are permuted.
    """
    if 4 * num >= count:
        return torch.randperm(count, generator=generator)[:num]
    drawn = torch.zeros(0, dtype=torch.int64)
    while True:
        more = torch.randint(count, (num + num // 2,), generator=generator)
        drawn = torch.cat([drawn, more])
        values, which = torch.unique(drawn, return_inverse=True)
        if len(values) >= num:
            first = torch.full_like(values, len(drawn))
            first.scatter_reduce_(0, which, torch.arange(len(drawn)), "amin")
            chosen: Tensor = values[first.argsort()[:num]]
            return chosen
