"""What happens where the FAISS that is installed is one for GPUs and does not work."""

import sys

import faiss
import pytest
import torch

from findrec.errors import FindRecError
from findrec.evaluation.search import faiss_library


@pytest.fixture(params=["ImportError", "RuntimeError", "OSError"])
def broken(request, tmp_path, monkeypatch):
    """A package `faiss` that fails as those for GPUs do without CUDA libraries or a driver."""
    package = tmp_path / "faiss" / "__init__.py"
    package.parent.mkdir()
    counted = f"open({str(tmp_path / 'imports')!r}, 'a').write('one ')\n"
    package.write_text(f"{counted}raise {request.param}('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "faiss"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(faiss_library, "_failures", [])
    faiss_library._warn_once.cache_clear()
    return tmp_path / "imports"


def test_a_faiss_that_fails_counts_as_none_with_one_warning(broken, capsys):
    assert faiss_library.import_faiss() is None
    assert faiss_library.import_faiss() is None
    said = capsys.readouterr()
    assert (said.out + said.err).count("libcudart.so.12: cannot open") == 1
    with pytest.raises(FindRecError, match=r"installed but does not work \(libcudart.*pip install faiss-cpu"):
        faiss_library.need_faiss()
    assert broken.read_text() == "one ", "each attempt would take seconds"


def test_faiss_is_not_asked_for_gpus_where_cuda_cannot_start(monkeypatch):
    """It would abort the process."""

    def abort():
        raise AssertionError("FAISS was asked")

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", abort, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert faiss_library.choose_gpus() == "none"
