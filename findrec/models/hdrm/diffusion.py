"""Diffusion of vectors with noise that preserves their direction and their distance from the origin.

With t = 0 (the vector x_0) to T (mostly noise), per coordinate

    x_t = a_t x_0 + b_t e,    a_t = cos(theta t / T) + radial tanh(t / T),    b_t = sin(theta t / T)

where `cos^2 theta = last_signal` is the share of the variance that is left of x_0 at t = T.

* Angular restriction (directed noise): `e = sign(x_0) |mean + deviation LN(n)|` for standard normal n, with
  the mean and deviation of each coordinate of the data, where `LN` normalises a vector to mean 0 and variance
  1 over its coordinates. So `x_t` has the signs of `x_0` at every t: it stays in the orthant of x_0.
  (Directional diffusion, Yang et al. 2023, arXiv 2306.13210, has the same two steps.)
* Radial restriction: the term `radial tanh(t / T) x_0` moves points outward as noise grows, so that the
  distance from the origin survives (hyperbolic geometric diffusion, Fu et al. 2024, arXiv 2405.03188).

Sampling is deterministic (DDIM, Song et al. 2021, arXiv 2010.02502) with these coefficients, so what was
added to a_t is removed again.

Shape letters: n vectors, d width, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.models.hdrm.config import DiffusionConfig


class Diffusion(nn.Module):
    """The noise levels and the noise.

    Args:
        config: its keys.
        mean_d: mean of each coordinate of the data, `[d]`.
        deviation_d: standard deviation of each coordinate, `[d]`.
    """

    signal_t: Tensor  # [T + 1] a_t
    noise_t: Tensor  # [T + 1] b_t
    mean_d: Tensor
    deviation_d: Tensor

    def __init__(self, config: DiffusionConfig, mean_d: Tensor, deviation_d: Tensor) -> None:
        super().__init__()
        self.config = config
        share_t = torch.linspace(0, 1, config.steps + 1, dtype=torch.float64)
        angle_t = share_t * torch.tensor(config.last_signal, dtype=torch.float64).sqrt().arccos()
        signal_t = angle_t.cos() + config.radial * share_t.tanh()
        for name, values in (
            ("signal_t", signal_t.float()),
            ("noise_t", angle_t.sin().float()),
            ("mean_d", mean_d),
            ("deviation_d", deviation_d),
        ):
            self.register_buffer(name, values, persistent=False)

    def restricted(self, normal_nd: Tensor, like_nd: Tensor) -> Tensor:
        """The noise `[n, d]` from standard normal numbers, for the vectors `like_nd`."""
        if self.config.noise == "isotropic":
            return normal_nd
        scaled_nd = self.mean_d + self.deviation_d * F.layer_norm(normal_nd, normal_nd.shape[-1:])
        return _with_signs(scaled_nd, like_nd)

    def noised(self, x_nd: Tensor, step_n: Tensor, normal_nd: Tensor) -> Tensor:
        """`x_t` `[n, d]` of the vectors `x_nd` at the steps `[n]`."""
        noise_nd = self.restricted(normal_nd, x_nd)
        return self.signal_t[step_n, None] * x_nd + self.noise_t[step_n, None] * noise_nd

    def weight(self, step_n: Tensor) -> Tensor:
        """`[n]` weights in (0, 1] of the reconstruction: signal-to-noise ratios, relative to their limit."""
        ratio_n = (self.signal_t[step_n] / self.noise_t[step_n]).square()
        return ratio_n.clamp(max=self.config.snr_limit) / self.config.snr_limit

    def sampling_levels(self) -> list[int]:
        """The steps at which the denoiser is evaluated: `sampling_steps` of T, ..., 1, evenly spaced."""
        steps, count = self.config.steps, self.config.sampling_steps
        return [steps - round(k * steps / count) for k in range(count)]

    def sample(
        self, guess_nd: Tensor, normal_nd: Tensor, denoise: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Vectors `[n, d]`, from guesses of them that are noised to the last step.

        `denoise(x_t, steps)` returns an estimate of `x_0`. The noise is computed from it, and if it is
        directed gets the signs of the estimate, so that the restriction holds along the path.
        """
        levels = [*self.sampling_levels(), 0]
        step_n = torch.full((len(guess_nd),), levels[0], device=guess_nd.device)
        x_nd = self.noised(guess_nd, step_n, normal_nd)
        for now, following in pairwise(levels):
            estimate_nd = denoise(x_nd, step_n.fill_(now))
            noise_nd = (x_nd - self.signal_t[now] * estimate_nd) / self.noise_t[now]
            if self.config.noise == "directed":
                noise_nd = _with_signs(noise_nd, estimate_nd)
            x_nd = self.signal_t[following] * estimate_nd + self.noise_t[following] * noise_nd
        return x_nd


def _with_signs(values: Tensor, like: Tensor) -> Tensor:
    """`|values|` with the signs of `like`; zero counts as positive."""
    return torch.where(like < 0, -values.abs(), values.abs())
