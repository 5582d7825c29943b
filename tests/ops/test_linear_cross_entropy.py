"""The catalogue loss against plain PyTorch in float64, and the sampled estimate against its expectation."""

import pytest
import torch
import torch.nn.functional as F

from findrec.ops.linear_cross_entropy import OwnBonus, linear_cross_entropy, sampled_cross_entropy


def make(num_tokens, num_items, dim, dtype, own=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(num_tokens, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    table = torch.randn(num_items + 1, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(1, num_items + 1, (num_tokens,), generator=g)
    if not own:
        return h, table, target, None
    num_users = min(3, num_tokens)
    row = torch.sort(torch.randint(0, num_users, (num_tokens,), generator=g)).values
    width = min(5, num_items)
    ids = torch.stack([torch.randperm(num_items, generator=g)[:width] + 1 for _ in range(num_users)])
    ids[0, 0] = 0
    seen = (torch.rand(num_tokens, width, generator=g) < 0.6) & (ids[row] != 0)
    bonus = torch.randn(num_tokens, width, generator=g, dtype=torch.float64).to(dtype) * seen
    return h, table, target, OwnBonus(ids, row, seen, bonus.requires_grad_())


def dense_logits(h, table, own):
    logits = h @ table.t()
    if own is not None:
        logits = logits.scatter_add(1, own.ids_BN[own.row_T], own.bonus_TN)
    return logits[:, 1:]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (33, 101, 16), (64, 1000, 8)])
@pytest.mark.parametrize("tile_bytes", [1, 4000, 1 << 24])
def test_agrees_with_pytorch(shape, dtype, tol, own, tile_bytes):
    h, table, target, bonus = make(*shape, dtype, own)
    loss = linear_cross_entropy(h, table, target, own=bonus, tile_bytes=tile_bytes)
    leaves = [h, table] + ([bonus.bonus_TN] if own else [])
    grads = torch.autograd.grad(loss, leaves)
    want = F.cross_entropy(dense_logits(h, table, bonus), target - 1, reduction="sum")
    want_grads = torch.autograd.grad(want, leaves)
    torch.testing.assert_close(loss, want, rtol=tol, atol=tol)
    for got, expected in zip(grads, want_grads, strict=True):
        if own and got.shape == bonus.seen_TN.shape:
            got, expected = got * bonus.seen_TN, expected * bonus.seen_TN
        torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


def test_padding_is_no_class_and_gets_no_gradient():
    h, table, target, _ = make(9, 6, 4, torch.float64)
    linear_cross_entropy(h, table, target).backward()
    assert torch.count_nonzero(table.grad[0]) == 0
    with pytest.raises(ValueError, match="targets must lie in"):
        linear_cross_entropy(h, table, torch.zeros_like(target))


@pytest.mark.parametrize("own", [False, True])
def test_sampled_partition_function_is_unbiased(own):
    """E[exp(loss + s_target)] over draws is the full partition function, token by token."""
    h, table, target, bonus = make(6, 40, 4, torch.float64, own, seed=3)
    h, table = h.detach() * 0.5, table.detach()
    g = torch.Generator().manual_seed(1)
    q = torch.rand(41, generator=g, dtype=torch.float64) + 0.2
    q[0] = 0
    q /= q.sum()
    full = dense_logits(h, table, bonus).exp().sum(1)
    target_logit = dense_logits(h, table, bonus).gather(1, target[:, None] - 1)[:, 0]
    num_draws, estimates = 3000, torch.zeros(6, dtype=torch.float64)
    for _ in range(num_draws):
        sample = torch.multinomial(q, 16, replacement=True, generator=g)
        for t in range(6):
            one = None
            if own:
                one = OwnBonus(
                    bonus.ids_BN[bonus.row_T[t] : bonus.row_T[t] + 1],
                    torch.zeros(1, dtype=torch.int64),
                    bonus.seen_TN[t : t + 1],
                    bonus.bonus_TN[t : t + 1].detach(),
                )
            loss = sampled_cross_entropy(
                h[t : t + 1],
                table[target[t : t + 1]],
                table[sample],
                target[t : t + 1],
                sample,
                (16 * q[sample]).log(),
                own=one,
                own_row_BNd=table[one.ids_BN] if one else None,
            )
            estimates[t] += (loss + target_logit[t]).exp()
    torch.testing.assert_close(estimates / num_draws, full, rtol=0.03, atol=0.0)


def test_sampled_batches_tokens_as_one_by_one():
    h, table, target, own = make(12, 30, 4, torch.float64, True, seed=5)
    sample = torch.tensor([1, 2, 2, 3, 7, 9, 30])
    log_expected = torch.linspace(-1, 1, 7, dtype=torch.float64)
    together = sampled_cross_entropy(
        h, table[target], table[sample], target, sample, log_expected, own=own, own_row_BNd=table[own.ids_BN]
    )
    alone = 0.0
    for t in range(12):
        row = own.row_T[t]
        one = OwnBonus(
            own.ids_BN[row : row + 1],
            torch.zeros(1, dtype=torch.int64),
            own.seen_TN[t : t + 1],
            own.bonus_TN[t : t + 1],
        )
        alone += sampled_cross_entropy(
            h[t : t + 1],
            table[target[t : t + 1]],
            table[sample],
            target[t : t + 1],
            sample,
            log_expected,
            own=one,
            own_row_BNd=table[one.ids_BN],
        )
    torch.testing.assert_close(together, alone)
