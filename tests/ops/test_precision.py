"""The precision of float32 products: full inside the context, and as before after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from findrec.ops.precision import allow_tf32, full_float32


def settings() -> tuple[str, bool, bool]:
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return torch.get_float32_matmul_precision(), *tf32


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[2]


@pytest.mark.parametrize("allowed", [False, True])
def test_matrix_products_and_cudnn_are_set_together(allowed: bool) -> None:
    allow_tf32(allowed)
    assert settings() == ("high" if allowed else "highest", allowed, allowed)


@pytest.mark.parametrize("allowed", [False, True])
def test_full_float32_inside_and_as_before_after_it(allowed: bool) -> None:
    allow_tf32(allowed)
    before = settings()
    a = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_float32("cpu"):
            assert settings() == ("highest", False, False)
            assert torch.equal(a @ a, torch.mm(a, a, out=torch.empty(8, 8)))
        with pytest.raises(ZeroDivisionError), full_float32("cpu"):
            raise ZeroDivisionError
        assert (a @ a).dtype == torch.bfloat16
    assert settings() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_and_recurrent_layers_on_a_gpu_are_not_rounded_to_tf32() -> None:
    torch.manual_seed(0)
    a, gru = torch.randn(256, 256), torch.nn.GRU(256, 256, batch_first=True)
    want = [(a.double() @ a.double()), gru.double()(a.double()[None])[0]]
    allow_tf32(True)
    with full_float32("cuda"):
        got = [(a.cuda() @ a.cuda()), gru.float().cuda()(a.cuda()[None])[0]]
    for product, exact in zip(got, want, strict=True):
        torch.testing.assert_close(product.cpu().double(), exact, rtol=1e-5, atol=1e-4)
