"""Wrappers of the FAISS library (Douze et al., arXiv 2401.08281): import, GPUs and filtered search."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from findrec.errors import FindRecError
from findrec.progress import warn

GPU_MOST = 2048  # maximum number of items that a GPU index returns, and of lists that it probes

Gpus = Literal["none", "replicate", "shard"]

_failures: list[str] = []  # of the import, which would take seconds again


def import_faiss() -> Any:
    """The configured `faiss` module; None if it is not installed, or, with one warning, does not work."""
    try:
        faiss, problem = _import()
    except ModuleNotFoundError:
        return None
    if problem:
        _warn_once(problem)
    return faiss


def need_faiss() -> Any:
    """The `faiss` module; raises `FindRecError` if it is not installed or does not work."""
    try:
        faiss, problem = _import()
    except ModuleNotFoundError:
        raise FindRecError(
            "FAISS is not installed, which indexes need: pip install faiss-cpu (on a CUDA machine faiss-gpu; "
            "never both, as they install the same files)"
        ) from None
    if problem:
        raise FindRecError(problem)
    return faiss


def _import() -> tuple[Any, str]:
    """The module, or None and why it does not work; raises `ModuleNotFoundError` if it is not installed."""
    if _failures:
        return None, _failures[0]
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name == "faiss":
            raise
        failed: Exception = error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        failed = error  # the GPU package raises any of them for missing CUDA libraries
    else:
        faiss.cvar.distance_compute_blas_threshold = 1  # always use BLAS, which is faster
        return faiss, ""
    said = " ".join(str(failed).split())[:300] or type(failed).__name__
    _failures.append(
        f"FAISS is installed but does not work ({said}). Where there is no GPU, or it cannot be mended: pip "
        "uninstall faiss-gpu faiss-cpu, then pip install faiss-cpu"
    )
    return None, _failures[0]


@cache
def _warn_once(problem: str) -> None:
    warn(problem)


def _num_gpus(faiss: Any) -> int:
    # FAISS aborts the process where the CUDA driver cannot start, so PyTorch is asked first.
    if not hasattr(faiss, "StandardGpuResources") or not torch.cuda.is_available():
        return 0
    try:
        return int(faiss.get_num_gpus())
    except RuntimeError:
        return 0


def choose_gpus(requested: str | None = None) -> Gpus:
    """How indexes use GPUs: as requested; by default `replicate` if FAISS has a GPU, otherwise `none`.

    Raises `FindRecError` for an unknown mode, or if GPUs are requested and FAISS has none.
    """
    faiss = need_faiss()
    has_gpu = _num_gpus(faiss) > 0
    if requested == "none" or (requested is None and not has_gpu):
        return "none"
    if requested not in (None, "replicate", "shard"):
        raise FindRecError(f"--gpus {requested}: give none, replicate or shard")
    if not has_gpu:
        raise FindRecError(
            f"--gpus {requested}, but FAISS finds no GPU here. On a CUDA machine: pip uninstall faiss-cpu, "
            "then pip install faiss-gpu; otherwise leave --gpus out"
        )
    return "shard" if requested == "shard" else "replicate"


def copy_to_gpus(raw: Any, gpus: Gpus) -> Any:
    """Copy an index to all GPUs, replicated or sharded; None if its kind does not support GPUs (HNSW)."""
    faiss = need_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.shard = gpus == "shard"
    try:
        return faiss.index_cpu_to_all_gpus(raw, co=options)
    except RuntimeError:
        return None


def keeps_vectors(raw: Any) -> bool:
    """Whether an index stores the original vectors, so that its scores are exact."""
    faiss = need_faiss()
    index = faiss.downcast_index(raw)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat | faiss.IndexNSGFlat)


def search_only(raw: Any, among_I: NDArray[np.bool_]) -> Any:
    """Search parameters that restrict a CPU index to the rows marked in `among_I` `[I]`.

    Search parameters override those of the index, which are therefore copied. Kinds of index without support
    raise a `RuntimeError` on search.
    """
    faiss = need_faiss()
    selector = faiss.IDSelectorBitmap(np.packbits(among_I, bitorder="little"))
    return _parameters(faiss, raw, selector)


def _parameters(faiss: Any, raw: Any, selector: Any) -> Any:
    index = faiss.downcast_index(raw)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(faiss, index.index, selector))
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(faiss, index.base_index, selector)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVFPQ):
        return faiss.IVFPQSearchParameters(sel=selector, nprobe=index.nprobe, max_codes=index.max_codes)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe, max_codes=index.max_codes)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)


def reason(error: RuntimeError) -> str:
    """The message of a FAISS error without the location in its source."""
    message = str(error).strip().splitlines()[-1].rsplit(" failed: ", 1)[-1]
    return message.split(".cpp:")[-1].lstrip("0123456789: ")
