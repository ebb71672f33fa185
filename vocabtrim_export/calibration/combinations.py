"""Refuses settings of a calibration that would be ignored because of others, before any file is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import VocabtrimError

if TYPE_CHECKING:
    from vocabtrim_export.calibration.counting import CalibrationSettings

_GENERATION = ("temperature",)
_SERVER = ("calibration_endpoint", "calibration_model")
_TEMPLATE = ("chat_template", "template_args")
_COUNTING = ("calibration_source", "calibration_tokens", "seed", "ray", *_GENERATION, *_SERVER, *_TEMPLATE)
_OPTIONS = {"template_args": "template_arg"}


def are_counts(names: Sequence[str | Path]) -> bool:
    """Returns whether the files hold token counts: all of them, by their names."""
    return bool(names) and all(str(name).endswith(".safetensors") and "=" not in str(name) for name in names)


def check_combination(settings: "CalibrationSettings") -> None:
    """Refuse settings that would be ignored.

    Raises:
        VocabtrimError: There are some.
    """
    if are_counts(settings.calibration):
        _refuse(settings, _COUNTING, "says how to count, and --calibration names counts: leave one of them out")
    if bool(settings.calibration_endpoint) != bool(settings.calibration_model):
        raise VocabtrimError("--calibration-endpoint URL and --calibration-model NAME belong together: give both")
    if settings.calibration_source == "text":
        _refuse(settings, _SERVER, "lets a server generate, and --calibration-source text counts a text: leave one out")
        _refuse(settings, _GENERATION, "is for generations, and --calibration-source text counts a text: leave it out")
    if settings.calibration_endpoint:
        _refuse(settings, ("ray",), "shares the work of this program, and a server generates: leave one out")
        _refuse(settings, _TEMPLATE, "has no effect on the server, which renders prompts itself: leave it out")


def _refuse(settings: "CalibrationSettings", names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(settings, name)
        default = type(settings).__dataclass_fields__[name].default
        if value != default and not (name == "template_args" and not value):
            raise VocabtrimError(f"--{_OPTIONS.get(name, name).replace('_', '-')} {why}")
