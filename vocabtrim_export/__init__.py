"""Offline: models and text in, bundles out. Names are imported when they are first used; torch is slow to load."""

import importlib
from typing import TYPE_CHECKING, Any

from vocabtrim_export.extras import missing_extra
from vocabtrim_export.version import __version__ as __version__

if TYPE_CHECKING:
    from vocabtrim_export.calibration import TokenCounts, calibrate
    from vocabtrim_export.calibration.counting import CalibrationSettings
    from vocabtrim_export.pipeline import ExportResult, export
    from vocabtrim_export.selection import Coverage, Selection, select_vocab
    from vocabtrim_export.settings import ExportSettings
    from vocabtrim_export.trt.settings import TensorRTSettings


_HOMES = {
    "CalibrationSettings": "vocabtrim_export.calibration.counting",
    "Coverage": "vocabtrim_export.selection",
    "ExportResult": "vocabtrim_export.pipeline",
    "ExportSettings": "vocabtrim_export.settings",
    "Selection": "vocabtrim_export.selection",
    "TensorRTSettings": "vocabtrim_export.trt.settings",
    "TokenCounts": "vocabtrim_export.calibration",
    "calibrate": "vocabtrim_export.calibration",
    "export": "vocabtrim_export.pipeline",
    "select_vocab": "vocabtrim_export.selection",
}

__all__ = [
    "CalibrationSettings",
    "Coverage",
    "ExportResult",
    "ExportSettings",
    "Selection",
    "TensorRTSettings",
    "TokenCounts",
    "calibrate",
    "export",
    "select_vocab",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if (message := missing_extra(error)) is None:
            raise
        raise ModuleNotFoundError(f"vocabtrim_export.{name}: {message}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
