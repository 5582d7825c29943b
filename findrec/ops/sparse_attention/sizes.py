"""Sizes of windowed, block and selective attention. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from findrec.errors import FindRecError


@dataclass(frozen=True)
class SparseSizes:
    """Sizes in steps, with the symbols of Native Sparse Attention (arXiv 2502.11089, section 3.3).

    Attributes:
        block: length l of the blocks that are compressed to one key and value each.
        stride: distance d between the first steps of two compressed blocks.
        selected_block: length l' of the blocks that are selected and attended to step by step.
        selected: number n of blocks selected for a query.
        window: number w of latest steps of the window, the query's own step included.
        share: number of consecutive queries that attend to the same selection, made by the first of them;
            1 in the paper. Keys are gathered once for all of them. Must divide `selected_block`.
    """

    block: int
    stride: int
    selected_block: int
    selected: int
    window: int
    share: int = 1

    def __post_init__(self) -> None:
        """Raises `FindRecError` for sizes that are not positive or do not divide each other."""
        for name, value in vars(self).items():
            if value < 1:
                raise FindRecError(f"sparse attention: {name}={value} must be at least 1 step or block")
        for name in ("block", "selected_block"):
            if vars(self)[name] % self.stride:
                raise FindRecError(
                    f"sparse attention: {name}={vars(self)[name]} must be a multiple of stride={self.stride}"
                )
        if self.selected_block % self.share:
            raise FindRecError(
                f"sparse attention: share={self.share} must divide selected_block={self.selected_block}, so "
                "that the queries of one selection are in one block"
            )

    def num_blocks(self, length: int) -> int:
        """Number of whole compressed blocks of a sequence of `length` steps."""
        return max(0, (length - self.block) // self.stride + 1)

    def num_selectable(self, length: int) -> int:
        """Number of blocks that can be selected; the last one may be incomplete."""
        return -(-length // self.selected_block)


def sizes_for(length: int) -> SparseSizes:
    """Sizes for sequences of up to `length` steps: each query sees a fraction that falls with the length."""
    for longest, sizes in _PRESETS:
        if length <= longest:
            return sizes
    return _LONG


_PRESETS = (
    (64, SparseSizes(block=8, stride=8, selected_block=8, selected=3, window=16, share=8)),
    (512, SparseSizes(block=16, stride=8, selected_block=16, selected=4, window=32, share=16)),
    (2048, SparseSizes(block=32, stride=16, selected_block=32, selected=8, window=64, share=32)),
)
_LONG = SparseSizes(block=32, stride=16, selected_block=64, selected=16, window=128, share=64)
