"""The selective scan against mamba-ssm and the memory's bandwidth; the catalogue loss against fused ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from bench import cross_entropy, scan
from bench.gpu.setting import COPY, MATMUL, Figures, Setting, row

from findrec.errors import FindRecError
from findrec.ops.scan.selective_scan import IMPLS, scan_backend
from findrec.progress import say

SCANS: tuple[scan.Shape, ...] = (
    (64, 200, 256, 16),
    (12, 1024, 256, 16),
    (2, 8192, 256, 16),
    (1, 65_536, 256, 16),
)
SMALL_SCANS: tuple[scan.Shape, ...] = ((2, 16, 8, 4),)
LOSSES = ((8192, 20_000, 64), (8192, 100_000, 128), (8192, 1_000_000, 128))  # T, V, d
SMALL_LOSSES = ((64, 500, 16),)
LIGER = "Liger, fused"


def usable_scans(device: str) -> list[str]:
    """The implementations of `selective_scan` that work on a device, the one that `auto` selects first."""
    usable = [scan_backend(device)]
    for impl in IMPLS:
        if impl in ("auto", "reference", *usable):
            continue
        try:
            usable.append(scan_backend(device, impl))
        except FindRecError as error:
            say(f"no figure of the scan {impl!r}: {error}")
    return usable


def scan_bytes(shape: scan.Shape) -> int:
    """The bytes that a forward and backward pass must move: inputs twice, y, its gradient, all gradients."""
    batch, length, width, _ = shape
    return 3 * scan.input_bytes(shape) + 2 * 4 * batch * length * width


def bench_scan(setting: Setting) -> Iterator[Figures]:
    """Forward and backward in float32 of each implementation, as a share of what a copy could move."""
    impls = usable_scans(setting.device)
    for shape in SMALL_SCANS if setting.small else SCANS:
        label, functions = "B{} L{} D{} N{}".format(*shape), {}
        for impl in impls:
            if impl == "torch" and shape[1] > 10_000:
                continue  # takes seconds
            function = scan.make_run(impl, shape, setting.device)
            if (problem := fails(function)) is not None:
                yield row(impl, label, None, "ms", note=problem)
            else:
                functions[impl] = function
        timings = setting.time(functions)
        for impl, function in functions.items():
            seconds = timings[impl].median_s
            against = impls[0] if impl != impls[0] and impls[0] in timings else None
            yield row(
                impl,
                label,
                seconds * 1e3,
                "ms",
                peak_mib=setting.peak_mib(function),
                times=timings[against].median_s / seconds if against else None,
                against=against,
                **setting.share(scan_bytes(shape) / seconds / 1e9, COPY),
            )


def make_loss(impl: str, shape: tuple[int, int, int], device: str) -> Callable[[], None]:
    """As `bench.cross_entropy.make_run`, also for Liger's fused linear cross-entropy."""
    if impl != LIGER:
        return cross_entropy.make_run(impl, shape, device)
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    tokens, items, width = shape
    h_Td = torch.randn(tokens, width, device=device, requires_grad=True)
    table_Vd = torch.randn(items, width, device=device).mul_(width**-0.5).requires_grad_()
    target_T = torch.randint(0, items, (tokens,), device=device)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def run() -> None:
        torch.autograd.grad(loss(table_Vd, h_Td, target_T), (h_Td, table_Vd))

    return run


def bench_loss(setting: Setting) -> Iterator[Figures]:
    """Forward and backward of the exact loss, with products of float32 and of TF32.

    The share is that of the three products of the logits' size that the mathematics needs (logits and two
    gradients); implementations that keep no logits compute them twice.
    """
    impls = [cross_entropy.BASELINE, "auto"]
    if setting.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        impls.append(LIGER)
    for precision, products in (("highest", "float32"), ("high", "tf32")):
        torch.set_float32_matmul_precision(precision)
        for shape in SMALL_LOSSES if setting.small else LOSSES:
            label = "T{} V{} d{}, {}".format(*shape, products)
            baseline_s = None
            for impl in impls:  # one at a time, as some need most of the memory
                figures = _loss_row(impl, shape, label, products, baseline_s, setting)
                if impl == cross_entropy.BASELINE:
                    baseline_s = figures.get("seconds")
                empty_cache(setting.device)
                yield figures


def _loss_row(
    impl: str,
    shape: tuple[int, int, int],
    label: str,
    products: str,
    baseline_s: float | None,
    setting: Setting,
) -> Figures:
    name = "findrec" if impl == "auto" else impl
    tokens, items, width = shape
    try:
        function = make_loss(impl, shape, setting.device)
        seconds = setting.time({name: function})[name].median_s
        peak_mib = setting.peak_mib(function)
    except Exception as error:
        return row(name, label, None, "ms", note=reason(error))
    return row(
        name,
        label,
        seconds * 1e3,
        "ms",
        seconds=seconds,
        peak_mib=peak_mib,
        times=baseline_s / seconds if baseline_s else None,
        against=cross_entropy.BASELINE,
        **setting.share(6 * tokens * items * width / seconds / 1e12, MATMUL.format(products)),
    )


def fails(function: Callable[[], object]) -> str | None:
    """Run a function once; the reason if it fails, so that other implementations are still measured."""
    try:
        function()
    except Exception as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def empty_cache(device: str) -> None:
    """Give cached memory back, for an implementation that needs much."""
    if device == "cuda":
        torch.cuda.empty_cache()
