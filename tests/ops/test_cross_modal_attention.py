"""Both directions of the cross-modal attention against an explicit masked softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from findrec.ops.cross_modal_attention import cross_modal_attention


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, L, H, h]` each: causal softmax attention with the whole weight matrix."""
    length, width = q.shape[1], q.shape[3]
    logits = torch.einsum("blhc,bmhc->bhlm", q, k) * width**-0.5
    later = torch.ones(length, length).triu(1).bool()
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("bhlm,bmhc->blhc", weights, v)


@pytest.mark.parametrize("num_modal", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 19])
def test_equals_explicit_attention(num_modal: int, length: int) -> None:
    torch.manual_seed(0)
    ids = torch.randn(2, length, 3, 4, 5).double().requires_grad_()
    modal = torch.randn(num_modal, 2, length, 3, 4, 5).double().requires_grad_()
    reads_id, reads_modal = cross_modal_attention(ids, modal)
    q, k, v = ids.unbind(2)
    expected_id, expected_modal = [], []
    for one in modal:
        mq, mk, mv = one.unbind(2)
        expected_id.append(explicit(mq, k, v))
        expected_modal.append(explicit(q, mk, mv))
    assert torch.allclose(reads_id, torch.stack(expected_id))
    assert torch.allclose(reads_modal, torch.stack(expected_modal))
    weights = torch.randn_like(reads_id), torch.randn_like(reads_id)
    found = torch.autograd.grad((reads_id * weights[0] + reads_modal * weights[1]).sum(), (ids, modal))
    loss = (torch.stack(expected_id) * weights[0] + torch.stack(expected_modal) * weights[1]).sum()
    for a, b in zip(found, torch.autograd.grad(loss, (ids, modal)), strict=True):
        assert torch.allclose(a, b)


def test_neither_the_future_nor_other_users_are_seen() -> None:
    torch.manual_seed(0)
    ids, modal = torch.randn(2, 9, 3, 2, 4), torch.randn(2, 2, 9, 3, 2, 4)
    before = cross_modal_attention(ids, modal)
    ids[:, 5:], modal[:, :, 5:] = 7.0, -3.0
    ids[1], modal[:, 1] = 2.0, 1.0
    for a, b in zip(before, cross_modal_attention(ids, modal), strict=True):
        assert torch.allclose(a[:, 0, :5], b[:, 0, :5], atol=1e-6)
        assert not torch.allclose(a[:, 0, 5:], b[:, 0, 5:], atol=1e-2)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="expected id_qkv"):
        cross_modal_attention(torch.randn(2, 5, 3, 2, 4), torch.randn(1, 2, 6, 3, 2, 4))
