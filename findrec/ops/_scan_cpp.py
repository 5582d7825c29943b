"""The fused CPU kernel of the selective scan."""

from __future__ import annotations

from torch import Tensor


def cpp_scan_problem() -> str | None:
    """Why the kernel cannot be used, or None."""
    return "the fused CPU kernel is not part of this version"


def cpp_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Never reached while `cpp_scan_problem` names one."""
    raise RuntimeError(cpp_scan_problem())
