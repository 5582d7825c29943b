"""Layers that are run again give the same gradients, and keep less until then."""

import pytest
import torch

from findrec.config import parse_config
from findrec.datasets.batch import Batch, ModalRows
from findrec.models.recompute import recompute_layers
from findrec.models.registry import build_model

MODELS = {
    "findrec": {"dim": 16, "stream": {"layers": 3}},
    "sasrec": {"dim": 16, "name": "sasrec", "layers": 3},
    "gru": {"dim": 16, "stream": {"kind": "gru", "layers": 3}},
    "transformer": {"dim": 16, "stream": {"kind": "transformer", "layers": 3}},
}


def gradients(name, length, recompute):
    """Gradients of a weighted sum of all results by weight, and the bytes kept for the backward pass."""
    config = parse_config({"model": MODELS[name]})
    torch.manual_seed(0)
    model = build_model(config.model, feature_dims={"text": 12}, repeat=True, max_length=length)
    if recompute:
        recompute_layers(model)
    item = torch.randint(1, 40, (3, length))
    position = torch.arange(3 * length)
    batch = Batch.build(
        item, torch.tensor([length, 1, length // 2 + 1]), torch.arange(3), position, item.flatten()
    )
    rows = torch.randn(len(batch.ids), 16, requires_grad=True)
    features = {"text": ModalRows(torch.randn(len(batch.ids), 12), batch.ids > 0)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(batch, rows, features)
    total = (out.h * torch.randn_like(out.h)).sum() + sum(term.value for term in out.aux.values())
    (total + out.repeat.sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"rows": rows.grad}
    return found, sum(kept.values())


@pytest.mark.parametrize("length", [1, 17, 200])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients(name, length):
    want, kept = gradients(name, length, recompute=False)
    got, kept_less = gradients(name, length, recompute=True)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (value is None) == (got[key] is None)
        if value is not None:
            torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
    if length == 200:
        assert kept_less < 0.8 * kept
