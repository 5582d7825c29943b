"""A warning about a training is printed once."""

from findrec.training.logs.one_time_warnings import OneTimeWarnings


def test_each_warning_is_printed_once(capsys):
    warnings = OneTimeWarnings()
    warnings.show(0, [])
    assert capsys.readouterr().out == ""
    warnings.show(20, [("loss", "the loss rises"), ("rank", "latents have collapsed")])
    warnings.show(40, [("rank", "latents have collapsed"), ("load", "one expert takes 99%")])
    assert capsys.readouterr().out.splitlines() == [
        "WARNING step 20: the loss rises",
        "WARNING step 20: latents have collapsed",
        "WARNING step 40: one expert takes 99%",
    ]
