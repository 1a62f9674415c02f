"""What a perturbation's name says."""

import pytest

from scbench.evaluation.perturbation.names import is_control, targets_of

GENES = {"KLF1", "MAP2K6", "HLA_X", "A", "B"}


@pytest.mark.parametrize(("name", "targets"), [
    ("KLF1", ("KLF1",)), ("KLF1+MAP2K6", ("KLF1", "MAP2K6")), ("MAP2K6+KLF1", ("KLF1", "MAP2K6")), ("A_B", ("A", "B")),
    ("A,ctrl", ("A",)), ("ctrl,A", ("A",)), ("A+ctrl", ("A",)), ("A+Control", ("A",)), ("A_ctrl", ("A",)), ("A+A", ("A",)),
    ("A, B", ("A", "B")), ("A,non-targeting", ("A",)),
    ("HLA_X", ("HLA_X",)), ("drug_10uM", ("drug_10uM",)), ("A_unknown", ("A_unknown",)), ("A+unknown", ("A", "unknown")),
    ("ctrl", ()), ("non-targeting", ()), ("ctrl,ctrl", ()), ("control", ()), ("CTRL+ctrl", ()),
])
def test_names(name, targets):
    assert targets_of(name, "non-targeting", GENES) == targets


@pytest.mark.parametrize(("name", "control", "expected"), [
    ("ctrl", "ctrl", True), ("Ctrl", "ctrl", True), ("ctrl+ctrl", "ctrl", True), ("ctrl, ctrl", "ctrl", True),
    ("non-targeting", "non-targeting", True), ("a+b", "a+b", True), ("control", "ctrl", False), ("A+ctrl", "ctrl", False),
])
def test_controls_are_what_the_user_calls_so(name, control, expected):
    assert is_control(name, control) == expected
