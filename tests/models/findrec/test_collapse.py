"""Diagnostics out of bounds are put in words, healthy ones are not."""

from findrec.models.findrec.collapse import collapse_warnings

HEALTHY = {
    "train/loss": 5.0,
    "diagnostics/latent_std_text": 0.03,
    "diagnostics/latent_rank_text": 30.0,
    "diagnostics/gate_true_text": 0.95,
    "diagnostics/gate_wrong_text": 0.0,  # as it should be
    "diagnostics/latent_cosine_text": 0.0,
}
SICK = {
    "diagnostics/latent_std_text": 0.001,
    "diagnostics/latent_rank_image": 1.0,
    "diagnostics/gate_true_audio": 0.01,
}


def test_collapse_gives_a_warning_with_advice() -> None:
    assert collapse_warnings(HEALTHY) == []
    warnings = collapse_warnings(HEALTHY | SICK)
    assert {key for key, _ in warnings} == set(SICK)
    said = dict(warnings)
    assert "'text' have collapsed to a point" in said["diagnostics/latent_std_text"]
    assert "'image' have collapsed to a line" in said["diagnostics/latent_rank_image"]
    assert "'audio' is hardly used" in said["diagnostics/gate_true_audio"]
    assert all("lower training.optim.lr" in message for message in said.values())
