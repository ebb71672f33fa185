"""Offline: models and text in, bundles out. Names are imported when they are first used; torch is slow to load."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocabtrim_export.calibration import TokenCounts, calibrate
    from vocabtrim_export.export import ExportResult, ExportSettings, export
    from vocabtrim_export.select import Selection, select_vocab

__version__ = "0.1.0"

_HOMES = {
    "ExportResult": "vocabtrim_export.export",
    "ExportSettings": "vocabtrim_export.export",
    "Selection": "vocabtrim_export.select",
    "TokenCounts": "vocabtrim_export.calibration",
    "calibrate": "vocabtrim_export.calibration",
    "export": "vocabtrim_export.export",
    "select_vocab": "vocabtrim_export.select",
}

__all__ = ["ExportResult", "ExportSettings", "Selection", "TokenCounts", "calibrate", "export", "select_vocab"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
