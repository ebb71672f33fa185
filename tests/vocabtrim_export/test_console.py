"""Progress: what a line says of a task's speed and of the time that remains."""

import pytest

from vocabtrim_export.cli import console


@pytest.mark.parametrize(
    ("done", "seconds", "note"),
    [
        (0, 200.0, ""),  # the first prompts are being read
        (120, 240.0, ", 0.5 tokens/s"),
        (2_000, 400.0, ", 5.0 tokens/s, 5 h 27 min left"),
        (50_000, 1_000.0, ", 50 tokens/s, 17 min left"),
        (100_000, 1_000.0, ", 100 tokens/s"),
    ],
)
def test_the_remaining_time_is_told_once_the_speed_is_known(done, seconds, note, monkeypatch):
    now = [10.0]
    monkeypatch.setattr(console, "monotonic", lambda: now[0])
    speed = console._Speed({"calibrate": "tokens"})
    assert speed("calibrate maths", 0, 100_000) == ""
    now[0] += seconds
    assert speed("calibrate maths", done, 100_000) == note
