"""Losses that align the latents of each modality to the ID vectors, and diagnostics of the alignment.

The reference is the item-table rows that enter the ID stream, without gradient. Latents have the width of the
table, so there is no projection that could learn to make a term vanish. Terms compare the distinct items of
one microbatch.

Shape letters: U distinct items of a batch, n items that have the modality, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.devices import copy_to
from findrec.models.base import Term
from findrec.models.findrec_2025.config import AlignConfig
from findrec.models.findrec_2025.latents import Latents
from findrec.models.parts.spread import spread
from findrec.ops.losses.paired_contrastive import paired_contrastive
from findrec.ops.stein.legacy_stein import legacy_stein
from findrec.ops.stein.stein_discrepancy import median_bandwidth2, mmd, stein_discrepancy


class Alignment(nn.Module):
    """The terms configured by `model.align`. Only `legacy` has weights: its score networks."""

    def __init__(self, config: AlignConfig, modalities: list[str], dim: int) -> None:
        super().__init__()
        self.config = config
        streams = ["id", *modalities] if config.kind == "legacy" and modalities else []
        self.scores = nn.ModuleDict({name: _score_network(dim) for name in streams})

    def forward(self, latents: Mapping[str, Latents], x_items_Ud: Tensor) -> dict[str, Term]:
        """Terms by name: `<kind>_<modality>`, `paired_<modality>`, `kl_<modality>`."""
        config, terms = self.config, {}
        for name, latent in latents.items():
            z_nd, reference_nd = sample_pairs(latent, x_items_Ud, config.rows)
            if config.kind != "none":
                value = self._discrepancy(name, z_nd, reference_nd)
                terms[f"{config.kind}_{name}"] = Term(config.weight * value, value.detach())
            if config.paired_weight > 0:
                paired = paired_contrastive(z_nd, reference_nd, temperature=config.paired_temperature)
                terms[f"paired_{name}"] = Term(config.paired_weight * paired, paired.detach())
            terms[f"kl_{name}"] = prior_term(latent, config)
        return terms

    def _discrepancy(self, name: str, z_nd: Tensor, reference_nd: Tensor) -> Tensor:
        if self.config.kind == "mmd":
            return mmd(z_nd, reference_nd)
        if self.config.kind == "legacy":
            scores = self.scores[name](z_nd), self.scores["id"](reference_nd)
            return legacy_stein(z_nd, scores[0], reference_nd, scores[1])
        return stein_discrepancy(z_nd, reference_nd, score=self.config.score, kernel=self.config.kernel)


def _score_network(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def sample_pairs(latents: Latents, x_items_Ud: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Latents of at most `rows` items, and the reference: the ID vectors of the same items.

    The reference is centred and divided by one number to unit mean variance, which keeps the shape of its
    covariance. This scale agrees with the N(0, I) prior, so that the terms are consistent.
    """
    present_n = latents.present_n
    if len(present_n) > rows:
        present_n = present_n[copy_to(torch.randperm(len(present_n))[:rows], present_n.device)]
    z_nd = latents.z_Ud[present_n].float()
    with torch.no_grad():
        reference_nd = x_items_Ud[present_n].float()
        if len(present_n):
            reference_nd = reference_nd - reference_nd.mean(0)
            reference_nd = reference_nd / reference_nd.square().mean().sqrt().clamp(min=1e-8)
    return z_nd, reference_nd


def prior_term(latents: Latents, config: AlignConfig) -> Term:
    """KL(N(mean, var) || N(0, I)): mean over items, at least `free_bits`, then mean over dimensions."""
    mean, logvar = latents.mean_nd, latents.logvar_nd
    kl_nd = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    kl_d = kl_nd.sum(0) / max(1, len(kl_nd))
    return Term(config.kl_weight * kl_d.clamp(min=config.free_bits).mean(), kl_d.detach().mean())


@torch.no_grad()
def diagnose_alignment(latents: Mapping[str, Latents], x_items_Ud: Tensor, rows: int) -> dict[str, Tensor]:
    """Diagnostics of the latent means of each modality, by `<name>_<modality>`.

    * `ksd`: Stein discrepancy from the ID vectors, whether or not it is a training loss;
    * `bandwidth`: bandwidth of the kernel, by the median heuristic;
    * `latent_std`: mean standard deviation over dimensions; near 0 the latents have collapsed to a point;
    * `latent_rank`: effective rank, from 1 to d; near 1 they have collapsed to a line;
    * `latent_cosine`: mean cosine between an item's latent and its ID vector, raised only by pairing.
    """
    diagnostics: dict[str, Tensor] = {}
    for name, latent in latents.items():
        means = latent._replace(z_Ud=latent.z_Ud.index_copy(0, latent.present_n, latent.mean_nd))
        z_nd, reference_nd = sample_pairs(means, x_items_Ud, rows)
        if len(z_nd) < 2:
            values = dict.fromkeys(DIAGNOSTICS, z_nd.new_zeros(()))
        else:
            centred = z_nd - z_nd.mean(0)
            cosine = torch.nn.functional.cosine_similarity(centred, reference_nd, dim=1)
            numbers = (
                stein_discrepancy(z_nd, reference_nd),
                median_bandwidth2(z_nd, reference_nd).sqrt(),
                *spread(centred),
                cosine.mean(),
            )
            values = dict(zip(DIAGNOSTICS, numbers, strict=True))
        diagnostics |= {f"{key}_{name}": value for key, value in values.items()}
    return diagnostics


DIAGNOSTICS = {
    "ksd": "the Stein discrepancy from the ID vectors (0: the same distribution)",
    "bandwidth": "the bandwidth of its kernel",
    "latent_std": "the mean standard deviation of the latents (near 0: collapsed to a point)",
    "latent_rank": "the effective rank of the latents (near 1: collapsed to a line)",
    "latent_cosine": "the mean cosine between an item's latent and its ID vector",
}
