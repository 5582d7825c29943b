"""Sampled catalogue losses: draws negatives and computes the loss from their vectors.

Negatives are drawn for each microbatch from its generator, so they do not depend on the worker that runs it
nor on the placement of the table.

Shape letters: T tokens, S samples, n distinct ids read by the loss, V items, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.config import LossConfig
from findrec.devices import copy_to, is_cpu
from findrec.ops.losses.distinct import distinct_integers
from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.ops.losses.sampled_cross_entropy import generalised_bce, sampled_cross_entropy


class Negatives:
    """Sampled softmax or gBCE over `num_items` items, or those selected by `classes` (bool `[V + 1]`)."""

    def __init__(
        self,
        loss: LossConfig,
        num_items: int,
        *,
        train_count: Tensor | None,
        classes: Tensor | None,
        device: torch.device | str,
    ) -> None:
        self._loss, self._num_items, self._classes, self._device = loss, num_items, classes, device
        self._num_classes = num_items if classes is None else int(classes[1:].sum())
        self._class_ids = None if classes is None else 1 + classes[1:].nonzero()[:, 0]
        self._cumulative: Tensor | None = None  # [V + 1] float64, cumulative proposal distribution
        if loss.kind != "sampled":
            return
        if train_count is None:
            raise ValueError("the sampled loss draws negatives by popularity, so it needs train_count")
        # Between popularity (good for frequent items) and uniform (limits the importance weights).
        proposal = train_count.to(torch.float64).add_(1.0).pow_(loss.popularity_power)
        proposal[0] = 0.0
        if classes is not None:
            proposal[~classes] = 0.0
        self._cumulative = proposal.div_(proposal.sum()).cumsum_(0)
        self._cumulative /= self._cumulative[-1].clone()

    def draw(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Draw negatives `[S]` and, for the sampled softmax, logs of their expected counts `[S]` (float64).

        The sampled softmax draws with replacement from the proposal, gBCE uniformly without replacement.
        """
        num = self._loss.negatives
        if self._cumulative is None and not is_cpu(self._device):
            # To permute the catalogue takes longer than a microbatch on a GPU. On a CPU it gives the
            # negatives that it has always given.
            drawn = distinct_integers(self._num_classes, num, generator)
            ids = drawn + 1 if self._class_ids is None else self._class_ids[drawn]
            return copy_to(ids, self._device), None
        if self._cumulative is None:
            pool = torch.arange(1, self._num_items + 1)
            if self._classes is not None:
                pool = pool[self._classes[1:]]
            return pool[torch.randperm(len(pool), generator=generator)[:num]].to(self._device), None
        # Equivalent to `torch.multinomial`, which would sum over the catalogue in each call and refuses more
        # than 2**24 items.
        uniform = torch.rand(num, dtype=torch.float64, generator=generator)
        drawn = torch.searchsorted(self._cumulative, uniform, right=True)
        expected = (self._cumulative[drawn] - self._cumulative[drawn - 1]) * num
        return copy_to(drawn, self._device), copy_to(expected.log(), self._device)

    def loss(
        self,
        h: Tensor,
        vectors_nd: Tensor,
        ids_n: Tensor,
        target_T: Tensor,
        drawn: tuple[Tensor, Tensor | None],
        repeat: RepeatBonus | None,
    ) -> Tensor:
        """The loss summed over tokens; `ids_n`, ascending, are all ids used, `vectors_nd` their vectors."""
        sample_S, log_expected_S = drawn
        wanted = [target_T, sample_S]
        if log_expected_S is not None and repeat is not None:
            wanted.append(repeat.ids_BN)
        target_Td, sample_Sd, *candidate = _vectors_of(wanted, ids_n, vectors_nd)
        if log_expected_S is None:
            return generalised_bce(
                h,
                target_Td,
                sample_Sd,
                target_T,
                sample_S,
                num_items=self._num_classes,
                calibration=self._loss.calibration,
                repeat=repeat,
            )
        log_expected_S = log_expected_S.to(h.dtype) if self._loss.correct_sampling else None
        return sampled_cross_entropy(
            h,
            target_Td,
            sample_Sd,
            target_T,
            sample_S,
            log_expected_S,
            repeat=repeat,
            candidate_row_BNd=candidate[0] if candidate else None,
        )


def _vectors_of(wanted: Sequence[Tensor], ids_n: Tensor, vectors_nd: Tensor) -> list[Tensor]:
    """The vectors `[..., d]` of each of several tensors of ids."""
    if is_cpu(ids_n.device):
        return [F.embedding(torch.searchsorted(ids_n, ids), vectors_nd) for ids in wanted]
    # One lookup, and one gradient, on a GPU: each kernel takes as long for one of them as for all.
    joined = torch.cat([ids.flatten() for ids in wanted])
    found = F.embedding(torch.searchsorted(ids_n, joined), vectors_nd)
    parts = torch.split(found, [ids.numel() for ids in wanted])
    return [part.view(*ids.shape, -1) for part, ids in zip(parts, wanted, strict=True)]
