"""What the terminal shows while a command runs."""

from __future__ import annotations

from onnx_asr.cli.terminal import TimeLeft


def test_the_time_left_goes_by_the_speed_since_the_stage_began() -> None:
    left = TimeLeft()
    assert left.of("refitting", 0.2, 100.0) == ""
    assert left.of("refitting", 0.3, 101.0) == ""  # too early to tell
    assert left.of("refitting", 0.4, 110.0) == "0:30 left"
    assert left.of("refitting", 0.5, 250.0) == "4:10 left"
    assert left.of("refitting", 1.0, 260.0) == "0:00 left"


def test_a_new_stage_begins_anew() -> None:
    left = TimeLeft()
    left.of("choosing", 0.0, 0.0)
    assert left.of("choosing", 0.5, 60.0) == "1:00 left"
    assert left.of("refitting", 0.5, 61.0) == ""
    assert left.of("refitting", 0.5, 90.0) == ""
    assert left.of("refitting", 0.75, 91.0) == "0:30 left"
