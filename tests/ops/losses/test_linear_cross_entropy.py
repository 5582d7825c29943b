"""The exact catalogue loss against plain PyTorch: values, all gradients, masks, tiles and dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from findrec.ops.losses.linear_cross_entropy import RepeatBonus, linear_cross_entropy


def make(num_tokens, num_items, dim, dtype=torch.float64, repeat=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(num_tokens, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    table = torch.randn(num_items + 1, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(1, num_items + 1, (num_tokens,), generator=g)
    if not repeat:
        return h, table, target, None
    num_users = min(3, num_tokens)
    row = torch.sort(torch.randint(0, num_users, (num_tokens,), generator=g)).values
    width = min(5, num_items)
    ids = torch.stack([torch.randperm(num_items, generator=g)[:width] + 1 for _ in range(num_users)])
    ids[0, 0] = 0
    seen = (torch.rand(num_tokens, width, generator=g) < 0.6) & (ids[row] != 0)
    bonus = torch.randn(num_tokens, width, generator=g, dtype=torch.float64).to(dtype) * seen
    return h, table, target, RepeatBonus(ids, row, seen, bonus.requires_grad_())


def pytorch_loss(h, table, target, repeat=None, allowed=None):
    """What one would write: only the classes are scored, targets renumbered among them."""
    classes = torch.arange(1, len(table)) if allowed is None else allowed.nonzero()[:, 0]
    logits = h @ table.t()
    if repeat is not None:
        logits = logits.scatter_add(1, repeat.ids_BN[repeat.row_T], repeat.bonus_TN)
    return F.cross_entropy(logits[:, classes], torch.searchsorted(classes, target), reduction="sum")


def assert_same(loss, want, h, table, repeat, tol):
    leaves = [h, table] + ([repeat.bonus_TN] if repeat is not None else [])
    grads, want_grads = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (loss, want))
    if repeat is not None:  # gradients of unseen items may be anything
        grads, want_grads = ((*g[:2], g[2] * repeat.seen_TN) for g in (grads, want_grads))
    torch.testing.assert_close(loss, want, rtol=tol, atol=tol)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1000, 17), (7, 5, 3), (33, 101, 16), (64, 1000, 8)])
@pytest.mark.parametrize("rows", [0, 16, 1000])  # of a tile; 0 asks for less than one, 16 leaves a single row
@pytest.mark.parametrize("some", [False, True])
def test_agrees_with_pytorch(shape, dtype, tol, repeat, rows, some):
    h, table, target, bonus = make(*shape, dtype=dtype, repeat=repeat)
    allowed = None
    if some:
        allowed = torch.rand(len(table), generator=torch.Generator().manual_seed(1)) < 0.3
        allowed[target] = True
        allowed[0] = False
    want = pytorch_loss(h, table, target, bonus, allowed)
    tile_bytes = rows * len(table) * h.element_size()
    loss = linear_cross_entropy(h, table, target, repeat=bonus, allowed_V=allowed, tile_bytes=tile_bytes)
    assert_same(loss, want, h, table, bonus, tol)
    reference = linear_cross_entropy(h, table, target, repeat=bonus, allowed_V=allowed, impl="reference")
    assert_same(reference, want, h, table, bonus, tol)


def test_gradcheck():
    h, table, target, repeat = make(5, 7, 4, repeat=True)
    allowed = torch.ones(8, dtype=torch.bool)
    allowed[(set(range(1, 8)) - set(target.tolist())).pop()] = False

    def loss(h, table, bonus):
        again = RepeatBonus(repeat.ids_BN, repeat.row_T, repeat.seen_TN, bonus * repeat.seen_TN)
        return linear_cross_entropy(h, table, target, repeat=again, allowed_V=allowed, tile_bytes=1)

    assert torch.autograd.gradcheck(loss, (h, table, repeat.bonus_TN))


def test_only_classes_get_probability_and_gradient():
    h, table, target, _ = make(9, 6, 4)
    target = target.clamp(max=4)
    allowed = torch.tensor([True, True, True, True, True, False, True])  # padding is none, whatever is said
    linear_cross_entropy(h, table, target, allowed_V=allowed).backward()
    assert torch.equal(
        table.grad.abs().sum(1) > 0, torch.tensor([False, True, True, True, True, False, True])
    )
    with torch.no_grad():
        table[[0, 5]] = 100.0
    moved = linear_cross_entropy(h, table, target, allowed_V=allowed)
    with torch.no_grad():
        table[[0, 5]] = -100.0
    assert moved == linear_cross_entropy(h, table, target, allowed_V=allowed)


def test_wide_logits_neither_overflow_nor_vanish():
    h, table, target, _ = make(6, 50, 8, torch.float32)
    h = (h.detach() * 300).requires_grad_()  # logits of some thousands
    want = pytorch_loss(h.double(), table.double(), target)
    torch.testing.assert_close(linear_cross_entropy(h, table, target).double(), want, rtol=1e-5, atol=0.0)


def test_half_precision_is_summed_in_float32():
    h, table, target, repeat = make(300, 2000, 16, torch.bfloat16, repeat=True)
    loss = linear_cross_entropy(h, table, target, repeat=repeat, tile_bytes=0)
    exact = [x.detach().float().requires_grad_() for x in (h, table, repeat.bonus_TN)]
    repeat32 = RepeatBonus(repeat.ids_BN, repeat.row_T, repeat.seen_TN, exact[2])
    want = pytorch_loss(exact[0], exact[1], target, repeat32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0.0)
    grads = torch.autograd.grad(loss, (h, table, repeat.bonus_TN))
    for got, expected in zip(grads, torch.autograd.grad(want, exact), strict=True):
        assert got.dtype == torch.bfloat16
        free = repeat.seen_TN if got.shape == repeat.seen_TN.shape else 1.0
        torch.testing.assert_close(got.float() * free, expected * free, rtol=2**-8, atol=1e-5)


def test_autocast_does_not_lower_the_precision():
    h, table, target, _ = make(20, 30, 4, torch.float32)
    plain = torch.autograd.grad(linear_cross_entropy(h, table, target), (h, table))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch.autograd.grad(linear_cross_entropy(h, table, target), (h, table))
    for got, expected in zip(cast, plain, strict=True):
        assert torch.equal(got, expected)


def test_a_retained_graph_gives_the_same_gradients_again():
    h, table, target, _ = make(20, 30, 4, torch.float32)
    loss = linear_cross_entropy(h, table, target)
    first = torch.autograd.grad(3 * loss, (h, table), retain_graph=True)
    for got, expected in zip(torch.autograd.grad(loss, (h, table)), first, strict=True):
        torch.testing.assert_close(3 * got, expected)


def test_gradients_only_where_asked_for():
    h, table, target, _ = make(20, 30, 4)
    full = linear_cross_entropy(h, table, target)
    alone = linear_cross_entropy(h, table.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(alone, h), torch.autograd.grad(full, h))
    with torch.no_grad():
        value = linear_cross_entropy(h, table, target)
    assert value == full
    assert not value.requires_grad


def test_no_tokens_give_zero():
    h, table, _, _ = make(1, 6, 4)
    empty = linear_cross_entropy(h[:0], table, torch.zeros(0, dtype=torch.int64))
    assert empty == 0
    assert torch.count_nonzero(torch.autograd.grad(empty, table)[0]) == 0


def test_wrong_arguments_are_explained():
    h, table, target, _ = make(9, 6, 4)
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=r"targets must lie in 1\.\.6"):
            linear_cross_entropy(h, table, torch.full_like(target, wrong))
    allowed = torch.ones(7, dtype=torch.bool)
    allowed[target[0]] = False
    with pytest.raises(ValueError, match=f"{int(target[0])} among them, are not allowed"):
        linear_cross_entropy(h, table, target, allowed_V=allowed)
    for shape in (allowed[1:], allowed.float()):
        with pytest.raises(ValueError, match="must be bool of shape"):
            linear_cross_entropy(h, table, target, allowed_V=shape)
    with pytest.raises(ValueError, match="'fast' is unknown"):
        linear_cross_entropy(h, table, target, impl="fast")  # type: ignore[arg-type]
