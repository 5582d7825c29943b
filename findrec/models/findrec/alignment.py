"""Alignment of the memories in item rows with the latents of the items' content, and its diagnostics.

The kernelised Stein discrepancy compares a sample with a density through the density's score. Applied to the
clouds of latents and of id vectors (the marginals), as in the public code of FindRec, it never relates an
item's content to the same item's row, and has no effect on the ranking (evaluation/findings.md). Here it is
conditional on the item: the residual r_i = memory_i - latent_i of every item is compared with N(0, s^2 I),
with the kernel 1[i = j] k(r_i, r_j) over pairs of an item and its residual. The discrepancy, a mean over
pairs, is then

    KSD^2 = 1/n^2  sum_i  |s(r_i)|^2 + const  =  1/n^2  sum_i  |r_i|^2 / s^4 + const

so its minimisation is a regression, item by item, without an n x n matrix. Smoother kernels over items were
no better when narrow and as useless as the marginal one when wide (evaluation/findings.md).

Latents are the target: they are trained by the ranking loss, and gradients reach the memories only.

Shape letters: U distinct items of a batch, n items with events and content, d width, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from findrec.devices import copy_to
from findrec.models.base import Term
from findrec.models.findrec.config import AlignConfig
from findrec.models.findrec.items import Rows
from findrec.models.parts.spread import spread
from findrec.ops.stein.stein_discrepancy import mmd, stein_discrepancy
from findrec.tables.initial_rows import TABLE_STD


def alignment_terms(
    rows: Rows, latents: Mapping[str, Tensor], present_U: Mapping[str, Tensor], config: AlignConfig
) -> dict[str, Term]:
    """The auxiliary losses `align_<modality>`; `present_U` are the items that have the modality."""
    if config.kind == "none":
        return {}
    if config.kind == "conditional":
        values = _conditional(rows, latents, present_U)
    else:
        values = {}
        for name, latent_Ud in latents.items():
            use_n = _sample(present_U[name] & rows.known_n, config.rows)
            # At unit variance, for which the bandwidths are numerically well chosen.
            unit = latent_Ud.shape[1] ** 0.5 / TABLE_STD
            memory_nd, latent_nd = rows.memory_nd[name][use_n] * unit, latent_Ud[use_n].detach() * unit
            discrepancy = stein_discrepancy if config.kind == "marginal" else mmd
            values[name] = discrepancy(memory_nd, latent_nd)
    return {f"align_{name}": Term(config.weight * value, value.detach()) for name, value in values.items()}


def _conditional(
    rows: Rows, latents: Mapping[str, Tensor], present_U: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean squared residuals of the items to use, in units of the initial variance of item vectors."""
    if not latents:
        return {}
    # Modalities together: each kernel of a GPU takes as long for one as for all of them.
    memory_MUd = torch.stack([rows.memory_nd[name] for name in latents])
    latent_MUd = torch.stack([latent_Ud.detach() for latent_Ud in latents.values()])
    use_MU = torch.stack([present_U[name] for name in latents]) & rows.known_n
    residual_MU = (memory_MUd - latent_MUd).square().sum(2) / TABLE_STD**2
    value_M = (residual_MU * use_MU).sum(1) / use_MU.sum(1).clamp(min=1)
    return dict(zip(latents, value_M.unbind(), strict=True))


def _sample(use_U: Tensor, rows: int) -> Tensor:
    """Indices of at most `rows` of the items to use."""
    use_n = use_U.nonzero().squeeze(1)
    if len(use_n) <= rows:
        return use_n
    return use_n[copy_to(torch.randperm(len(use_n))[:rows], use_n.device)]


@torch.no_grad()
def diagnose_alignment(
    rows: Rows, latents: Mapping[str, Tensor], present_U: Mapping[str, Tensor], config: AlignConfig
) -> dict[str, Tensor]:
    """The values of `DIAGNOSTICS` for each modality, by `<name>_<modality>`, for the items of a batch."""
    diagnostics: dict[str, Tensor] = {}
    for name, latent_Ud in latents.items():
        use_n = _sample(present_U[name] & rows.known_n, config.rows)
        z_nd, memory_nd = latent_Ud[use_n].float(), rows.memory_nd[name][use_n].float()
        if len(z_nd) < 2:
            values = dict.fromkeys(DIAGNOSTICS, z_nd.new_zeros(()))
        else:
            centred, memory_nd = z_nd - z_nd.mean(0), memory_nd - z_nd.mean(0)
            numbers = (
                stein_discrepancy(memory_nd, centred),
                *spread(centred),
                torch.nn.functional.cosine_similarity(centred, memory_nd, dim=1).mean(),
            )
            values = dict(zip(DIAGNOSTICS, numbers, strict=True))
        diagnostics |= {f"{key}_{name}": value for key, value in values.items()}
    return diagnostics


DIAGNOSTICS = {
    "ksd": "the Stein discrepancy of the memories from the latents (0: the same distribution)",
    "latent_std": "the mean standard deviation of the latents (near 0: collapsed to a point)",
    "latent_rank": "the effective rank of the latents (near 1: collapsed to a line)",
    "latent_cosine": "the mean cosine between an item's latent and its memory (1: aligned)",
}
