"""Benchmark of expert routing with batched products against loops over heads and experts.

The loops do not compute the balance and z losses, which the op always computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bench.compare import Case, compare
from bench.rows import Row
from torch import Tensor
from torch.nn import functional as F

from findrec.ops.expert_routing import expert_routing

Shape = tuple[int, int, int, int, int, int | None]
SHAPES: tuple[Shape, ...] = (  # T, H, E, i, o, k
    (3200, 4, 4, 64, 32, None),
    (3200, 4, 4, 64, 32, 2),
    (3200, 4, 16, 64, 32, 2),
)
IMPLS = ("loops", "dense", "sparse")


def loops(
    x_THi: Tensor, logits_THE: Tensor, weight_HEio: Tensor, bias_HEo: Tensor, top_k: int | None
) -> Tensor:
    """The experts' outputs `[T, H, o]`, one head and one expert at a time."""
    gates_THE = torch.softmax(logits_THE, -1)
    if top_k is not None:
        best_THk, chosen_THk = gates_THE.topk(top_k, dim=-1)
        best_THk = best_THk / best_THk.sum(-1, keepdim=True)
        gates_THE = torch.zeros_like(gates_THE).scatter(-1, chosen_THk, best_THk)
    heads = []
    for x_Ti, gates_TE, weight_Eio, bias_Eo in zip(
        x_THi.unbind(1), gates_THE.unbind(1), weight_HEio, bias_HEo, strict=True
    ):
        outs = [
            gate_T.unsqueeze(1) * F.gelu(torch.addmm(bias_o, x_Ti, weight_io))
            for gate_T, weight_io, bias_o in zip(gates_TE.unbind(1), weight_Eio, bias_Eo, strict=True)
        ]
        heads.append(torch.stack(outs).sum(0))
    return torch.stack(heads, dim=1)


def make_run(impl: str, shape: Shape, device: str = "cpu") -> Callable[[], None]:
    """Return a function that runs one forward and backward pass of `impl` on fixed random inputs."""
    t, heads, experts, width, out_width, top_k = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    x, logits = draw(t, heads, width), draw(t, heads, experts)
    weight, bias = draw(heads, experts, width, out_width) / 8, draw(heads, experts, out_width)
    tensors = [tensor.requires_grad_() for tensor in (x, logits, weight, bias)]
    grad = draw(t, heads, out_width)

    def run() -> None:
        if impl == "loops":
            out = loops(x, logits, weight, bias, top_k)
        else:
            out = expert_routing(*tensors, top_k=top_k, impl=impl).out_THo  # type: ignore[arg-type]
        torch.autograd.grad(out, tensors, grad)

    return run


def bench_routing(shapes: Sequence[Shape] = SHAPES, runs: int = 11) -> list[Row]:
    """Measure the loops and the op at each `(T, H, E, i, o, k)`; k None: all experts."""
    cases = [
        Case(
            shape,
            "T{} H{} E{} i{} o{} k{}".format(*shape),
            IMPLS[:1],
            IMPLS[1:2] if shape[-1] is None else IMPLS[1:],
            runs,
        )
        for shape in shapes
    ]
    return compare("expert_routing", cases, make_run)
