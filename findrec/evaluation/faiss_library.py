"""What we ask of the FAISS library itself: that it is there, its GPUs, and how a search is told what to skip.

Douze et al., "The Faiss library", arXiv 2401.08281.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from findrec.errors import FindRecError

GPU_MOST = 2048  # items that a GPU index can return, and lists that it can look into

Gpus = Literal["none", "replicate", "shard"]


def import_faiss() -> Any:
    """The `faiss` module, set up; None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.cvar.distance_compute_blas_threshold = 1  # below it FAISS takes another, slower road
    return faiss


def need_faiss() -> Any:
    """The `faiss` module; raises `FindRecError` where it is not installed."""
    faiss = import_faiss()
    if faiss is None:
        raise FindRecError(
            "FAISS is not installed, and indexes are built with it: pip install faiss-cpu (on a CUDA machine "
            "faiss-gpu; never both, as they own the same files)"
        )
    return faiss


def choose_gpus(asked: str | None = None) -> Gpus:
    """How indexes are searched: as asked, or `replicate` where FAISS finds a GPU and `none` where not.

    Raises `FindRecError` where GPUs are asked for and this FAISS has none.
    """
    faiss = need_faiss()
    there = bool(hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus())
    if asked == "none" or (asked is None and not there):
        return "none"
    if asked not in (None, "replicate", "shard"):
        raise FindRecError(f"--gpus {asked}: give none, replicate or shard")
    if not there:
        raise FindRecError(
            f"--gpus {asked}, but FAISS finds no GPU here. On a CUDA machine: pip uninstall faiss-cpu, then "
            "pip install faiss-gpu; without one leave --gpus out"
        )
    return "shard" if asked == "shard" else "replicate"


def copy_to_gpus(raw: Any, gpus: Gpus) -> Any:
    """The index on all GPUs, whole on each or in parts; None for what has no GPU form (HNSW)."""
    faiss = need_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.shard = gpus == "shard"
    try:
        return faiss.index_cpu_to_all_gpus(raw, co=options)
    except RuntimeError:
        return None


def keeps_vectors(raw: Any) -> bool:
    """Whether an index holds vectors as they were given, so that its scores are those of the model."""
    faiss = need_faiss()
    index = faiss.downcast_index(raw)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat | faiss.IndexNSGFlat)


def search_only(raw: Any, among_I: NDArray[np.bool_]) -> Any:
    """Search parameters of a CPU index that make it return only the rows marked in `among_I` `[I]`.

    They override the index's own, so these are copied. Some kinds of index know no such thing and refuse the
    parameters when they are searched, with a `RuntimeError`.
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
    """What FAISS says without where in its source it says it."""
    told = str(error).strip().splitlines()[-1].rsplit(" failed: ", 1)[-1]
    return told.split(".cpp:")[-1].lstrip("0123456789: ")
