"""Diagnostics out of bounds are put in words, healthy ones are not."""

from findrec.models.findrec_2025.collapse import collapse_warnings

HEALTHY = {"train/loss": 5.0, "diagnostics/latent_std_text": 0.9, "diagnostics/latent_rank_text": 30.0}
SICK = {
    "diagnostics/latent_std_text": 0.001,
    "diagnostics/latent_rank_image": 1.0,
    "diagnostics/expert_load_max": 0.99,
}


def test_collapse_gives_a_warning_with_advice() -> None:
    assert collapse_warnings(HEALTHY) == []
    warnings = collapse_warnings(SICK | HEALTHY | {"diagnostics/latent_std_text": 0.001})
    assert [key for key, _ in warnings] == list(SICK)
    (_, point), (_, line), (_, load) = warnings
    assert "'text' have collapsed to a point" in point
    assert "lower model.align.weight" in point
    assert "'image' have collapsed to a line" in line
    assert "balance_weight" in load
