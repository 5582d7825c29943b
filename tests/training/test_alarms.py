"""Alarms are raised for what is wrong, once, and not for what is well."""

from findrec.training.alarms import Alarms

HEALTHY = {"train/loss": 5.0, "diagnostics/latent_std_text": 0.9, "diagnostics/latent_rank_text": 30.0}
SICK = {
    "diagnostics/latent_std_text": 0.001,
    "diagnostics/latent_rank_image": 1.0,
    "diagnostics/expert_load_max": 0.99,
}


def test_each_alarm_is_given_once(capsys):
    alarms = Alarms()
    alarms.check(0, HEALTHY)
    assert capsys.readouterr().out == ""
    alarms.check(20, SICK)
    alarms.check(40, SICK)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("WARNING step 20: ") for line in lines)
    assert "'text' have collapsed to a point" in lines[0]
    assert "'image' have collapsed to a line" in lines[1]
    assert "balance_weight" in lines[2]
