"""The microbatch of sequence models: right-padded histories and their target positions.

Shape letters: B users, L padded length, T target positions, U distinct items, M one modality's width, N
distinct items of one user.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from findrec.devices import copy_all_to


@dataclass(frozen=True)
class Batch:
    """One planned microbatch (training) or a block of users (evaluation).

    Right padding cannot reach a valid position because every model is causal, so there is no mask.
    """

    item: Tensor  # [B, L] int64, 1-based item ids, 0 is padding
    length: Tensor  # [B] int64, valid positions of each row, at least 1
    user: Tensor  # [B] int64, row of the user in the data folder
    gap: Tensor | None  # [B, L] int64, log2 bucket of seconds since the previous event, 0 first/pad
    position: Tensor  # [T] int64, flat index b * L + l of each target position, ascending
    target: Tensor  # [T] int64, the item that follows each position; empty at evaluation
    ids: Tensor  # [U] int64, distinct ids in `item`, ascending; ids[0] == 0 (padding) always
    index: Tensor  # [B, L] int64, index of each item in `ids`
    event: Tensor | None = None  # [B, L] int64, 2 + code of the event's type; 1 unknown, 0 padding
    wait: Tensor | None = None  # [T] int64, log2 bucket of the seconds from a position to its query
    time: Tensor | None = None  # [B, L] int64, seconds since 1970 of each event, 0 padding
    query_time: Tensor | None = None  # [T] int64, seconds since 1970, when a target position predicts
    target_index: Tensor | None = None  # [T] int64, index of each target in `ids`; see `with_targets`

    @staticmethod
    def build(
        item: Tensor,
        length: Tensor,
        user: Tensor,
        position: Tensor,
        target: Tensor,
        gap: Tensor | None = None,
        wait: Tensor | None = None,
        event: Tensor | None = None,
        time: Tensor | None = None,
        query_time: Tensor | None = None,
    ) -> Batch:
        """Fill in `ids` and `index` from `item`."""
        flat = torch.cat([item.new_zeros(1), item.reshape(-1)])
        ids, index = torch.unique(flat, return_inverse=True)
        return Batch(
            item=item,
            length=length,
            user=user,
            gap=gap,
            position=position,
            target=target,
            ids=ids,
            index=index[1:].view_as(item),
            event=event,
            wait=wait,
            time=time,
            query_time=query_time,
        )

    def with_targets(self) -> Batch:
        """The same batch with the targets among `ids`, for models that compare vectors with them."""
        if self.target_index is not None:
            return self
        ids, index = torch.unique(torch.cat([self.ids, self.target]), return_inverse=True)
        of_ids, of_target = index.split([len(self.ids), len(self.target)])
        return replace(self, ids=ids, index=of_ids[self.index], target_index=of_target)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        values = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **copy_all_to(values, device))
