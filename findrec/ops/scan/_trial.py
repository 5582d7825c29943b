"""A small scan whose results are known, for implementations that come with a package or are compiled here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # u, delta, A, B, C to y


def trial(scan: Scan, device: torch.device | str) -> str | None:
    """What goes wrong in a forward and backward pass, or None.

    A missing compiler, a library of another version and a device that a package was not built for show only
    when something runs.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, 2, 1, device=device)
            u = x.clone().requires_grad_()
            y = scan(u, x, -torch.ones(1, 1, device=device), x, x)
            (du,) = torch.autograd.grad(y.sum(), u)
            found = torch.cat([y.detach().flatten(), du.flatten()])
        # h = 1, then exp(-1) h + 1: what is left of the first input counts in the second output.
        expected = found.new_tensor([1.0, 1.0 + math.exp(-1), 1.0 + math.exp(-1), 1.0])
        if torch.allclose(found, expected, rtol=1e-4):
            return None
        return f"a small scan gave {found.tolist()} instead of {expected.tolist()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
