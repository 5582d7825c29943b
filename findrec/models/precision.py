"""bfloat16 where it pays, float32 where it counts.

Weights, their gradients, the optimizer and everything that is compared or summed over a catalogue stay
float32; the products of a training pass may run in bfloat16 (torch's autocast: Micikevicius et al. 2018,
arXiv 1710.03740, without its loss scale, which bfloat16's range makes needless). Evaluation never does.
"""

from __future__ import annotations

import torch


def half_products(device: torch.device) -> torch.autocast:
    """The products below run in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16)


def full_products(device: torch.device) -> torch.autocast:
    """Those below run in the dtype of their operands, whatever is around them."""
    return torch.autocast(device.type, enabled=False)
