"""Calibration: which tokens a model really uses, counted on real text. Importing this does not load torch."""

from vocabtrim_export.calibration.batches import BatchLimits
from vocabtrim_export.calibration.calibrate import calibrate
from vocabtrim_export.calibration.calibration_run import CalibrationRun
from vocabtrim_export.calibration.corpus import Corpus, builtin_corpus, read_corpus
from vocabtrim_export.calibration.count_settings import CalibrationSource, CountEvents, CountSettings
from vocabtrim_export.calibration.counts import TokenCounts
from vocabtrim_export.calibration.document import Document, Message, Skipped, describe_skipped, skipped_note

__all__ = [
    "BatchLimits",
    "CalibrationRun",
    "CalibrationSource",
    "Corpus",
    "CountEvents",
    "CountSettings",
    "Document",
    "Message",
    "Skipped",
    "TokenCounts",
    "builtin_corpus",
    "calibrate",
    "describe_skipped",
    "read_corpus",
    "skipped_note",
]
