"""Build right-padded batches with their target positions from histories.

`cpp` fills all tensors in one pass over the events and finds the distinct ids with a bitmap of the catalogue
instead of sorting, so a batch costs about as much as copying it. `reference` is the same in numpy.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder._native import Impl, PadArgs, contiguous_int64, native, pointer
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.splits import Int64Array

LARGEST_GAP = 31


def gap_buckets(timestamp: Int64Array, offset: Int64Array) -> Int64Array:
    """`[N]` log2 bucket of the time since the previous event: `1 + floor(log2(1 + seconds))`, at most 31.

    0 marks padding and the first event of a history.
    """
    seconds = np.maximum(np.diff(timestamp, prepend=timestamp[:1]), 0)
    bucket = np.minimum(1 + np.floor(np.log2(1.0 + seconds)).astype(np.int64), LARGEST_GAP)
    bucket[offset[:-1][np.diff(offset) > 0]] = 0
    return bucket


def gap_bucket(seconds: int) -> int:
    """The same bucket for a single elapsed time."""
    return min(1 + math.floor(math.log2(1.0 + max(seconds, 0))), LARGEST_GAP)


def padded_batch(
    histories: Histories,
    user: Int64Array,
    num_items: int,
    *,
    skip: Int64Array | None = None,
    impl: Impl = "auto",
) -> Batch:
    """Build a batch from R histories of the users `user` `[R]`.

    With `skip` `[R]` the last event of each history is only a target, and inputs from index `skip[r]` on are
    target positions: they fill `position`, `target` (the next item), `query_time` (its time) and `wait`
    (bucket of the time until it). Without it every event is an input and these four are empty. Raises
    `ValueError` for items outside 1..num_items and for rows without input events.
    """
    held_out = 0 if skip is None else 1
    rows = len(histories.offset) - 1
    inputs_per_row = histories.offset[1:] - histories.offset[:-1] - held_out
    width = int(inputs_per_row.max()) if rows else 0
    num_targets = 0 if skip is None else int(inputs_per_row.sum() - skip.sum())
    if width < 1 or num_targets < 0:
        raise _bad_rows()
    library = native(impl)
    if library is None:
        return _reference(histories, user, num_items, skip)
    item, gap, index, time = (torch.empty(rows, width, dtype=torch.int64) for _ in range(4))
    event = None if histories.event is None else torch.empty(rows, width, dtype=torch.int64)
    position, target, wait, query_time = (torch.empty(num_targets, dtype=torch.int64) for _ in range(4))
    length = torch.empty(rows, dtype=torch.int64)
    ids = torch.empty(min(rows * width, num_items) + 1, dtype=torch.int64)
    # Kept in variables, so that their memory stays valid during the call.
    flat, times, codes = (
        contiguous_int64(histories.item),
        contiguous_int64(histories.timestamp),
        histories.event,
    )
    codes = None if codes is None else contiguous_int64(codes)
    offset, skips = contiguous_int64(histories.offset), None if skip is None else contiguous_int64(skip)
    arguments = PadArgs(
        rows=rows,
        width=width,
        held=held_out,
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
        out_time=pointer(time),
        length=pointer(length),
        ids=pointer(ids),
        position=pointer(position),
        target=pointer(target),
        wait=pointer(wait),
        query_time=pointer(query_time),
    )
    distinct = library.pad_histories(ctypes.byref(arguments))
    if distinct < 0:
        raise _bad_items(num_items) if distinct == -1 else _bad_rows()
    return Batch(
        item=item,
        length=length,
        user=torch.from_numpy(contiguous_int64(user)),
        gap=gap,
        position=position,
        target=target,
        ids=ids[:distinct],
        index=index,
        event=event,
        wait=wait,
        time=time,
        query_time=query_time,
    )


def _bad_rows() -> ValueError:
    return ValueError("every row of a batch needs an input event, and skip must not exceed its input events")


def _bad_items(num_items: int) -> ValueError:
    return ValueError(f"items of a batch must lie in 1..{num_items}")


def _reference(histories: Histories, user: Int64Array, num_items: int, skip: Int64Array | None) -> Batch:
    histories = histories.from_zero()
    inputs_per_row = np.diff(histories.offset) - (0 if skip is None else 1)
    if inputs_per_row.min() < 1 or (skip is not None and np.any((skip < 0) | (skip > inputs_per_row))):
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

    empty = torch.zeros(0, dtype=torch.int64)
    batch = Batch.build(
        item=spread(inputs.item),
        length=torch.from_numpy(length),
        user=torch.from_numpy(contiguous_int64(user)),
        position=empty,
        target=empty,
        gap=spread(gap_buckets(inputs.timestamp, offset)),
        event=None if inputs.event is None else spread(inputs.event + 2),  # 0 padding, 1 unknown
        wait=empty,
        time=spread(inputs.timestamp),
        query_time=empty,
    )
    if skip is None:
        return batch
    is_target = within >= skip[row]
    next_event = np.delete(np.arange(len(histories.item)), histories.offset[:-1])[is_target]
    return replace(
        batch,
        position=torch.from_numpy((row * width + within)[is_target]),
        target=torch.from_numpy(histories.item[next_event].astype(np.int64)),
        wait=torch.from_numpy(gap_buckets(histories.timestamp, histories.offset)[next_event]),
        query_time=torch.from_numpy(histories.timestamp[next_event].astype(np.int64)),
    )
