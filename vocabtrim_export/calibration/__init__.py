"""Calibration: which tokens a model really uses, counted on real text. Importing this does not load torch."""

from vocabtrim_export.calibration.batches import BatchLimits
from vocabtrim_export.calibration.calibrate import Source, calibrate
from vocabtrim_export.calibration.corpus import Corpus, builtin_corpus, read_corpus
from vocabtrim_export.calibration.counts import CalibrationRun, TokenCounts
from vocabtrim_export.calibration.document import Document, Message, Skipped, describe_skipped, skipped_note

__all__ = [
    "BatchLimits",
    "CalibrationRun",
    "Corpus",
    "Document",
    "Message",
    "Skipped",
    "Source",
    "TokenCounts",
    "builtin_corpus",
    "calibrate",
    "describe_skipped",
    "read_corpus",
    "skipped_note",
]
