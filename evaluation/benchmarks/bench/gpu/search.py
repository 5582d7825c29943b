"""Full-catalogue ranking against matrix products, and FAISS on the card."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from bench.gpu.kernels import fails
from bench.gpu.setting import MATMUL, Figures, Setting, row
from torch import Tensor

from findrec.evaluation.index.index import build_index
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.search.faiss_library import choose_gpus
from findrec.ops.ranking.item_rows import Impl
from findrec.ops.ranking.target_rank import target_rank

USERS, ITEMS, WIDTH, TOP = 4096, 1_000_000, 128, 100
BLOCK = 128  # users whose scores are held at a time, to plant targets
CHECKED = 8  # users whose ranks are compared with the reference


def _vectors(setting: Setting, users: int = USERS) -> tuple[Tensor, Tensor]:
    num_users, num_items, width = (48, 700, 16) if setting.small else (users, ITEMS, WIDTH)
    draw = torch.Generator().manual_seed(0)
    made = (torch.randn(n, width, generator=draw) for n in (num_users, num_items + 1))
    users_Bd, items_Vd = (vectors.to(setting.device) for vectors in made)
    return users_Bd, items_Vd


def planted_targets(users_Bd: Tensor, items_Vd: Tensor) -> Tensor:
    """A target for each user at a rank drawn log-uniformly, as of a trained model: `[B]`."""
    num_items = len(items_Vd) - 1
    deepest = min(num_items, 10_000)
    draw = torch.Generator().manual_seed(1)
    log_rank_B = torch.rand(len(users_Bd), generator=draw) * torch.tensor(float(deepest)).log()
    rank_B = log_rank_B.exp().long().clamp(0, deepest - 1).to(users_Bd.device)
    parts = []
    for lo in range(0, len(users_Bd), BLOCK):
        best_bk = (users_Bd[lo : lo + BLOCK] @ items_Vd[1:].T).topk(deepest).indices
        parts.append(1 + best_bk.gather(1, rank_B[lo : lo + BLOCK, None]).squeeze(1))
    return torch.cat(parts)


def products(users_Bd: Tensor, items_Vd: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """All scores by a product of `dtype`, in tiles of 65,536 items."""
    users, items = users_Bd.to(dtype), items_Vd[1:].to(dtype)
    spare = torch.empty(len(users), min(65_536, len(items)), device=users.device, dtype=dtype)

    def run() -> None:
        for lo in range(0, len(items), spare.shape[1]):
            some = items[lo : lo + spare.shape[1]]
            torch.mm(users, some.T, out=spare[:, : len(some)])

    return run


def bench_ranking(setting: Setting) -> Iterator[Figures]:
    """Users per second of exact ranks, with products of all scores beside it."""
    users_Bd, items_Vd = _vectors(setting)
    target_B = planted_targets(users_Bd, items_Vd)
    row_B = torch.arange(len(users_Bd), device=setting.device)
    shape = f"{len(users_Bd):,} users, {len(items_Vd) - 1:,} items, d{users_Bd.shape[1]}"
    functions: dict[str, Callable[[], object]] = {
        "product alone, bfloat16": products(users_Bd, items_Vd, torch.bfloat16),
        "product alone, float32": products(users_Bd, items_Vd, torch.float32),
    }
    impls: tuple[Impl, ...] = ("auto", "torch", "bfloat16")
    ranked = {
        f"findrec, {impl}": functools.partial(target_rank, users_Bd, items_Vd, row_B, target_B, impl=impl)
        for impl in impls
    }
    for name, rank in ranked.items():
        if (problem := fails(rank)) is not None:
            yield row(name, shape, None, "users/s", note=problem)
        else:
            functions[name] = rank
    truth, _ = target_rank(users_Bd[:CHECKED], items_Vd, row_B[:CHECKED], target_B[:CHECKED], impl="exact")
    timings = setting.time(functions, warmup=1)
    against = "product alone, bfloat16"
    for name, function in functions.items():
        seconds, note = timings[name].median_s, None
        if name in ranked:
            greater_B, _ = ranked[name]()
            note = "exact" if torch.equal(greater_B[:CHECKED], truth) else "WRONG RANKS"
        flops = 2 * len(users_Bd) * (len(items_Vd) - 1) * users_Bd.shape[1]
        yield row(
            name,
            shape,
            len(users_Bd) / seconds,
            "users/s",
            peak_mib=setting.peak_mib(function),
            times=timings[against].median_s / seconds if name != against else None,
            against=against,
            note=note,
            **setting.share(flops / seconds / 1e12, MATMUL.format("bfloat16")),
        )


def bench_faiss(setting: Setting) -> Iterator[Figures]:
    """Lists of 100 by FAISS indexes, beside a product and top-k by PyTorch."""
    users_Bd, items_Vd = _vectors(setting, users=1024)
    gpus = choose_gpus() if setting.device == "cuda" else "none"
    k = min(TOP, len(items_Vd) - 1)
    shape = f"{len(users_Bd):,} users, {len(items_Vd) - 1:,} items, d{users_Bd.shape[1]}, k {k}"
    exact = UserVectors(users_Bd.cpu())
    truth_Bk = (users_Bd @ items_Vd[1:].T).topk(k).indices.cpu() + 1

    def by_torch() -> Tensor:
        return (users_Bd @ items_Vd[1:].T).topk(k).indices

    seconds = setting.time({"torch": by_torch})["torch"].median_s
    yield row("product and top-k, torch", shape, len(users_Bd) / seconds, "users/s")
    for factory, setting_of in (("Flat", ""), ("IVF8,Flat" if setting.small else "IVF1024,Flat", "nprobe=8")):
        index = build_index(items_Vd.cpu(), factory, gpus=gpus)
        if setting_of:
            index.set(setting_of)
        found_Bk, _ = index.top(exact, k)
        hits = [len(set(a) & set(b)) for a, b in zip(found_Bk.tolist(), truth_Bk.tolist(), strict=True)]
        recall = sum(hits) / truth_Bk.numel()
        timing = setting.time({factory: lambda index=index: index.top(exact, k)}, warmup=1)[factory]
        yield row(
            f"faiss {factory} {setting_of}".strip(),
            shape,
            len(users_Bd) / timing.median_s,
            "users/s",
            times=seconds / timing.median_s,
            against="torch",
            note=f"recall {recall:.4f}, on {'the GPU' if index.on_gpu else 'the CPU'}",
        )
