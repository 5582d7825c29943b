"""The fusion layer: the anchor, missing modalities, and what it reads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.mufasa.config import FusionConfig
from findrec.models.mufasa.fusion import FusionLayer, anchor_features

WIDTHS = {"image": 5, "text": 6}
N = 8


def make(anchor: str = "text", **keys: object) -> FusionLayer:
    torch.manual_seed(0)
    return FusionLayer(WIDTHS, anchor, FusionConfig.model_validate({"dim": 8, "heads": 2} | keys))


def draw(missing: dict[str, list[int]] | None = None) -> dict[str, ModalRows]:
    torch.manual_seed(1)
    features = {}
    for name, width in WIDTHS.items():
        present = torch.ones(N, dtype=torch.bool)
        present[(missing or {}).get(name, [])] = False
        features[name] = ModalRows(torch.randn(N, width) * present[:, None], present)
    return features


def test_fused_vectors_are_those_of_the_equations() -> None:
    layer, features = make(), draw()
    streams = {n: layer.norms[n](layer.adapters[n](features[n].values)) for n in WIDTHS}
    fused = layer(features)
    (read,) = layer.reads
    for i in range(N):
        tokens = [streams[name][i] + layer.kind[k] for k, name in enumerate(WIDTHS)]
        anchor = tokens[1]
        query = read.query(read.norm(anchor))
        keys, values = read.read(torch.stack([*tokens, layer.missing])).chunk(2, dim=1)
        parts = []
        for head in (slice(0, 4), slice(4, 8)):
            weight = (keys[:, head] @ query[head] / 2).softmax(0)  # 2: root of the width of a head
            parts.append(weight @ values[:, head])
        c = read.out(torch.cat(parts))
        gate = torch.sigmoid(layer.gate.weight[0] @ torch.cat([anchor, c]) + layer.gate.bias[0])
        assert torch.allclose(fused.fused_nf[i], layer.norm(anchor + gate * c), atol=1e-5)


@pytest.mark.parametrize("anchor", ["text", "image", "mean"])
def test_missing_modalities_are_not_read(anchor: str) -> None:
    layer, missing = make(anchor), {"image": [0, 1], "text": [1, 2]}
    before = layer(draw(missing))
    features = draw(missing)
    for rows in features.values():
        rows.values[~rows.present] = 1e3
    after = layer(features)
    assert torch.equal(before.fused_nf, after.fused_nf)
    assert (before.fused_nf[1] == 0).all()  # has no content
    assert before.present_n.tolist() == [i != 1 for i in range(N)]
    assert before.fused_nf.isfinite().all()


def test_every_modality_changes_the_vector() -> None:
    layer, features = make(), draw()
    before = layer(features).fused_nf
    for name in WIDTHS:
        changed = features | {name: ModalRows(features[name].values.roll(1, 0), features[name].present)}
        assert (layer(changed).fused_nf - before).abs().amax(1).min() > 1e-3


def test_items_do_not_depend_on_each_other() -> None:
    layer, features = make(layers=2), draw({"image": [3]})
    some = {name: ModalRows(rows.values[2:5], rows.present[2:5]) for name, rows in features.items()}
    assert torch.allclose(layer(some).fused_nf, layer(features).fused_nf[2:5], atol=1e-6)


def test_hiding_spares_the_anchor_and_happens_only_when_asked_for() -> None:
    layer, features = make(drop_modality=0.5), draw()
    plain = layer(features).fused_nf
    assert torch.equal(plain, layer(features).fused_nf)
    hidden = layer(features, hide=True).fused_nf
    without = features | {"image": ModalRows(torch.zeros(N, 5), torch.zeros(N, dtype=torch.bool))}
    alone = layer(without).fused_nf
    is_plain = torch.isclose(hidden, plain, atol=1e-6).all(1)
    is_alone = torch.isclose(hidden, alone, atol=1e-6).all(1)
    assert (is_plain ^ is_alone).all()
    assert is_plain.any()
    assert is_alone.any()


def test_cosines_of_the_mean_anchor_are_means_of_cosines() -> None:
    features = draw({"image": [2]})
    unit, present = anchor_features(features, "mean")
    both = [F.cosine_similarity(r.values[:1], r.values[1:2]).item() for r in features.values()]
    assert float(unit[0] @ unit[1]) == pytest.approx(sum(both) / 2, abs=1e-6)
    assert torch.allclose(unit.norm(dim=1), torch.ones(N))
    assert present.all()
    assert torch.allclose(anchor_features(features, "text")[0], F.normalize(features["text"].values, dim=1))


def test_a_missing_anchor_is_told() -> None:
    with pytest.raises(FindRecError, match=r"model\.anchor='title' is not among .*image, text"):
        make("title")
    with pytest.raises(FindRecError, match=r"\(none\)"):
        FusionLayer({}, "mean", FusionConfig())
    with pytest.raises(ValueError, match=r"fusion\.dim=10 is not a multiple of fusion\.heads=4"):
        FusionConfig(dim=10)
