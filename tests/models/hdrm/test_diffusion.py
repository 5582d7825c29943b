"""The diffusion against its equations in float64: noise levels, restricted noise, sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from findrec.errors import FindRecError
from findrec.models.configs import choose_model
from findrec.models.hdrm.config import DiffusionConfig
from findrec.models.hdrm.denoiser import Denoiser
from findrec.models.hdrm.diffusion import Diffusion
from findrec.schema import validate

WIDTH, STEPS = 7, 20


def made(**keys: Any) -> Diffusion:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(WIDTH, generator=generator)
    deviation = torch.rand(WIDTH, generator=generator) + 0.5
    return Diffusion(DiffusionConfig(steps=STEPS, sampling_steps=5, **keys), mean, deviation)


def vectors(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def plain_noise(diffusion: Diffusion, normal: Tensor, like: Tensor) -> Tensor:
    """The noise, one vector and one coordinate at a time."""
    if diffusion.config.noise == "isotropic":
        return normal.double()
    result = torch.zeros_like(normal, dtype=torch.float64)
    for row, values in enumerate(normal.double()):
        mean, variance = values.mean(), values.var(correction=0)
        for k in range(WIDTH):
            scaled = diffusion.mean_d[k] + diffusion.deviation_d[k] * (values[k] - mean) / math.sqrt(
                variance + 1e-5
            )
            result[row, k] = abs(scaled) * (-1 if like[row, k] < 0 else 1)
    return result


def plain_levels(step: int, last_signal: float, radial: float) -> tuple[float, float]:
    angle = step / STEPS * math.acos(math.sqrt(last_signal))
    return math.cos(angle) + radial * math.tanh(step / STEPS), math.sin(angle)


@pytest.mark.parametrize("noise", ["directed", "isotropic"])
@pytest.mark.parametrize("radial", [0.0, 0.3])
def test_noised_vectors_are_those_of_the_equations(noise: str, radial: float) -> None:
    diffusion = made(noise=noise, radial=radial, last_signal=0.04)
    x, normal = vectors(STEPS), vectors(STEPS, seed=2)
    step = torch.arange(1, STEPS + 1)
    want = torch.stack(
        [
            signal * one.double() + level * noise_of_one
            for one, noise_of_one, (signal, level) in zip(
                x,
                plain_noise(diffusion, normal, x),
                [plain_levels(int(t), 0.04, radial) for t in step],
                strict=True,
            )
        ]
    )
    torch.testing.assert_close(diffusion.noised(x, step, normal).double(), want, rtol=1e-5, atol=1e-6)
    signal, level = plain_levels(STEPS, 0.04, 0.0)
    assert signal**2 == pytest.approx(0.04)
    assert signal**2 + level**2 == pytest.approx(1)
    ratio = torch.tensor([(a / b) ** 2 for a, b in (plain_levels(int(t), 0.04, radial) for t in step)])
    torch.testing.assert_close(diffusion.weight(step), ratio.clamp(max=5) / 5, rtol=1e-4, atol=0)


def test_directed_noise_keeps_vectors_in_their_orthant_and_isotropic_noise_does_not() -> None:
    x, normal = vectors(400), vectors(400, seed=2)
    for step in (1, STEPS // 2, STEPS):
        steps = torch.full((400,), step)
        assert torch.equal(made().noised(x, steps, normal).sign(), x.sign())
    last = torch.full((400,), STEPS)
    kept = made(noise="isotropic").noised(x, last, normal).sign() == x.sign()
    assert 0.4 < kept.float().mean() < 0.8


def test_the_radial_term_preserves_the_order_of_distances_from_the_origin() -> None:
    """The correlation of the norms before and after the noise, at the last step."""
    x = vectors(2000) * torch.rand(2000, 1, generator=torch.Generator().manual_seed(3)) * 2
    last = torch.full((2000,), STEPS)

    def correlation(radial: float) -> float:
        noised = made(radial=radial, noise="isotropic").noised(x, last, vectors(2000, seed=2))
        return float(torch.corrcoef(torch.stack([x.norm(dim=1), noised.norm(dim=1)]))[0, 1])

    assert correlation(0.0) < 0.3
    assert correlation(1.0) > correlation(0.5) + 0.1 > correlation(0.0) + 0.2


@pytest.mark.parametrize("noise", ["directed", "isotropic"])
@pytest.mark.parametrize("steps", [1, 3, STEPS])
def test_a_perfect_denoiser_is_followed_along_the_path_of_its_vector(noise: str, steps: int) -> None:
    """Each level of the path is the noised vector of that level, with the noise of the start."""
    diffusion = made(noise=noise, radial=0.2)
    diffusion.config = diffusion.config.model_copy(update={"sampling_steps": steps})
    x, normal = vectors(30), vectors(30, seed=2)
    seen = []

    def denoise(x_nd: Tensor, step_n: Tensor) -> Tensor:
        seen.append(int(step_n[0]))
        torch.testing.assert_close(x_nd, diffusion.noised(x, step_n, normal), rtol=1e-4, atol=1e-5)
        return x

    torch.testing.assert_close(diffusion.sample(x, normal, denoise), x, rtol=1e-5, atol=1e-6)
    assert seen == diffusion.sampling_levels()
    assert (seen[0], len(seen)) == (STEPS, steps)


@pytest.mark.parametrize("noise", ["directed", "isotropic"])
def test_sampling_is_that_of_the_equations(noise: str) -> None:
    diffusion = made(noise=noise, radial=0.2, last_signal=0.04)
    guess, normal = vectors(9), vectors(9, seed=2)
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)) * 0.4

    def denoise(x_nd: Tensor, step_n: Tensor) -> Tensor:
        return x_nd @ matrix.to(x_nd.dtype) + step_n[:, None] / STEPS

    signal, level = plain_levels(STEPS, 0.04, 0.2)
    x = signal * guess.double() + level * plain_noise(diffusion, normal, guess)
    for now, following in ((20, 16), (16, 12), (12, 8), (8, 4), (4, 0)):
        estimate = denoise(x, torch.full((9,), now))
        signal, level = plain_levels(now, 0.04, 0.2)
        residue = (x - signal * estimate) / level
        if noise == "directed":
            residue = residue.abs() * torch.where(estimate < 0, -1, 1)
        signal, level = plain_levels(following, 0.04, 0.2)
        x = signal * estimate + level * residue
    torch.testing.assert_close(diffusion.sample(guess, normal, denoise).double(), x, rtol=1e-4, atol=1e-5)


def test_the_denoiser_reads_the_level_the_vector_and_the_history_it_is_allowed_to_read() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(WIDTH, 16, STEPS)
    x, history, step = vectors(4), vectors(4, seed=2), torch.tensor([1, 5, 9, 20])
    has = torch.tensor([True, False, True, False])
    plain = denoiser(x, step, history, has)
    other = denoiser(x, step, history + 1, has)
    assert torch.equal((plain != other).any(1), has)
    assert (plain != denoiser(x + 1, step, history, has)).any(1).all()
    assert (plain != denoiser(x, step - 1, history, has)).any(1).all()
    torch.testing.assert_close(denoiser(x[2:3], step[2:3], history[2:3], has[2:3]), plain[2:3])
    plain.square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_wrong_configurations_are_explained() -> None:
    with pytest.raises(FindRecError, match=r"sampling_steps=9 is more than steps=8"):
        validate(DiffusionConfig, {"steps": 8, "sampling_steps": 9}, "here")
    with pytest.raises(ValueError, match="noise"):
        choose_model({"name": "hdrm", "diffusion": {"noise": "angular"}})
