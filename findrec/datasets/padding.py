"""Histories as right-padded batches: what the model is shown and which of its positions are asked about.

One walk over the events fills all tensors (`cpp`). The distinct ids come from a bitmap of the catalogue, not
from sorting: a batch costs about as much as copying it. `reference` says the same in numpy and torch.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from findrec.datasets._native import Impl, PadArgs, dense, native, pointer
from findrec.datasets.batch import Batch
from findrec.datasets.histories import Histories
from findrec.datasets.splits import Int64Array

LARGEST_GAP = 31


def gap_buckets(timestamp: Int64Array, offset: Int64Array) -> Int64Array:
    """`[N]` time since the event before, in buckets that double: `1 + floor(log2(1 + seconds))`, at most 31.

    0 marks the first event shown of a history (what came before it is not known to the model) and padding.
    """
    seconds = np.maximum(np.diff(timestamp, prepend=timestamp[:1]), 0)
    bucket = np.minimum(1 + np.floor(np.log2(1.0 + seconds)).astype(np.int64), LARGEST_GAP)
    bucket[offset[:-1][np.diff(offset) > 0]] = 0
    return bucket


def gap_bucket(seconds: int) -> int:
    """The bucket of `gap_buckets` for one time that has passed."""
    return min(1 + math.floor(math.log2(1.0 + max(seconds, 0))), LARGEST_GAP)


def padded_batch(
    histories: Histories,
    user: Int64Array,
    num_items: int,
    *,
    skip: Int64Array | None = None,
    impl: Impl = "auto",
) -> Batch:
    """The batch that shows R histories of the users `user` `[R]`.

    With `skip` `[R]` the last event of each is held back and shown events from the `skip[r]`-th on are asked
    for: `position`, `target` (the event after) and `wait` (the bucket of the time to it). Without it every
    event is shown and these three are empty, for the caller to fill in. Raises `ValueError` for items outside
    of 1..num_items and for a row with nothing to show.
    """
    held = 0 if skip is None else 1
    rows = len(histories.offset) - 1
    shown = histories.offset[1:] - histories.offset[:-1] - held
    width = int(shown.max()) if rows else 0
    asked = 0 if skip is None else int(shown.sum() - skip.sum())
    if width < 1 or asked < 0:
        raise _bad_rows()
    library = native(impl)
    if library is None:
        return _reference(histories, user, num_items, skip)
    item, gap, index = (torch.empty(rows, width, dtype=torch.int64) for _ in range(3))
    event = None if histories.event is None else torch.empty(rows, width, dtype=torch.int64)
    position, target, wait = (torch.empty(asked, dtype=torch.int64) for _ in range(3))
    length = torch.empty(rows, dtype=torch.int64)
    ids = torch.empty(min(rows * width, num_items) + 1, dtype=torch.int64)
    # What is read must live until the call is over.
    flat, times, codes = dense(histories.item), dense(histories.timestamp), histories.event
    codes = None if codes is None else dense(codes)
    offset, skips = dense(histories.offset), None if skip is None else dense(skip)
    arguments = PadArgs(
        rows=rows,
        width=width,
        held=held,
        num_items=num_items,
        item=pointer(flat),
        timestamp=pointer(times),
        event=pointer(codes),
        offset=pointer(offset),
        skip=pointer(skips),
        out_item=pointer(item),
        out_gap=pointer(gap),
        out_event=pointer(event),
        out_index=pointer(index),
        length=pointer(length),
        ids=pointer(ids),
        position=pointer(position),
        target=pointer(target),
        wait=pointer(wait),
    )
    distinct = library.pad_histories(ctypes.byref(arguments))
    if distinct < 0:
        raise _bad_items(num_items) if distinct == -1 else _bad_rows()
    return Batch(
        item=item,
        length=length,
        user=torch.from_numpy(dense(user)),
        gap=gap,
        position=position,
        target=target,
        ids=ids[:distinct],
        index=index,
        event=event,
        wait=wait,
    )


def _bad_rows() -> ValueError:
    return ValueError("every row of a batch needs an event to show, and skips no more than it shows")


def _bad_items(num_items: int) -> ValueError:
    return ValueError(f"items of a batch must lie in 1..{num_items}")


def _reference(histories: Histories, user: Int64Array, num_items: int, skip: Int64Array | None) -> Batch:
    histories = histories.from_zero()
    shown = np.diff(histories.offset) - (0 if skip is None else 1)
    if shown.min() < 1 or (skip is not None and np.any((skip < 0) | (skip > shown))):
        raise _bad_rows()
    if histories.item.min() < 1 or histories.item.max() > num_items:
        raise _bad_items(num_items)
    inputs = histories
    if skip is not None:
        last = np.zeros(len(histories.item), dtype=bool)
        last[histories.offset[1:] - 1] = True
        inputs = histories.take((~last).nonzero()[0], histories.offset - np.arange(len(histories.offset)))
    offset = inputs.offset
    length = np.diff(offset)
    width = int(length.max())
    row = np.repeat(np.arange(len(length)), length)
    within = np.arange(offset[-1]) - offset[row]

    def spread(values: Int64Array) -> Tensor:
        flat = np.zeros((len(length), width), dtype=np.int64)
        flat[row, within] = values
        return torch.from_numpy(flat)

    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch.build(
        item=spread(inputs.item),
        length=torch.from_numpy(length),
        user=torch.from_numpy(dense(user)),
        position=nothing,
        target=nothing,
        gap=spread(gap_buckets(inputs.timestamp, offset)),
        event=None if inputs.event is None else spread(inputs.event + 2),  # 0 padding, 1 unknown
        wait=nothing,
    )
    if skip is None:
        return batch
    asked = within >= skip[row]
    later = np.delete(np.arange(len(histories.item)), histories.offset[:-1])[asked]  # after each position
    return replace(
        batch,
        position=torch.from_numpy((row * width + within)[asked]),
        target=torch.from_numpy(histories.item[later].astype(np.int64)),
        wait=torch.from_numpy(gap_buckets(histories.timestamp, histories.offset)[later]),
    )
