"""Activation checkpointing gives the same gradients with less memory."""

import pytest
import torch
from planted import planted_folder
from small_models import make_model, row_width, training_batch

from findrec.config import parse_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.config import SequenceConfig
from findrec.models.configs import CONFIGS
from findrec.models.parts.activation_checkpointing import CheckpointedModule, enable_activation_checkpointing
from findrec.training.build import build_tower_model

SEQUENCES = [name for name, config in CONFIGS.items() if issubclass(config, SequenceConfig)]
MODELS = {name: {"dim": 16, "name": name, "repeat": True} for name in SEQUENCES} | {
    "deep": {"dim": 16, "stream": {"layers": 3}},
    "gru": {"dim": 16, "stream": {"kind": "gru", "layers": 3}},
    "transformer": {"dim": 16, "stream": {"kind": "transformer", "layers": 3}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return planted_folder(tmp_path_factory.mktemp("checkpointing") / "data", num_users=10)


def gradients(name, length, checkpoint):
    """Gradients of a weighted sum of all results by weight, and the bytes kept for the backward pass."""
    config = parse_config({"model": MODELS[name]})
    torch.manual_seed(0)
    model = make_model(config.model, {"text": 12}, max_length=length)
    if checkpoint:
        enable_activation_checkpointing(model)
    item = torch.randint(1, 40, (3, length))
    position = torch.arange(3 * length)
    batch = Batch.build(
        item,
        torch.tensor([length, 1, length // 2 + 1]),
        torch.arange(3),
        position,
        item.flatten(),
        time=torch.randint(0, 10**6, (3, length)).cumsum(1),
    )
    batch = training_batch(model, batch)
    rows = torch.randn(len(batch.ids), row_width(config.model, {"text": 12}), requires_grad=True)
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
    result = {name: p.grad for name, p in model.named_parameters()} | {"rows": rows.grad}
    return result, sum(kept.values())


@pytest.mark.parametrize("length", [1, 17, 200])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients(name, length):
    want, kept = gradients(name, length, checkpoint=False)
    got, kept_less = gradients(name, length, checkpoint=True)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (value is None) == (got[key] is None)
        if value is not None:
            torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
    if length == 200:
        assert kept_less < 0.8 * kept


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_key_enables_it_in_every_part(folder, name):
    for enabled in (False, True):
        config = parse_config({"model": MODELS[name], "training": {"checkpoint_activations": enabled}})
        parts = [m for m in build_tower_model(config, folder).modules() if isinstance(m, CheckpointedModule)]
        assert parts
        assert all(part.checkpoint_activations == enabled for part in parts)
